import asyncio

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    ResourceExhaustedError,
)
from flplatform.core.ports import Row
from flplatform.server import ledger as module
from flplatform.server.ledger import Ledger, decode
from tests.support.stores import MemoryStateStore
from tests.support.workflows import job, run_opened
from tests.unit.server.scene import play, refused

END = ev.RunEnded(status="aborted", reason="wrong data")


def opened(submission: str = "1", package: str = "package") -> ev.RunOpened:
    blob = ev.Blob(digest=package, size=1)
    changes = {"run": 0, "submission_id": submission * 32, "job_blob": blob}
    return run_opened("ab", job(rounds=5)).model_copy(update=changes)


def read(store: MemoryStateStore) -> tuple[Ledger, set[str]]:
    disabled: set[str] = set()
    ledger = Ledger(store, disabled)
    ledger.read()
    return ledger, disabled


def test_a_number_comes_with_the_first_row_of_its_stream() -> None:
    async def scene() -> None:
        store = MemoryStateStore()
        ledger, _ = read(store)
        assert (ledger.summaries(), list(ledger.runs()), 1 in ledger) == ([], [], False)
        run, row = await ledger.number(opened())
        assert (run, row) == (1, store.read("run/1")[0])
        event = decode(row)
        assert isinstance(event, ev.RunOpened)
        assert event.run == 1
        assert await ledger.number(opened()) == (1, None)
        assert (await ledger.number(opened("2")))[0] == 2
        assert ledger.submitted("1" * 32, "package") == 1
        assert ledger.submitted("3" * 32, "package") is None
        assert type(await refused(ledger.number(opened(package="other")))) is AlreadyExistsError
        (first, second) = ledger.summaries()
        assert (first.run, first.status, first.rounds, second.run) == (1, "deploying", 5, 2)

    play(scene())


def test_many_at_once_get_numbers_without_gaps() -> None:
    async def scene() -> None:
        store = MemoryStateStore()
        ledger, _ = read(store)
        asked = [opened(digit) for digit in "123456" * 3]
        numbers = [run for run, _ in await asyncio.gather(*map(ledger.number, asked))]
        assert numbers == [1, 2, 3, 4, 5, 6] * 3
        assert [row.seq for row in store.read(ev.FEDERATION)] == [1, 2, 3, 4, 5, 6]

    play(scene())


def test_it_is_read_as_it_was_written() -> None:
    async def scene() -> None:
        store = MemoryStateStore()
        ledger, disabled = read(store)
        for digit in "12":
            await ledger.number(opened(digit))
        await ledger.set_enabled("a", False, "me")
        await ledger.set_enabled("b", False, "me")
        await ledger.set_enabled("a", True, "me")
        await ledger.summarise(1, END, 3, 5)
        assert disabled == {"b"}
        again, disabled = read(store)
        assert disabled == {"b"}
        first, second = again.summaries()
        assert (first.status, first.reason, first.round, first.rounds) == (
            "aborted",
            "wrong data",
            3,
            5,
        )
        assert first.ended
        assert not second.ended
        assert first.submitted == ledger[1].submitted
        assert again.submitted("2" * 32, "package") == 2
        assert (await again.number(opened("3")))[0] == 3

    play(scene())


def test_what_cannot_be_stored_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.001)

    async def scene() -> None:
        store = MemoryStateStore()
        ledger, disabled = read(store)
        await ledger.number(opened())
        store.full = True
        assert type(await refused(ledger.number(opened("2")))) is ResourceExhaustedError
        asked = ledger.set_enabled("a", False, "me")
        assert type(await refused(asked)) is ResourceExhaustedError
        assert disabled == set()
        assert list(ledger.runs()) == [1]
        ending = asyncio.create_task(ledger.summarise(1, END, 1, 1))
        await asyncio.sleep(0.005)
        assert not ending.done()
        store.full = False
        await ending
        assert [row.type for row in store.read(ev.FEDERATION)] == ["RunNumbered", "RunSummarised"]

    play(scene())


def test_a_note_is_not_stored() -> None:
    async def scene() -> None:
        store = MemoryStateStore()
        ledger, _ = read(store)
        await ledger.number(opened())
        ledger.note(1, status="training", round=2)
        assert (ledger[1].status, ledger[1].round) == ("training", 2)
        again, _ = read(store)
        assert again[1].status == "deploying"

    play(scene())


def test_a_stream_of_a_newer_release_is_refused() -> None:
    store = MemoryStateStore()
    store.append([Row(ev.FEDERATION, 1, "", "Telepathy", 1, "{}")])
    with pytest.raises(FailedPreconditionError, match="federation#1 holds event Telepathy"):
        read(store)


def test_a_deleted_run_is_remembered_and_its_number_is_not_given_again() -> None:
    async def scene() -> None:
        store = MemoryStateStore()
        ledger, _ = read(store)
        await ledger.number(opened())
        await ledger.summarise(1, END, 2, 5)
        await ledger.step(lambda: ev.RunDeleted(run=1, by="amy"))
        for each in (ledger, read(store)[0]):
            assert each[1].deleted_by == "amy"
            assert each[1].deleted == store.read(ev.FEDERATION)[-1].time
            assert each[1].organisation == "hospital"
        assert (await ledger.number(opened("2")))[0] == 2
        assert ledger.submitted("1" * 32, "package") == 1

    play(scene())
