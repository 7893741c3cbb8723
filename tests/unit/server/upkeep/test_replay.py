"""Rounds that are computed again."""

import json
from collections.abc import Callable

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import NotFoundError
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.replay import replay_run


def test_every_round_can_be_computed_again(place: Place) -> None:
    before = place.blobs.digests()
    found = list(replay_run(place, 1))
    assert [(each.round, each.outcome) for each in found] == [(n, "same") for n in (1, 2, 3)]
    assert [each.outcome for each in replay_run(place, 1, 2)] == ["same"]
    assert place.blobs.digests() == before
    with pytest.raises(NotFoundError, match="no closed round 9"):
        list(replay_run(place, 1, 9))
    with pytest.raises(NotFoundError, match="there are runs 1 to 2"):
        list(replay_run(place, 3))


def closed_in(place: Place) -> list[ev.RoundClosed]:
    return [e for e in place.history().runs[1].stream.only() if isinstance(e, ev.RoundClosed)]


def test_a_freed_input_and_a_lost_one(place: Place, sql: Callable[..., None]) -> None:
    closed = closed_in(place)
    update, model = closed[0].contributions[0].digest, closed[1].base.digest
    place.blobs.file(update).unlink()
    (first, *_) = replay_run(place, 1)
    assert (first.outcome, first.detail) == ("error", f"the update of a is lost: {update}")
    with place.snapshot() as log:
        opened = json.loads(log.read("run/1")[0].body)
    opened["job"]["keep_updates"] = "none"
    sql(f"UPDATE events SET body='{json.dumps(opened)}' WHERE stream='run/1' AND seq=1")
    place.blobs.file(model).unlink()
    found = {each.round: each for each in replay_run(place, 1)}
    assert found[1].outcome == "freed"
    assert (found[2].outcome, found[2].detail) == ("error", f"the base model is lost: {model}")


def test_a_damaged_input(place: Place) -> None:
    closed = closed_in(place)
    damaged = place.blobs.file(closed[1].contributions[1].digest)
    data = bytearray(damaged.read_bytes())
    data[-2] ^= 0x40
    damaged.chmod(0o600)
    damaged.write_bytes(data)
    found = {each.round: each for each in replay_run(place, 1)}
    assert found[1].outcome == "same"
    assert found[2].outcome == "differs"
    assert "model made now" in found[2].detail
    assert "the update of b is damaged" in found[2].detail
    assert found[3].outcome == "same"


def test_a_model_that_is_not_what_the_round_gives(place: Place, sql: Callable[..., None]) -> None:
    with place.snapshot() as log:
        rows = [row for row in log.read("run/1") if row.type == "ModelPublished"]
    body = json.loads(rows[2].body) | {"model": json.loads(rows[1].body)["model"]}
    sql(f"UPDATE events SET body='{json.dumps(body)}' WHERE stream='run/1' AND seq={rows[2].seq}")
    assert [each.outcome for each in replay_run(place, 1)] == ["same", "same", "differs"]
