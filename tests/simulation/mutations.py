"""The program, broken on purpose: each way must be found within some seeds."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from flplatform.algorithms.workflows import cross_site_validation
from flplatform.algorithms.workflows import run as workflow
from flplatform.client.answering import Answers
from flplatform.client.spool import Spool
from flplatform.client.task_loop import TaskLoop
from flplatform.core.messages import TRAIN
from flplatform.core.workflow import Deploy
from flplatform.server import hands, retention, run_actor, validation, wire
from flplatform.server.client_manager import ClientManager
from flplatform.server.hands import RunHands
from flplatform.server.ledger import Ledger
from flplatform.server.relay import RequestRelay
from flplatform.server.run_actor import RunActor
from flplatform.server.runs import Runs
from flplatform.server.shelf import Shelf
from flplatform.server.training import TrainingService
from tests.simulation import disk, programs
from tests.simulation.history import play
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
    real = Answers._settle

    class Settled:
        """A spool of which one entry is settled already; its file lies elsewhere."""

        def __init__(self, spool: Any, task_id: Any, copy: SimPath) -> None:
            self._spool = spool
            self._task_id = task_id
            self._copy = copy

        def __getattr__(self, name: str) -> Any:
            return getattr(self._spool, name)

        def file(self, task_id: Any) -> Any:
            return self._copy if task_id == self._task_id else self._spool.file(task_id)

        def settle(self, task_id: Any, state: Any) -> None:
            if task_id != self._task_id:
                self._spool.settle(task_id, state)

    async def settle(self: Any, entry: Any, run: Any) -> None:
        spool = self._spool
        copy = SimPath(spool.file(entry.task_id).parent.parent.parent / f"copy-{entry.task_id.run}")
        if entry.blob is None or entry.task_id.kind != TRAIN or isinstance(spool, Settled):
            return await real(self, entry, run)
        copy.write_bytes(spool.file(entry.task_id).read_bytes())
        await asyncio.to_thread(spool.settle, entry.task_id, run.state if run else None)
        self._spool = Settled(spool, entry.task_id, copy)
        try:
            await real(self, entry, run)
        finally:
            self._spool = spool

    return [(Answers, "_settle", settle)]


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
    real = RunHands._aggregate

    def aggregate(self: Any, closed: Any) -> Any:
        some = closed.contributions[: max(1, len(closed.contributions) - 1)]
        return real(self, closed.model_copy(update={"contributions": some}))

    return [(RunHands, "_aggregate", aggregate)]


def _forget_the_optimiser() -> list[Patch]:
    real = RunHands._aggregate

    def aggregate(self: Any, closed: Any) -> Any:
        return real(self, closed.model_copy(update={"optimizer_state": None}))

    return [(RunHands, "_aggregate", aggregate)]


def _encode_another_model() -> list[Patch]:
    """What sites download instead of a model is that of the model before."""
    real = vars(hands)["make_wire"]
    before: dict[Any, Any] = {}

    def make_wire(blobs: Any, model: Any, codec: str) -> Any:
        found = real(blobs, before.get(blobs, model), codec)
        before[blobs] = model
        return found

    return [(hands, "make_wire", make_wire)]


def _free_what_sites_download() -> list[Patch]:
    real = retention.kept_blobs

    def kept_blobs(events: Any, freed_rounds: int | None) -> frozenset[str]:
        return real(events, freed_rounds) - retention.old_wires(events)

    return [(retention, "kept_blobs", kept_blobs)]


def _undo_without_the_base() -> list[Patch]:
    """A codec is undone as if the site had had the exact model."""
    real = vars(wire)["decode"]

    def decode(codec: Any, manifest: Any, arrays: Any, base: Any, out: Any, _: Any = "") -> None:
        real(codec, manifest, arrays, base, out)

    return [(wire, "decode", decode)]


def _drop_what_a_disabled_site_has_trained() -> list[Patch]:
    async def persist(self: Any, what: str, step: Any, troubles: Any) -> Any:
        return await self._session.persist(what, lambda: troubles.watch(step))

    return [(Answers, "persist", persist)]


def _tell_nobody_of_withdrawals() -> list[Patch]:
    real = Runs.ended

    def ended(self: Runs, run: int, _site: str = "") -> str:
        return real(self, run)

    return [(Runs, "ended", ended)]


def _keep_what_a_run_has_spooled() -> list[Patch]:
    return [(Spool, "drop_run", lambda *_: None)]


def _ask_nobody_anew() -> list[Patch]:
    """Who joins late, or again, is in the log and never asked."""
    real = vars(run_actor)["pending"]

    def pending(state: Any) -> Any:
        return [item for item in real(state) if not _is_late(state, item)]

    return [(run_actor, "pending", pending)]


def _is_late(state: Any, item: Any) -> bool:
    return isinstance(item, Deploy) and item.site in state.added


def _free_what_is_validated() -> list[Patch]:
    return [(retention, "source_models", lambda _opened: frozenset())]


def _validate_other_models() -> list[Patch]:
    real = vars(cross_site_validation)["_source_models"]

    def source_models(state: Any) -> Any:
        found = real(state)
        return dict(zip(found, [*found.values()][::-1], strict=True))

    return [(cross_site_validation, "_source_models", source_models)]


def _measure_what_is_at_hand() -> list[Patch]:
    """A site measures the model that it has measured before."""
    real = TaskLoop._fetch_model
    before: dict[Any, Any] = {}

    async def fetch(self: Any, task: Any, run: Any) -> Any:
        found = await real(self, task, run)
        return before.setdefault((self, task.id.run), found) if task.id.owner else found

    return [(TaskLoop, "_fetch_model", fetch)]


def _say_nothing_of_who_came_late() -> list[Patch]:
    real = vars(validation)["_absences"]

    def absences(state: Any) -> Any:
        return [(site, why) for site, why in real(state) if site in state.awaited or "decl" in why]

    return [(validation, "_absences", absences)]


def _free_what_lies_ready() -> list[Patch]:
    return [(Shelf, "blobs", lambda _self: set())]


def _give_a_prepared_run_another_number() -> list[Patch]:
    return [(Shelf, "of_submission", lambda *_: None)]


def _forget_prepared_runs() -> list[Patch]:
    """After a restart nothing is deployed for a number that was taken."""
    real = Ledger.read

    def read(self: Ledger) -> None:
        real(self)
        self.shelf.prepared.clear()

    return [(Ledger, "read", read)]


def _take_a_standstill_for_silence() -> list[Patch]:
    return [(ClientManager, "stood_still_s", lambda _self: 0.0)]


MOST_SEEDS = 400
"""So many are enough to notice any of these."""

MUTATIONS: dict[str, Callable[[], list[Patch]]] = {
    "acknowledge before append": _acknowledge_before_append,
    "train again after a restart": _train_again_after_a_restart,
    "count duplicates": _count_duplicates,
    "no fsync of blobs": _no_fsync("/server/state/blobs"),
    "no fsync of accepted runs": _no_fsync("/state/runs"),
    "settle before the answer": _settle_before_the_answer,
    "nothing pending after a restart": _nothing_pending_after_a_restart,
    "free the last round": _free_the_last_round,
    "forget what a dead site received": _forget_what_a_dead_site_received,
    "tell no site that its run has ended": _never_tell_of_ends,
    "leave out an update": _leave_one_out,
    "forget the optimiser's state": _forget_the_optimiser,
    "encode another model": _encode_another_model,
    "free what sites download": _free_what_sites_download,
    "undo a codec against another base": _undo_without_the_base,
    "drop what a disabled site has trained": _drop_what_a_disabled_site_has_trained,
    "tell no site that it was withdrawn": _tell_nobody_of_withdrawals,
    "keep what an ended run has spooled": _keep_what_a_run_has_spooled,
    "ask no site anew": _ask_nobody_anew,
    "free what is validated": _free_what_is_validated,
    "validate other models": _validate_other_models,
    "measure the model at hand": _measure_what_is_at_hand,
    "say nothing of who came late": _say_nothing_of_who_came_late,
    "free what lies ready": _free_what_lies_ready,
    "give a prepared run another number": _give_a_prepared_run_another_number,
    "forget prepared runs": _forget_prepared_runs,
    "take a standstill for silence": _take_a_standstill_for_silence,
}


FIRST_SEEDS = {
    "train again after a restart": 1060,
    "count duplicates": 170,
    "no fsync of accepted runs": 20,
    "settle before the answer": 215,
    "forget what a dead site received": 90,
    "undo a codec against another base": 45,
    "drop what a disabled site has trained": 3300,
    "tell no site that it was withdrawn": 1594,
    "ask no site anew": 545,
    "free what is validated": 220,
    "take a standstill for silence": 100,
}
"""Where to begin to look, if not at 0: known to be noticed soon after."""


def apply(name: str) -> Callable[[], None]:
    """Break the program; what comes back repairs it."""
    patches = [(owner, key, vars(owner)[key], value) for owner, key, value in MUTATIONS[name]()]
    for owner, key, _, value in patches:
        setattr(owner, key, value)

    def repair() -> None:
        for owner, key, before, _ in patches:
            setattr(owner, key, before)

    return repair


def noticed(name: str) -> str:
    """Break the program, and return what is seen of that; empty if nothing is."""
    programs.install()
    repair = apply(name)
    first = FIRST_SEEDS.get(name, 0)
    try:
        for seed in range(first, first + MOST_SEEDS):
            if violations := play(seed).violations:
                return f"seed {seed}: {violations[0]}"
        return ""
    finally:
        repair()
