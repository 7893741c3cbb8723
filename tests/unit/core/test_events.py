import json
from pathlib import Path

import pytest

from flplatform.algorithms.workflows import RunState, replay
from flplatform.core import events
from flplatform.core.errors import DataLossError, FailedPreconditionError
from flplatform.core.events import (
    EVENTS,
    Event,
    ModelPublished,
    SiteAnswered,
    SiteDisabled,
    UpdateAccepted,
    decode,
    encode,
    run_stream,
)
from flplatform.core.ports import Row
from tests.support.workflows import digest

GOLDEN = Path(__file__).parents[2] / "golden"
LOGS = sorted(GOLDEN.glob("run-*.jsonl"))


def rows(log: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in log.read_text().splitlines()]


def decoded(row: Row) -> Event:
    return decode(row.type, row.version, row.body, f"{row.stream}:{row.seq}")


def test_golden_logs_hold_every_type_of_event():
    found = {(row.type, row.version) for log in LOGS for row in rows(log)}
    assert found >= set(EVENTS)


@pytest.mark.parametrize("kind", EVENTS.values(), ids=lambda kind: kind.__name__)
def test_an_event_comes_back_as_it_was(kind):
    stored = [row for log in LOGS for row in rows(log)]
    of_kind = [event for row in stored if isinstance(event := decoded(row), kind)]
    assert of_kind
    assert [decode(*encode(event), where="here") for event in of_kind] == of_kind


def test_the_golden_log_of_0_1_is_still_written_byte_for_byte():
    for row in rows(GOLDEN / "run-0.1.jsonl"):
        assert encode(decoded(row)) == (row.type, row.version, row.body)


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.stem)
def test_golden_streams_have_no_gaps(log):
    last: dict[str, int] = {}
    for row in rows(log):
        assert row.seq == last.get(row.stream, 0) + 1
        last[row.stream] = row.seq


def replayed(log: str) -> RunState:
    return replay([decoded(row) for row in rows(GOLDEN / log) if row.stream == "run/7"])


def test_the_golden_run_of_0_1_still_means_the_same():
    state = replayed("run-0.1.jsonl")
    assert (state.run, state.status, state.round, state.min_clients) == (7, "finished", 2, 1)
    assert {number: model.digest for number, model in state.models.items()} == {
        0: digest("initial model"),
        1: digest("global 1"),
        2: digest("global 2"),
    }
    assert state.scores == {0: 0.55, 1: 0.75, 2: 0.6833333333333333}
    assert state.best_model[0] == 1
    assert state.deployed == {"aachen", "basel", "cork"}
    assert state.gathers["submit"].closed.gaps == {
        "7/2/submit_model/cork": "FileNotFoundError: no best model"
    }
    assert len(state.gathers["validate"].results) == 6
    assert len(state.gathers["validate"].closed.gaps) == 3


def test_the_golden_rounds_of_0_1_still_read_what_aggregation_needs():
    stored = [decoded(row) for row in rows(GOLDEN / "run-0.1.jsonl")]
    closed = [event for event in stored if isinstance(event, events.RoundClosed)]
    assert [
        [(item.site, item.digest, item.weight) for item in event.contributions] for event in closed
    ] == [
        [("aachen", digest("1/aachen"), 30.0), ("basel", digest("1/basel"), 40.0)],
        [("aachen", digest("2/aachen"), 30.0)],
    ]
    assert [event.base.digest for event in closed] == [digest("initial model"), digest("global 1")]
    assert closed[1].stragglers == ("basel",)
    assert closed[1].aggregator_args == {"site_weights": {"basel": 2.0}}


def test_floats_come_back_bit_for_bit():
    metrics = {"third": 1 / 3, "tiny": 5e-324, "huge": 1.7976931348623157e308, "minus": -0.0}
    event = UpdateAccepted(
        task_id="1/1/train/a", site="a", round=1, digest="d", size=1, examples=1, metrics=metrics
    )
    back = decode(*encode(event), where="here")
    assert {name: value.hex() for name, value in back.metrics.items()} == {
        name: value.hex() for name, value in metrics.items()
    }


def test_text_of_any_script_comes_back():
    event = SiteAnswered(site="a", accepted=False, rule="rôle", reason='„nein"\n\u2028\x00')
    assert decode(*encode(event), where="here") == event


@pytest.mark.parametrize(("kind", "version"), [("RoundMerged", 1), ("RoundClosed", 9)])
def test_an_unknown_type_or_version_is_named(kind, version):
    message = f"run/3:8 holds event {kind} version {version}, .* open this state with the newer"
    with pytest.raises(FailedPreconditionError, match=message):
        decode(kind, version, "{}", "run/3:8")


@pytest.mark.parametrize("body", ["{", "[]", '{"site": "a"}', '{"site": 1, "by": "b"}',
                                  '{"site": "a", "by": "b", "why": "c"}',
                                  ])  # fmt: skip
def test_a_body_of_another_shape_is_refused(body):
    with pytest.raises(DataLossError, match="federation:3"):
        decode("SiteDisabled", 1, body, "federation:3")


def test_older_versions_are_read_through_their_upcasters(monkeypatch):
    monkeypatch.setitem(events.UPCASTERS, ("SiteDisabled", -1), lambda old: (0, {"site": old["s"]}))
    monkeypatch.setitem(events.UPCASTERS, ("SiteDisabled", 0), lambda old: (1, {**old, "by": "?"}))
    assert decode("SiteDisabled", -1, '{"s": "a"}', "x") == SiteDisabled(site="a", by="?")


def test_an_upcast_body_is_checked_like_any_other(monkeypatch):
    monkeypatch.setitem(events.UPCASTERS, ("SiteDisabled", 0), lambda old: (1, old))
    with pytest.raises(DataLossError, match="by\n.*Field required"):
        decode("SiteDisabled", 0, '{"site": "a"}', "federation:3")


def test_events_are_values():
    event = ModelPublished(round=1, model={"digest": "d", "size": 1})
    with pytest.raises(ValueError, match="frozen"):
        event.round = 2


def test_streams_are_named_by_run():
    assert run_stream(12) == "run/12"
