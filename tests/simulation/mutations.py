"""The program, broken on purpose: each way must be found within some seeds."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from flplatform.algorithms.workflows import run as workflow
from flplatform.client.spool import Spool
from flplatform.client.task_loop import TaskLoop
from flplatform.core.messages import TRAIN
from flplatform.server import retention
from flplatform.server.relay import RequestRelay
from flplatform.server.run_actor import RunActor
from flplatform.server.runs import Runs
from flplatform.server.training import TrainingService
from tests.simulation import disk
from tests.simulation.server import LogStore
from tests.simulation.system import SimPath

Patch = tuple[Any, str, Any]


def _acknowledge_before_append() -> list[Patch]:
    real = LogStore.append

    def append(self: LogStore, rows: Sequence[Any]) -> "Future[None]":
        real(self, rows)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    return [(LogStore, "append", append)]


def _train_again_after_a_restart() -> list[Patch]:
    real = Spool.__init__

    def init(self: Spool, folder: Any) -> None:
        real(self, folder)
        for entry in self.entries():
            self.settle(entry.task_id, None)

    return [(Spool, "__init__", init)]


def _count_duplicates() -> list[Patch]:
    real = workflow.classify

    def classify(state: Any, task_id: Any, mark: Any) -> bool:
        real(state, task_id, mark)
        return True

    return [(workflow, "classify", classify)]


def _no_fsync(part: str) -> Callable[[], list[Patch]]:
    def patches() -> list[Patch]:
        return [(disk.Disks, "never_synced", part)]

    return patches


def _settle_before_the_answer() -> list[Patch]:
    real = TaskLoop._settle

    class Settled:
        """A spool whose entry is settled already; its file lies elsewhere."""

        def __init__(self, copy: SimPath) -> None:
            self._copy = copy

        def file(self, _task_id: Any) -> SimPath:
            return self._copy

        def settle(self, _task_id: Any, _state: Any) -> None:
            pass

    async def settle(self: Any, entry: Any, run: Any) -> None:
        spool = self._spool
        copy = SimPath(spool.file(entry.task_id).parent.parent.parent / "copy")
        if entry.blob is None or entry.task_id.kind != TRAIN or isinstance(spool, Settled):
            return await real(self, entry, run)
        copy.write_bytes(spool.file(entry.task_id).read_bytes())
        await asyncio.to_thread(spool.settle, entry.task_id, run.state if run else None)
        self._spool = Settled(copy)
        try:
            await real(self, entry, run)
        finally:
            self._spool = spool

    return [(TaskLoop, "_settle", settle)]


def _nothing_pending_after_a_restart() -> list[Patch]:
    def start(self: Any) -> None:
        self._loop_task = asyncio.create_task(self._loop())
        if len(self.events) == 1:
            self._perform()

    return [(RunActor, "start", start)]


def _free_the_last_round() -> list[Patch]:
    real = retention.freed_rounds

    def freed_rounds(events: Any) -> int | None:
        freed = real(events)
        return None if freed is None else freed + 2

    return [(retention, "freed_rounds", freed_rounds)]


def _forget_what_a_dead_site_received() -> list[Patch]:
    return [(RequestRelay, "reset", lambda *_: None)]


def _never_tell_of_ends() -> list[Patch]:
    return [(TrainingService, "get_task", _deaf(TrainingService.get_task))]


def _deaf(real: Any) -> Any:
    async def get_task(self: Any, site: str, held: Any, runs: Any) -> Any:
        tasks, ended = await real(self, site, held, ())
        return tasks, ended

    return get_task


def _leave_one_out() -> list[Patch]:
    """A closed round names its updates, and its model is made of fewer."""
    real = Runs.aggregate

    async def aggregate(self: Any, closed: Any) -> Any:
        some = closed.contributions[: max(1, len(closed.contributions) - 1)]
        return await real(self, closed.model_copy(update={"contributions": some}))

    return [(Runs, "aggregate", aggregate)]


MOST_SEEDS = 400
"""So many are enough to notice any of these."""

MUTATIONS: dict[str, Callable[[], list[Patch]]] = {
    "acknowledge before append": _acknowledge_before_append,
    "train again after a restart": _train_again_after_a_restart,
    "count duplicates": _count_duplicates,
    "no fsync of spooled results": _no_fsync("/spool/entries"),
    "no fsync of blobs": _no_fsync("/server/state/blobs"),
    "no fsync of accepted runs": _no_fsync("/state/runs"),
    "settle before the answer": _settle_before_the_answer,
    "nothing pending after a restart": _nothing_pending_after_a_restart,
    "free the last round": _free_the_last_round,
    "forget what a dead site received": _forget_what_a_dead_site_received,
    "tell no site that its run has ended": _never_tell_of_ends,
    "leave out an update": _leave_one_out,
}


def apply(name: str) -> None:
    """Break the program for the rest of this process's life."""
    for owner, key, value in MUTATIONS[name]():
        setattr(owner, key, value)
