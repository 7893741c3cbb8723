"""All runs: numbering, opening after a restart, finding and feeding them."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from flplatform.core import events as ev
from flplatform.core.errors import (
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest
from flplatform.core.ports import BlobStore, StateStore
from flplatform.files.modelfile import read_layout
from flplatform.security.denials import Denial
from flplatform.security.identity import Identity
from flplatform.security.package import Package
from flplatform.server.background import Background
from flplatform.server.client_manager import ClientManager
from flplatform.server.hands import RunHands
from flplatform.server.ledger import Ledger, RunSummary
from flplatform.server.past_runs import PastRuns
from flplatform.server.relay import RequestRelay
from flplatform.server.resuming import Resuming
from flplatform.server.retention import (
    Retention,
    kept_blobs,
    old_updates,
    old_wires,
    source_models,
)
from flplatform.server.run_actor import RunActor
from flplatform.server.run_logs import RunLogs
from flplatform.server.shelf import Shelf
from flplatform.server.site_tasks import SiteTasks
from flplatform.server.submission import opened_by
from flplatform.server.uploads import Uploads
from flplatform.server.wording import describe, moment

log = logging.getLogger(__name__)


class Runs:
    """Opens, finds and feeds the runs.

    Args:
        store: where the event logs are.
        blobs: where models and packages are.
        clients: who is there.
        relay: carries the signed start to the sites.
        workers: threads for aggregation.
        notify: called with the sites whose open tasks have changed.

    Attributes:
        retention: frees blobs that nothing needs.
        uploads: what sites have uploaded for their open tasks.
        tasks: which tasks are open, and what becomes of their results.
        background: carries through what must not be left half done.
        hands: what all runs share to carry out what is decided.
        lacking: what tells that the log has lost events, besides what it tells by itself.
    """

    def __init__(
        self,
        store: StateStore,
        blobs: BlobStore,
        clients: ClientManager,
        relay: RequestRelay,
        workers: Executor,
        notify: Callable[[set[str]], None],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._clients = clients
        self._notify = notify
        self._actors: dict[int, RunActor] = {}
        self._ledger = Ledger(store, clients.disabled, clients.denials)
        self._logs = RunLogs(store, blobs, self._ledger)
        self.retention = Retention(
            blobs,
            lambda: {run: actor.events for run, actor in self._actors.items()},
            self._ended_runs,
            self._logs.events,
            lambda: self._ledger.shelf.blobs(),
        )
        self.background = Background()
        self.hands = RunHands(
            blobs,
            self.retention,
            self.background,
            clients,
            relay,
            workers,
            notify,
            self._appended,
        )
        self.uploads = Uploads(blobs, self.retention, self._actors, self.background)
        self._closed = False
        self.lacking: list[str] = []
        self._past = PastRuns(self._load, self._logs.state)
        self._resuming = Resuming(self._ledger, self._load, self._take_up, self.background)
        self.tasks = SiteTasks(self._actors, self._past, clients, self.summary)
        self.last_event = ""
        self.changed: Callable[[], None] = lambda: None
        """Called after every durable event."""

    @property
    def trouble(self) -> str:
        """Why nothing can be decided now, "" if it can; see `ports.StateStore`."""
        return self._store.trouble

    @property
    def loss(self) -> str:
        """Why the log must have lost events, "" if nothing tells so."""
        signs = [*self.lacking, *self._ledger.lacking]
        more = f" and {len(signs) - 3} more" if len(signs) > 3 else ""
        return f"the event log has lost events: {'; '.join(signs[:3])}{more}" if signs else ""

    # ---- life ----

    def open(self) -> None:
        """Read the federation's log and go on with every run that has not ended.

        Raises:
            FLError: the log cannot be read by this release.
        """
        self._ledger.read()
        self._resuming.begin()
        if any(summary.deleted for summary in self._ledger.summaries()):
            self.background.later(self._free_deleted())

    def _take_up(self, actor: RunActor) -> None:
        """Go on with a run of before."""
        if actor.state.ended:
            self._note(actor)
            self.background.later(self._summarise(actor))
            return
        self._clients.presume(actor.state.deployed)
        self.retention.forget(actor.run)
        self._start(actor)
        for task_id in (task.id for mine in actor.tasks.values() for task in mine.values()):
            self.retention.begin(task_id)  # the process before may have got so far
        # Who is presumed to be there makes no change when he comes: decide now.
        actor.reconsider()
        log.info("run %d goes on: %s, round %d", actor.run, actor.state.status, actor.state.round)

    async def close(self) -> None:
        """Stop all deciders; what they decided is in the log."""
        self._closed = True
        await self.background.close()
        await asyncio.gather(*(actor.stop() for actor in self._actors.values()))

    def _load(self, run: int) -> RunActor:
        return RunActor(*self._logs.begun(run), self._store, self.hands)

    def _start(self, actor: RunActor) -> None:
        self._actors[actor.run] = actor
        self._note(actor)
        actor.start()

    async def submit(
        self,
        package: Package,
        submitter: Identity,
        *,
        order: bytes,
        submission_id: str,
        blob: ModelRef,
        sites: tuple[str, ...],
        min_clients: int | None,
    ) -> int:
        """Number and open a run; the same submission again returns the same number.

        Raises:
            FLError: the job cannot run here, and why.
        """
        for who in (submitter, package.author):
            self._clients.denials.demand(who)
        if (run := self.submitted(submission_id, blob.digest)) is not None:
            return run
        model = self._blobs.path(package.model.digest)
        manifest = read_layout(model).manifest
        opened = opened_by(
            package,
            submitter,
            order=order,
            submission_id=submission_id,
            blob=blob,
            sites=sites,
            min_clients=min_clients,
            manifest=manifest,
            model_bytes=model.stat().st_size,
        )

        async def work() -> int:
            with self.retention.hold(blob.digest, package.model.digest):
                async with self.hands.encode(package.model, package.job.codec_down) as wire:
                    named = ev.Blob(digest=wire.digest, size=wire.size) if wire else None
                    return await self._open_run(opened.model_copy(update={"wire": named}), manifest)

        return await self.background.through(work())

    async def open_chosen(self, choose: Callable[[], ev.RunOpened]) -> int:
        """Number and open a run whose first event `choose` decides; what that names is kept.

        Raises:
            FLError: of `choose`, or nothing can be stored.
        """

        async def work() -> int:
            opened = choose()  # nothing is awaited until its blobs are held
            with self.retention.hold(*source_models(opened)):
                return await self._open_run(opened, self._logs.manifest(opened.initial_model))

        return await self.background.through(work())

    def submitted(self, submission_id: str, job_digest: str) -> int | None:
        """Return the number of the run that a submission has become, if it has.

        Raises:
            AlreadyExistsError: the id stands for another job.
        """
        return self._ledger.submitted(submission_id, job_digest)

    async def _open_run(self, opened: ev.RunOpened, manifest: Manifest) -> int:
        named = (opened.job_blob, opened.initial_model, opened.wire)
        with self.retention.hold(*(blob.digest for blob in named if blob)):
            run, first = await self._ledger.number(opened)
            if first is not None:
                self._start(RunActor([first], manifest, self._store, self.hands))
                log.info("run %d opened: %s by %s", run, opened.job.name, opened.submitter)
            return run

    async def step(self, decide: Callable[[], ev.Event | None]) -> None:
        """Append a step towards a run or of its end, see `Ledger.step`; free what it leaves.

        Raises:
            FLError: refused by `decide`, or nothing can be stored.
        """
        before = self.shelf.blobs()
        await self.background.through(self._ledger.step(decide))
        if over := before - self.shelf.blobs():
            self.background.later(self.retention.free(over))

    @property
    def shelf(self) -> Shelf:
        """Staged jobs and prepared runs."""
        return self._ledger.shelf

    def _ended_runs(self) -> list[int]:
        active = self._actors.keys() | self.shelf.prepared.keys()
        return [
            *self._ledger.strays,
            *(
                summary.run
                for summary in self._ledger.summaries()
                if summary.run not in active and not summary.deleted
            ),
        ]

    # ---- finding and feeding ----

    def summaries(self) -> list[RunSummary]:
        """Return all runs, oldest first."""
        return self._ledger.summaries()

    @property
    def last(self) -> int:
        """The highest number that was ever given; 0 for none."""
        return self._ledger.last

    def summary(self, run: int) -> RunSummary:
        """Return what a list shows of a run that has begun.

        Raises:
            NotFoundError: there is no such run, or it was deleted.
            FailedPreconditionError: it has not begun.
            UnavailableError: this release cannot read its log.
        """
        if run in self._ledger and (found := self._ledger[run]).deleted:
            raise NotFoundError(
                f"run {run} was deleted by {found.deleted_by} on {moment(found.deleted)}",
                rule="run_deleted",
            )
        self._ledger.shelf.demand_begun(run)
        if run in self._resuming.unreadable:
            raise UnavailableError(f"run {run} stays as it is: {self._resuming.unreadable[run]}")
        if run not in self._ledger:
            raise NotFoundError(f"there is no run {run}", hint="list_runs shows the runs")
        return self._ledger[run]

    def active(self) -> list[RunActor]:
        """Return the runs that have not ended, oldest first."""
        return [self._actors[run] for run in sorted(self._actors)]

    def actor(self, run: int) -> RunActor:
        """Return a run at work.

        Raises:
            NotFoundError: there is no such run.
            FailedPreconditionError: it has ended.
            UnavailableError: this release cannot go on with it.
        """
        if run in self._actors:
            return self._actors[run]
        summary = self.summary(run)
        raise FailedPreconditionError(
            f"run {run} has {summary.status}: {summary.reason}", rule="run_ended"
        )

    def view(self, run: int) -> RunActor:
        """Return a run for reading, ended or not.

        Raises:
            NotFoundError: there is no such run.
            FLError: its log cannot be read.
        """
        if run in self._actors:
            return self._actors[run]
        self.summary(run)  # or there is nothing to read
        return self._past.whole.get(run)

    async def read(self, run: int) -> RunActor:
        """Return a run as `view` does, but wait for the disk beside the event loop.

        Raises:
            FLError: as `view`.
        """
        if run in self._actors:
            return self._actors[run]
        self.summary(run)
        return await self._past.whole.read(run)

    def ended(self, run: int, site: str = "") -> str:
        """Return how a run ended; empty while it is not over; `unknown` if it never was.

        For a site that has no part in a run at work, although it was a target once, it is over.
        """
        state = self._actors[run].state if run in self._actors else None
        if state and site in state.targets and site not in state.taking_part:
            return "withdrawn" if site in state.withdrawn else "declined"
        waiting = self._resuming.unreadable.keys() | self._ledger.shelf.prepared.keys()
        if run in self._actors or run in waiting:
            return ""
        return self._ledger[run].status if run in self._ledger else "unknown"

    def takes_part(self, site: str, run: int) -> bool:
        """Return whether a site has a part in a run at work."""
        return run in self._actors and site in self._actors[run].state.taking_part

    async def set_enabled(self, site: str, enabled: bool, by: str) -> None:
        """Let a site take part, or bar it; remembered over restarts.

        Raises:
            ResourceExhaustedError: nothing can be stored.
        """
        await self.background.through(self._set_enabled(site, enabled, by))

    async def deny(self, word: Denial) -> None:
        """Deny a name, or undo that; remembered over restarts.

        Raises:
            ResourceExhaustedError: nothing can be stored.
        """
        await self.background.through(self._ledger.deny(word))

    def site_changed(self, site: str) -> None:
        """Have runs and the site's waiting calls reconsider what it may do."""
        self.roster_changed([site])
        self._notify({site})

    async def _set_enabled(self, site: str, enabled: bool, by: str) -> None:
        await self._ledger.set_enabled(site, enabled, by)
        self.roster_changed([site])
        self._notify({site})

    def roster_changed(self, _sites: Sequence[str]) -> None:
        """Have every run reconsider: a site came or went."""
        if self._closed:
            return
        for actor in self.active():
            actor.reconsider()

    # ---- what is over ----

    async def blobs_of(self, run: int) -> frozenset[str]:
        """Return all that a run needs, or needed when it was deleted.

        Raises:
            FLError: its log cannot be read.
        """
        return kept_blobs(await asyncio.to_thread(self._logs.events, run), None)

    async def _free_deleted(self) -> None:
        """Free what a process that ended early has left of deleted runs."""
        left: set[str] = set()
        for summary in self._ledger.summaries():
            if summary.deleted:
                left |= await self.blobs_of(summary.run)
        await self.retention.free(left)

    # ---- what has become durable ----

    def _appended(self, actor: RunActor, events: Sequence[ev.Event]) -> None:
        """Keep summaries and blobs in line with what has just become durable."""
        self._note(actor)
        for event in events:
            self.last_event = f"run {actor.run}: {describe(event)}"
            log.info("run %d: %s", actor.run, describe(event))
        ended = actor.state.ended is not None and self._actors.pop(actor.run, None) is not None
        left = {event.site for event in events if isinstance(event, ev.SiteWithdrawn)}
        if ended or left:
            self._notify(set(actor.state.targets) if ended else left)
        if ended:
            self.background.later(self._retire(actor))
        over = self.uploads.settle(actor.run)
        over -= {
            event.digest
            for event in events
            if isinstance(event, ev.UpdateAccepted | ev.ResultAccepted)
        }
        if ended or any(isinstance(event, ev.ModelPublished) for event in events):
            over |= old_updates(actor.events) | old_wires(actor.events)
        if ended:
            over |= source_models(actor.state.opened)
        if over:
            self.background.later(self.retention.free(over))
        self.changed()

    def _note(self, actor: RunActor) -> None:
        state = actor.state
        self._ledger.note(
            actor.run,
            status=state.status,
            round=state.round,
            rounds=state.job.rounds,
            reason=state.ended.reason if state.ended else "",
        )
        if state.ended:
            self._past.note_targets(state)

    async def _retire(self, actor: RunActor) -> None:
        await self._summarise(actor)
        await actor.stop()

    async def _summarise(self, actor: RunActor) -> None:
        state = actor.state
        assert state.ended is not None
        self._ledger.note(actor.run, ended=actor.times[-1])
        await self._ledger.summarise(actor.run, state.ended, state.round, state.job.rounds)
