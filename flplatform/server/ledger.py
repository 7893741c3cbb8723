"""The `federation` stream: the numbers of runs, how they ended, which sites are barred."""

import asyncio
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FLError,
    NotFoundError,
    ResourceExhaustedError,
)
from flplatform.core.ports import Row, StateStore
from flplatform.core.staging import PREPARED
from flplatform.security.denials import Denial, Denials, read_denial
from flplatform.server.run_actor import RETRY_S, utc_now
from flplatform.server.shelf import Shelf

log = logging.getLogger(__name__)

_RESTORE = "stop the server and restore a backup"
_BARRED = "restore a backup: what is missing may have disabled a site or revoked a name"
_RUN_STREAM = re.compile("run/([1-9][0-9]{0,17})")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a list of runs shows about one of them."""

    run: int
    name: str
    submitter: str
    submission_id: str
    submitted: str
    job_digest: str = ""
    status: str = "deploying"
    reason: str = ""
    ended: str = ""
    round: int = 0
    rounds: int = 0
    organisation: str = ""
    sites: tuple[str, ...] = ()
    deleted: str = ""
    deleted_by: str = ""
    source_run: int = 0


class Ledger:
    """Reads and appends the stream, one append at a time. Lives on the event loop.

    Its coroutines must not be cancelled: what is appended must be known here.

    Args:
        store: where the stream is.
        disabled: the names of barred sites, kept up to date.
        denials: the denied names, kept up to date.

    Attributes:
        shelf: staged jobs and prepared runs.
        lacking: what tells that the log had lost events when it was read; also of other streams.
        strays: runs with a stream, but without a number: it is lost, and not given again.
    """

    def __init__(
        self, store: StateStore, disabled: set[str], denials: Denials | None = None
    ) -> None:
        self._denials = Denials() if denials is None else denials
        self._store = store
        self._disabled = disabled
        self._turn = asyncio.Lock()
        self._seq = 0
        self._summaries: dict[int, RunSummary] = {}
        self._submissions: dict[str, int] = {}
        self.shelf = Shelf()
        self.lacking: list[str] = []
        self.strays: set[int] = set()

    def read(self) -> None:
        """Take in the stream, once.

        Raises:
            DataLossError: events are missing.
            FLError: this release cannot read it.
        """
        for row in _gapless(self._store.read(ev.FEDERATION), _BARRED):
            self._take_in(decode(row), row.time)
            self._seq = row.seq
        self._look_for_losses()

    def _take_in(self, event: ev.Event, time: str) -> None:
        self._note_step(event, time)
        match event:
            case ev.RunNumbered():
                self._enter(event, time)
            case ev.RunSummarised():
                self.note(
                    event.run,
                    status=event.status,
                    reason=event.reason,
                    round=event.round,
                    rounds=event.rounds,
                    ended=time,
                )
            case ev.SiteDisabled():
                self._disabled.add(event.site)
            case ev.SiteEnabled():
                self._disabled.discard(event.site)
            case ev.NameRevoked():
                self._denials.add(read_denial(event.order))

    def _look_for_losses(self) -> None:
        try:
            extents = self._store.extents()
        except FLError as error:
            self.lacking.append(f"its streams cannot be told: {error.message}")
            return
        for stream, (count, last) in extents.items():
            if count != last:
                self.lacking.append(f"{stream} has {count} of {last} events")
        begun = self._summaries.keys() - self.shelf.prepared.keys()
        found = {int(match[1]) for match in map(_RUN_STREAM.fullmatch, extents) if match}
        self.strays = found - begun
        self.lacking += [f"run {run} has events, but no number" for run in sorted(self.strays)]
        self.lacking += [f"run {run} has a number, but no event" for run in sorted(begun - found)]

    # ---- what is known ----

    def __contains__(self, run: int) -> bool:
        return run in self._summaries

    def __getitem__(self, run: int) -> RunSummary:
        return self._summaries[run]

    def runs(self) -> Iterable[int]:
        """Return the numbers of all runs, in order."""
        return list(self._summaries)

    def summaries(self) -> list[RunSummary]:
        """Return all runs, oldest first."""
        return list(self._summaries.values())

    @property
    def last(self) -> int:
        """The highest number that was ever given; 0 for none."""
        return max([*self._summaries, *self.strays], default=0)

    def note(self, run: int, **changes: Any) -> None:
        """Bring a run's summary up to date; it is not stored."""
        self._summaries[run] = replace(self._summaries[run], **changes)

    def submitted(self, submission_id: str, job_digest: str) -> int | None:
        """Return the number of the run that a submission has become, if it has.

        Raises:
            AlreadyExistsError: the id stands for another job.
        """
        run = self._submissions.get(submission_id)
        if run is not None and self._summaries[run].job_digest != job_digest:
            raise AlreadyExistsError(f"submission {submission_id} is another job, run {run}")
        return run

    # ---- what is appended ----

    async def number(self, opened: ev.RunOpened) -> tuple[int, Row | None]:
        """Give a submission its number and begin its run's stream, in one transaction.

        Args:
            opened: the run's first event, but for its number.

        Returns:
            The number, and the first row of the run's stream; None if there was one already.

        Raises:
            AlreadyExistsError: the submission's id stands for another job.
            ResourceExhaustedError: nothing can be stored.
        """
        async with self._turn:
            digest = opened.job_blob.digest
            if (known := self.submitted(opened.submission_id, digest)) is not None:
                return known, None
            if opened.source_run and self._summaries[opened.source_run].deleted:
                raise NotFoundError(f"run {opened.source_run} was deleted", rule="run_deleted")
            prepared = self.shelf.of_submission(opened.submission_id)
            if prepared is not None:
                prepared.check(opened)
            run = prepared.run if prepared else self.last + 1
            numbered = ev.RunNumbered(
                run=run,
                submission_id=opened.submission_id,
                job_digest=digest,
                job_name=opened.job.name,
                submitter=opened.submitter,
                organisation=opened.submitter_organisation,
                source_run=opened.source_run,
            )
            event = opened.model_copy(update={"run": run})
            first = Row(ev.run_stream(run), 1, utc_now(), *ev.encode(event))
            time = await self._append(numbered, first)
            self._note_step(numbered, time)
            self._enter(numbered, time)
            self.note(run, rounds=opened.job.rounds)
            return run, first

    async def summarise(self, run: int, ended: ev.RunEnded, number: int, rounds: int) -> None:
        """Note the end of a run, so that it needs no replay; without space, later."""
        summarised = ev.RunSummarised(
            run=run, status=ended.status, reason=ended.reason, round=number, rounds=rounds
        )
        while True:
            try:
                async with self._turn:
                    await self._append(summarised)
                return
            except ResourceExhaustedError as error:
                log.error("the end of run %d waits for space: %s", run, error)
                await asyncio.sleep(RETRY_S)

    async def set_enabled(self, site: str, enabled: bool, by: str) -> None:
        """Let a site take part, or bar it.

        Raises:
            ResourceExhaustedError: nothing can be stored.
        """
        async with self._turn:
            kind = ev.SiteEnabled if enabled else ev.SiteDisabled
            await self._append(kind(site=site, by=by))
            (self._disabled.discard if enabled else self._disabled.add)(site)

    async def step(self, decide: Callable[[], ev.Event | None]) -> None:
        """Append what `decide`, called when it is this step's turn, says about jobs and runs.

        Args:
            decide: returns the event, None if nothing is to be done; raises FLError to refuse.

        Raises:
            FLError: refused.
            ResourceExhaustedError: nothing can be stored.
        """
        async with self._turn:
            if (event := decide()) is not None:
                self._note_step(event, await self._append(event))

    def _note_step(self, event: ev.Event, time: str) -> None:
        self.shelf.apply(event, time)
        match event:
            case ev.RunReserved():
                self._summaries[event.run] = RunSummary(
                    run=event.run,
                    name="",
                    submitter=event.by,
                    submission_id=event.submission_id,
                    submitted=time,
                    status=PREPARED,
                    organisation=event.organisation,
                )
            case ev.RunPrepared():
                self.note(event.run, name=event.job_name, sites=event.sites)
            case ev.RunDeleted():
                self.note(event.run, deleted=time, deleted_by=event.by)

    async def deny(self, word: Denial) -> None:
        """Deny a name, or undo that.

        Raises:
            ResourceExhaustedError: nothing can be stored.
        """
        async with self._turn:
            await self._append(
                ev.NameRevoked(
                    name=word.name, kind=word.kind, order=word.to_text(), by=word.by, undo=word.undo
                )
            )
            self._denials.add(word)

    async def _append(self, event: ev.Event, *more: Row) -> str:
        """Append an event, with rows of other streams; return its time."""
        row = Row(ev.FEDERATION, self._seq + 1, utc_now(), *ev.encode(event))
        await asyncio.wrap_future(self._store.append([row, *more]))
        self._seq = row.seq
        return row.time

    def _enter(self, event: ev.RunNumbered, time: str) -> None:
        self._submissions[event.submission_id] = event.run
        self._summaries[event.run] = RunSummary(
            run=event.run,
            name=f"validate of run {event.source_run}" if event.source_run else event.job_name,
            source_run=event.source_run,
            submitter=event.submitter,
            submission_id=event.submission_id,
            submitted=time,
            job_digest=event.job_digest,
            organisation=event.organisation,
        )


def decode(row: Row) -> ev.Event:
    """Read a stored event.

    Raises:
        FLError: this release does not know it.
    """
    return ev.decode(row.type, row.version, row.body, f"{row.stream}#{row.seq}")


def read_run(store: StateStore, run: int) -> list[Row]:
    """Return the rows of a run that has begun.

    Raises:
        DataLossError: events are missing; names them.
    """
    stream = ev.run_stream(run)
    rows = store.read(stream)
    if not rows:
        raise DataLossError(f"{stream}: all events are missing", hint=_RESTORE)
    return _gapless(rows, _RESTORE)


def _gapless(rows: list[Row], hint: str) -> list[Row]:
    for expected, row in enumerate(rows, 1):
        if row.seq != expected:
            last = row.seq - 1
            gap = f"event {last} is" if last == expected else f"events {expected} to {last} are"
            raise DataLossError(f"{row.stream}: {gap} missing", hint=hint)
    return rows
