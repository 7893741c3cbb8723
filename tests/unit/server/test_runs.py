import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef, TaskId
from flplatform.core.ports import Row
from flplatform.core.workflow import Abort
from flplatform.server import ledger, past_runs, resuming
from flplatform.server.resuming import UNREADABLE
from tests.support.stores import MemoryStateStore
from tests.support.workflows import job
from tests.unit.server.scene import Scene, identity, play, refused, settle, until


class SlowStore(MemoryStateStore):
    """Settles appends of the federation's stream only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = False
        self.waiting: list[tuple[Sequence[Row], Future[None]]] = []

    def append(self, rows: Sequence[Row]) -> "Future[None]":
        if not self.slow or rows[0].stream != ev.FEDERATION:
            return super().append(rows)
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self.waiting.append((rows, future))
        return future

    def let_go(self) -> None:
        rows, future = self.waiting.pop(0)
        super().append(rows)
        future.set_result(None)


async def whole_run(scene: Scene, *sites: str, run: int = 1) -> None:
    """Let every site do its tasks until the run has ended."""
    while not scene.runs.ended(run):
        for site in sites:
            for task in scene.runs.tasks.of(site):
                if task.id.run == run:
                    await scene.training.submit_result(site, scene.result(task))
        await asyncio.sleep(0)


# ---- submission ---------------------------------------------------------------------------------


def test_runs_are_numbered_from_one(scene: Scene) -> None:
    async def it() -> None:
        assert [await scene.submit() for _ in range(3)] == [1, 2, 3]
        assert [summary.run for summary in scene.runs.summaries()] == [1, 2, 3]
        assert [actor.run for actor in scene.runs.active()] == [1, 2, 3]
        (first, *_) = scene.store.read(ev.FEDERATION)
        event = ev.decode(first.type, first.version, first.body, "")
        assert isinstance(event, ev.RunNumbered)
        assert event.job_name == "test"
        opened = scene.actor(1).state.opened
        assert (opened.submitter, opened.submitter_organisation) == ("lead", "hub")
        assert opened.sites == ("a", "b")
        await scene.close()

    play(it())


def test_a_submission_is_one_run_however_often_it_comes(scene: Scene) -> None:
    async def it() -> None:
        one = "1" * 32
        numbers = await asyncio.gather(*(scene.submit(submission=one) for _ in range(5)))
        assert set(numbers) == {1}
        assert await scene.submit(submission="2" * 32) == 2
        await scene.restart()
        assert await scene.submit(submission=one) == 1
        await scene.actor(1).tell(Abort("x"))
        await scene.ended(1)
        assert await scene.submit(submission=one) == 1
        assert len(scene.store.streams("run/")) == 2
        await scene.close()

    play(it())


def test_the_id_of_a_submission_stands_for_one_job(scene: Scene) -> None:
    async def it() -> None:
        await scene.submit(submission="1" * 32)
        package = scene.package(job(), scene.model())
        other = scene.blobs.create(lambda path: path.write_bytes(b"another package") and None)
        asked = scene.runs.submit(
            package,
            identity("lead"),
            order=b"",
            submission_id="1" * 32,
            blob=other,
            sites=("a", "b"),
            min_clients=None,
        )
        assert type(await refused(asked)) is AlreadyExistsError
        await scene.close()

    play(it())


@pytest.mark.parametrize("min_clients", [0, -1, 3])
def test_a_quorum_must_be_possible(scene: Scene, min_clients: int) -> None:
    async def it() -> None:
        asked = scene.runs.submit(
            scene.package(job(), scene.model()),
            identity("lead"),
            order=b"",
            submission_id="1" * 32,
            blob=scene.model(9.0),
            sites=("a", "b"),
            min_clients=min_clients,
        )
        error = await refused(asked)
        assert (type(error), error.field) == (InvalidArgumentError, "min_clients")
        assert scene.store.streams() == []

    play(it())


def test_what_cannot_work_is_refused_at_once(scene: Scene) -> None:
    async def it() -> None:
        refusals: list[tuple[dict[str, Any], type[Exception]]] = [
            ({"sites": ()}, InvalidArgumentError),
            ({"sites": ("a", "A")}, InvalidArgumentError),
            ({"sites": ("a", "a")}, InvalidArgumentError),
            ({"aggregator": {"name": "mode"}}, NotFoundError),
            ({"aggregator": {"name": "weighted_mean", "args": {"x": 1}}}, InvalidArgumentError),
        ]
        for fields, error in refusals:
            assert type(await refused(scene.submit(**{"min_clients": 1} | fields))) is error
        model = scene.model()
        for odd, error in (
            (replace(model, size=model.size + 1), InvalidArgumentError),
            (ModelRef("blake3:" + "0" * 64, 5), NotFoundError),
        ):
            asked = scene.runs.submit(
                scene.package(job(min_clients=1), odd),
                identity("lead"),
                order=b"",
                submission_id="1" * 32,
                blob=model,
                sites=("a",),
                min_clients=None,
            )
            assert type(await refused(asked)) is error
        assert scene.runs.summaries() == []
        assert scene.store.streams() == []

    play(it())


def test_without_space_there_is_no_run(scene: Scene) -> None:
    async def it() -> None:
        scene.store.full = True
        assert type(await refused(scene.submit())) is ResourceExhaustedError
        assert scene.runs.summaries() == []
        scene.store.full = False
        assert await scene.submit() == 1
        await scene.close()

    play(it())


def test_a_submitter_who_leaves_stops_nothing(scene: Scene) -> None:
    """What is in the log must be known here, or no later event finds its number."""

    async def it() -> None:
        scene.store = SlowStore()
        scene.boot()
        scene.store.slow = True
        submitting = asyncio.create_task(scene.submit())
        await until(lambda: scene.store.waiting)
        enabling = asyncio.create_task(scene.runs.set_enabled("b", False, "x"))
        await settle()
        submitting.cancel()
        enabling.cancel()
        await settle()
        scene.store.let_go()
        await until(lambda: scene.runs.active())
        await until(lambda: scene.store.waiting)
        scene.store.let_go()
        scene.store.slow = False
        await until(lambda: "b" in scene.clients.disabled)
        assert await scene.submit(sites=("a",), min_clients=1) == 2
        assert [row.seq for row in scene.store.read(ev.FEDERATION)] == [1, 2, 3]
        await scene.close()

    play(it())


# ---- life ---------------------------------------------------------------------------------------


def test_a_run_from_start_to_end(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        changes: list[None] = []
        scene.runs.changed = lambda: changes.append(None)
        await scene.submit(rounds=2, workflow=["scatter_gather", "cross_site_validation"])
        await whole_run(scene, "a", "b")
        await scene.ended()
        (summary,) = scene.runs.summaries()
        assert (summary.status, summary.round, summary.rounds) == ("finished", 2, 2)
        assert scene.runs.last_event == "run 1: finished: all steps done"
        assert changes
        assert scene.runs.active() == []
        assert scene.runs.view(1).state.ended
        assert scene.runs.view(1) is scene.runs.view(1)
        error = None
        try:
            scene.runs.actor(1)
        except FailedPreconditionError as caught:
            error = caught
        assert error is not None
        assert error.rule == "run_ended"
        await until(lambda: scene.store.read(ev.FEDERATION)[-1].type == "RunSummarised")
        await scene.close()

    play(it())


def test_unknown_runs(scene: Scene) -> None:
    async def it() -> None:
        for look in (scene.runs.actor, scene.runs.view):
            with pytest.raises(NotFoundError):
                look(7)
        assert scene.runs.ended(7) == "unknown"
        await scene.close()

    play(it())


def test_a_restart_goes_on_with_what_has_not_ended(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        for _ in range(3):
            await scene.submit(rounds=2)
        await whole_run(scene, "a", "b", run=1)
        await scene.ended(1)
        await scene.actor(2).tell(Abort("me", "wrong data"))
        await scene.ended(2)
        await scene.do("a")
        before = scene.actor(3).state
        await scene.restart()
        assert [(s.run, s.status) for s in scene.runs.summaries()][:2] == [
            (1, "finished"),
            (2, "aborted"),
        ]
        assert scene.runs.summaries()[1].reason == "wrong data"
        assert [actor.run for actor in scene.runs.active()] == [3]
        assert scene.actor(3).state == before
        assert scene.clients.live() == {"a", "b"}, "its sites are expected"
        assert scene.runs.tasks.of("a") == []
        assert [str(task.id) for task in scene.runs.tasks.of("b")] == ["3/1/train/b"]
        scene.obeying("a", "b")
        await whole_run(scene, "a", "b", run=3)
        assert scene.runs.ended(3) == "finished"
        await scene.close()

    play(it())


@pytest.mark.parametrize("error", [UnavailableError("lost"), ResourceExhaustedError("no files")])
def test_a_run_whose_log_cannot_be_read_for_a_moment_goes_on_when_it_can(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: FLError
) -> None:
    monkeypatch.setattr(resuming, "RETRY_S", 0.001)

    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit(rounds=2)
        await scene.do("a")
        await scene.close()
        scene.boot()
        read, failing = scene.store.read, [error] * 3

        def unsteady(stream: str, after: int = 0) -> Any:
            if stream != ev.FEDERATION and failing:
                raise failing.pop()
            return read(stream, after)

        monkeypatch.setattr(scene.store, "read", unsteady)
        scene.runs.open()
        assert scene.runs.summaries()[0].status == "unreadable"
        assert scene.runs.ended(1) == "", "its sites keep it"
        await until(scene.runs.active)
        assert failing == []
        scene.obeying("a", "b")
        await scene.do("b")
        await whole_run(scene, "a", "b")
        await scene.ended()
        assert scene.runs.ended(1) == "finished"
        await scene.close()

    play(it())


def test_a_run_that_lacked_nothing_but_a_site_goes_on_after_a_restart(scene: Scene) -> None:
    """All sites of a run are presumed to be there then: none of them makes a change by coming."""

    async def it() -> None:
        scene.obeying("a")
        scene.live("b")
        await scene.submit(min_clients=2)
        await until(lambda: scene.events(1, ev.SiteAnswered))
        scene.clients.remove("a")
        scene.obeying("b")
        await until(lambda: len(scene.events(1, ev.SiteAnswered)) == 2)
        await settle()
        assert scene.actor().state.status == "deploying"
        await scene.restart()
        await until(lambda: scene.events(1, ev.RoundOpened))
        await scene.close()

    play(it())


def test_a_run_that_ended_just_before_the_crash_is_summarised_then(scene: Scene) -> None:
    async def it() -> None:
        store = SlowStore()
        scene.store = store
        scene.boot()
        await scene.submit()
        store.slow = True
        await scene.actor().tell(Abort("me"))
        await until(lambda: store.waiting)
        store.slow = False
        await scene.restart()
        assert scene.runs.active() == []
        assert scene.runs.ended(1) == "aborted"
        await until(lambda: scene.store.read(ev.FEDERATION)[-1].type == "RunSummarised")
        await scene.restart()
        await settle()
        types = [row.type for row in scene.store.read(ev.FEDERATION)]
        assert types.count("RunSummarised") == 1
        await scene.close()

    play(it())


def test_an_end_that_cannot_be_summarised_for_want_of_space_is_later(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "RETRY_S", 0.001)

    async def it() -> None:
        await scene.submit()
        append = scene.store.append

        def full(rows: Sequence[Row]) -> "Future[None]":
            scene.store.full = rows[0].type == "RunSummarised"
            return append(rows)

        scene.store.append = full
        await scene.actor().tell(Abort("me"))
        await asyncio.sleep(0.01)
        assert [row.type for row in scene.store.read(ev.FEDERATION)] == ["RunNumbered"]
        assert scene.runs.summaries()[0].ended
        scene.store.append = append
        scene.store.full = False
        await until(lambda: len(scene.store.read(ev.FEDERATION)) == 2)
        await scene.close()

    play(it())


def test_a_run_of_a_newer_release_stays_as_it_is(scene: Scene) -> None:
    """The others go on, and its sites are not told that it is over."""

    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit()
        await scene.submit()
        await until(lambda: len(scene.events(1)) > 2)
        rows = scene.store.read("run/1")
        scene.store.append([replace(rows[-1], seq=len(rows) + 1, type="Telepathy", version=3)])
        await scene.restart()
        assert [actor.run for actor in scene.runs.active()] == [2]
        summary = scene.runs.summaries()[0]
        assert summary.status == UNREADABLE
        assert "newer release" in summary.reason
        assert scene.runs.ended(1) == ""
        for look in (scene.runs.actor, scene.runs.view):
            with pytest.raises(UnavailableError, match="Telepathy"):
                look(1)
        assert await scene.submit() == 3
        await scene.close()

    play(it())


@pytest.mark.parametrize("seq", [1, 2])
def test_a_run_that_lacks_an_event_stays_as_it_is(scene: Scene, seq: int) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit()
        await scene.submit()
        await until(lambda: len(scene.events(1)) > 3)
        scene.store.lose("run/1", seq)
        await scene.restart()
        assert [actor.run for actor in scene.runs.active()] == [2]
        summary = scene.runs.summaries()[0]
        assert (summary.status, f"event {seq} is missing" in summary.reason) == (UNREADABLE, True)
        assert scene.runs.loss.startswith("the event log has lost events: run/1 has ")
        await scene.close()

    play(it())


def test_a_job_is_taken_after_the_numbers_of_runs_were_lost(scene: Scene) -> None:
    async def it() -> None:
        await scene.submit()
        scene.store.lose(ev.FEDERATION)
        await scene.restart()
        assert await scene.submit() == 2
        assert [summary.run for summary in scene.runs.summaries()] == [2]
        await scene.close()

    play(it())


def test_nothing_is_freed_while_an_ended_run_lacks_its_end(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    async def it() -> None:
        await scene.submit()
        await scene.actor(1).tell(Abort("x"))
        await scene.ended(1)
        await until(lambda: len(scene.store.read(ev.FEDERATION)) == 2)
        scene.store.lose("run/1", scene.store.read("run/1")[-1].seq)
        await scene.restart()
        unused = scene.model(5.0).digest
        await scene.runs.retention.free([unused])
        assert scene.blobs.has(unused)
        assert "run/1: its last events are missing" in caplog.text
        await scene.close()

    play(it())


def test_a_run_whose_model_is_lost_does_not_keep_the_server_from_starting(scene: Scene) -> None:
    async def it() -> None:
        await scene.submit()
        scene.blobs.delete(scene.actor().state.opened.initial_model.digest)
        await scene.restart()
        assert scene.runs.summaries()[0].status == UNREADABLE
        await scene.close()

    play(it())


def test_few_ended_runs_are_kept_in_memory(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past_runs, "RECENT_RUNS", 2)
    scene.boot()

    async def it() -> None:
        for number in range(1, 5):
            await scene.submit()
            await scene.actor(number).tell(Abort("x"))
            await scene.ended(number)
        for number in range(1, 5):
            assert scene.runs.view(number).state.status == "aborted"
        assert len(scene.runs._past.whole) == 2
        await scene.close()

    play(it())


# ---- sites --------------------------------------------------------------------------------------


def test_a_disabled_site_gets_nothing_and_gives_nothing(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b", "c")
        await scene.submit(sites=("a", "b", "c"), min_clients=1)
        task = await scene.offered("c")
        package = scene.actor().state.opened.job_blob.digest
        assert scene.runs.uploads.readable("c", package)
        scene.notified.clear()
        await scene.runs.set_enabled("c", False, "operator")
        assert {"c"} in scene.notified
        assert scene.runs.tasks.of("c") == []
        error = await refused(scene.training.submit_result("c", scene.result(task)))
        assert (type(error), error.rule) == (PermissionDeniedError, "disabled")
        await scene.restart()
        assert scene.runs.tasks.of("c") == []
        assert scene.clients.disabled == {"c"}
        await scene.runs.set_enabled("c", True, "operator")
        assert [str(item.id) for item in scene.runs.tasks.of("c")] == ["1/1/train/c"]
        await scene.restart()
        assert scene.clients.disabled == set()
        await scene.close()

    play(it())


def test_nobody_is_disabled_without_a_record(scene: Scene) -> None:
    async def it() -> None:
        scene.store.full = True
        assert type(await refused(scene.runs.set_enabled("a", False, "x"))) is (
            ResourceExhaustedError
        )
        assert scene.clients.disabled == set()

    play(it())


def test_runs_reconsider_when_a_site_goes(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b", "c")
        await scene.submit(sites=("a", "b", "c"), min_clients=2)
        await scene.do("a")
        await scene.do("b")
        assert not scene.events(kind=ev.RoundClosed)
        scene.clients.remove("c")
        await until(lambda: scene.events(kind=ev.RoundClosed))
        await scene.close()

    play(it())


def test_what_a_site_may_read(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit()
        opened = scene.actor().state.opened
        assert scene.runs.uploads.readable("a", opened.job_blob.digest)
        assert not scene.runs.uploads.readable("stranger", opened.job_blob.digest)
        task = await scene.offered("a")
        assert task.model is not None
        assert scene.runs.uploads.readable("a", task.model.digest)
        update = scene.update("1/1/train/b", 5.0)
        assert not scene.runs.uploads.readable("a", update.digest)
        await scene.do("a")
        assert not scene.runs.uploads.readable("a", task.model.digest), "it has done that task"
        assert scene.runs.takes_part("a", 1)
        assert not scene.runs.takes_part("stranger", 1)
        assert not scene.runs.takes_part("a", 2)
        await scene.actor().tell(Abort("x"))
        assert not scene.runs.uploads.readable("b", opened.job_blob.digest)
        assert not scene.runs.takes_part("a", 1)
        await scene.close()

    play(it())


def test_the_open_tasks_of_all_runs_come_in_order(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        for _ in range(2):
            await scene.submit()
        await until(lambda: len(scene.runs.tasks.of("a")) == 2)
        assert [str(task.id) for task in scene.runs.tasks.of("a")] == [
            "1/1/train/a",
            "2/1/train/a",
        ]
        await scene.close()

    play(it())


# ---- results after the end ----------------------------------------------------------------------


def test_a_result_whose_acknowledgement_was_lost_is_known_after_the_end(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit(rounds=1)
        task = await scene.offered("a")
        request = scene.result(task, 3.0)
        assert await scene.training.submit_result("a", request) == "accepted"
        await scene.do("b")
        await scene.ended()
        for _ in range(2):
            assert await scene.training.submit_result("a", request) == "duplicate"
            await scene.restart()
        other = scene.result(task, 4.0)
        assert type(await refused(scene.training.submit_result("a", other))) is AlreadyExistsError
        task_id = TaskId(1, 2, "train", "a")
        error = await refused(scene.runs.tasks.settled_by(task_id, "x"))
        assert type(error) is FailedPreconditionError
        await scene.close()

    play(it())


# ---- freeing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kept"), [("last 2", {4, 5}), ("none", set()), ("all", {1, 2, 3, 4, 5})]
)
def test_old_updates_are_freed(scene: Scene, keep: str, kept: set[int]) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit(rounds=5, keep_updates=keep)
        value = 0.0
        while not scene.runs.ended(1):
            for site in "ab":
                for task in scene.runs.tasks.of(site):
                    value += 1
                    await scene.training.submit_result(site, scene.result(task, value))
            await asyncio.sleep(0)
        events = scene.runs.view(1).events

        def left() -> set[int]:
            accepted = [event for event in events if isinstance(event, ev.UpdateAccepted)]
            return {event.round for event in accepted if scene.blobs.has(event.digest)}

        await until(lambda: left() == kept)
        await scene.close()
        assert left() == kept
        for event in events:
            if isinstance(event, ev.ModelPublished):
                assert scene.blobs.has(event.model.digest)

    play(it())


def test_an_update_that_another_run_waits_to_aggregate_is_never_freed(scene: Scene) -> None:
    """Two runs of one reproducible job: the same bytes, a few rounds apart."""

    async def it() -> None:
        scene.obeying("a", "b")
        for _ in range(2):
            await scene.submit(rounds=4)
        await until(lambda: len(scene.runs.tasks.of("a")) == 2)
        slow = [task for task in scene.runs.tasks.of("a") if task.id.run == 2][0]
        await scene.training.submit_result("a", scene.result(slow, 1.0))
        digest = scene.events(2, ev.UpdateAccepted)[0].digest
        while not scene.runs.ended(1):
            for site in "ab":
                for task in scene.runs.tasks.of(site):
                    if task.id.run == 1:
                        value = float(task.id.round)
                        await scene.training.submit_result(site, scene.result(task, value))
            await asyncio.sleep(0)
        await scene.ended(1)
        await settle()
        first = [event.digest for event in scene.events(1, ev.UpdateAccepted)]
        assert digest in first
        await asyncio.sleep(0.02)
        assert scene.blobs.has(digest)
        await whole_run(scene, "a", "b", run=2)
        assert scene.runs.ended(2) == "finished"
        await scene.close()

    play(it())


def test_uploads_that_came_too_late_are_freed(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b", "c")
        await scene.submit(sites=("a", "b", "c"), min_clients=2, rounds=2, wait_after_min_s=0.01)
        late = (await scene.offered("c")).id
        before = scene.update(late, 7.0)
        other = scene.update(late, 8.0)
        await until(lambda: not scene.blobs.has(before.digest))
        assert scene.blobs.has(other.digest), "one upload per task is kept"
        await scene.do("a")
        await scene.do("b")
        await until(lambda: scene.actor().state.round == 2)
        await until(lambda: not scene.blobs.has(other.digest))
        after = scene.update(late, 9.0)
        await until(lambda: not scene.blobs.has(after.digest))
        same = scene.events(kind=ev.UpdateAccepted)[0]
        assert scene.update(late, 1.0).digest == same.digest
        await asyncio.sleep(0.02)
        assert scene.blobs.has(same.digest), "it is somebody's update, too"
        await scene.close()

    play(it())


def test_an_upload_for_an_ended_run_is_freed(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit()
        task = await scene.offered("a")
        first = scene.update(task.id, 7.0)
        await scene.actor().tell(Abort("x"))
        await until(lambda: not scene.blobs.has(first.digest))
        late = scene.update(task.id, 8.0)
        await until(lambda: not scene.blobs.has(late.digest))
        await scene.close()

    play(it())


# ---- small things -------------------------------------------------------------------------------


def test_trouble_in_the_background_is_logged(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    async def it() -> None:
        async def broken() -> None:
            raise UnavailableError("the store is gone")

        with caplog.at_level(logging.ERROR):
            scene.runs.background.later(broken())
            await settle()
        assert "the store is gone" in caplog.text
        await scene.close()
        scene.runs.roster_changed(["a"])
        scene.runs.background.later(broken())
        assert scene.runs.background._tasks == set()

    play(it())
