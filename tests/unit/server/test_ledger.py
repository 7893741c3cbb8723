import asyncio

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    ResourceExhaustedError,
)
from flplatform.core.ports import Row
from flplatform.server import ledger as module
from flplatform.server.ledger import Ledger, decode, read_run
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


# ---- lost events ------------------------------------------------------------------------------


async def two_runs() -> MemoryStateStore:
    store = MemoryStateStore()
    ledger, _ = read(store)
    for digit in "12":
        await ledger.number(opened(digit))
    await ledger.summarise(1, END, 3, 5)
    return store


@pytest.mark.parametrize(
    ("stream", "seqs", "told", "next_run"),
    [
        ("federation", (), ["run 1 has events, but no number", "run 2 has events"], 3),
        ("federation", (2, 3), ["run 2 has events, but no number"], 3),
        ("run/2", (), ["run 2 has a number, but no event"], 3),
        ("run/2", (1,), ["run/2 has 1 of 2 events"], 3),
    ],
)
def test_what_is_lost_is_told_and_no_number_is_given_twice(
    stream: str, seqs: tuple[int, ...], told: list[str], next_run: int
) -> None:
    async def scene() -> None:
        store = await two_runs()
        assert read(store)[0].lacking == []
        store.append([Row("run/2", 2, "", *ev.encode(END))])
        store.lose(stream, *seqs)
        ledger, _ = read(store)
        assert len(ledger.lacking) == len(told), ledger.lacking
        for text, expected in zip(ledger.lacking, told, strict=True):
            assert text.startswith(expected)
        assert (ledger.last, (await ledger.number(opened("3")))[0]) == (2, next_run)

    play(scene())


@pytest.mark.parametrize("seq", [1, 2])
def test_no_server_starts_whose_bars_may_be_lost(seq: int) -> None:
    async def scene() -> None:
        store = await two_runs()
        store.lose("federation", seq)
        told = f"federation: event {seq} is missing; restore a backup: .* disabled a site"
        with pytest.raises(DataLossError, match=told):
            read(store)

    play(scene())


@pytest.mark.parametrize(
    ("seqs", "told"),
    [
        ((1,), "run/1: event 1 is missing"),
        ((2, 3), "run/1: events 2 to 3 are missing"),
        ((), "run/1: all events are missing"),
    ],
)
def test_a_gap_in_a_run_is_named(seqs: tuple[int, ...], told: str) -> None:
    store = MemoryStateStore()
    store.append([Row("run/1", seq, "", *ev.encode(END)) for seq in range(1, 6)])
    assert len(read_run(store, 1)) == 5
    store.lose("run/1", *seqs)
    with pytest.raises(DataLossError, match=f"{told}.*restore a backup"):
        read_run(store, 1)
