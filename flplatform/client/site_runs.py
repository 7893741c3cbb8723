"""The runs that this site has accepted: each in a folder of its own, remembered over restarts."""

import asyncio
import base64
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from flplatform.client.ending import Endings, Seats
from flplatform.client.executors import RunProcessCrashed
from flplatform.client.policy import Plan, Policy
from flplatform.client.requests import StartBody
from flplatform.client.resuming import Restored, Resumer, WaitingRun, signed_bytes
from flplatform.client.retrying import persist
from flplatform.client.run_folders import RunFolders
from flplatform.client.sandbox import sweep_scratch
from flplatform.client.site_run import RunRecord, SiteRun
from flplatform.client.spool import Spool
from flplatform.client.starts import Start, Starts
from flplatform.client.troubles import Troubles
from flplatform.client.verbs import Submitter
from flplatform.core.errors import (
    FLError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.threads import in_thread
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.kit import Kit
from flplatform.security.package import Package, open_package
from flplatform.security.signing import Signed, StartOrder

log = logging.getLogger(__name__)

PAST_TROUBLES = 20
"""Ended runs whose last errors are remembered."""


class SiteRuns:
    """Accepts runs, brings them back after a restart, and ends them.

    A run in hand is one that can work (`SiteRun`) or one that cannot yet after a restart
    (`WaitingRun`).

    Args:
        fetch: downloads a blob and returns its file.
        spool: has the results that wait for an answer.
        stop_tasks: ends the tasks of a run that is over here.
        trust: returns the trust store of now.
        on_metric: hears of every metric that training code logs.
        on_lines: hears of every line of a run's log: (run, time, who, texts).
        on_end: hears of every run that has ended here, after its last line.
    """

    def __init__(
        self,
        kit: Kit,
        policy: Policy,
        fetch: Callable[[ModelRef], Awaitable[Path]],
        spool: Spool,
        stop_tasks: Callable[[int], Awaitable[None]],
        trust: Callable[[], TrustStore],
        on_metric: Callable[[int, int, str, float, int | None], None],
        on_lines: Callable[[int, str, str, Sequence[str]], None] = lambda *_: None,
        on_end: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_lines = on_lines
        self._submitters: dict[int, Submitter] = {}
        self._kit = kit
        self._policy = policy
        self._fetch = fetch
        self._spool = spool
        self._stop_tasks = stop_tasks
        self._trust = trust
        self._on_metric = on_metric
        self._longest_s = kit.site.backoff_max_s
        self._folders = RunFolders(kit.state_folder() / "runs")
        self._resumer = Resumer(fetch, trust, self._check, self._longest_s)
        self._runs: dict[int, SiteRun] = {}
        self._waiting: dict[int, WaitingRun] = {}
        self._past: dict[int, Troubles] = {}
        self._starts = Starts(kit.site.clock_skew_s)
        self.news = asyncio.Event()
        """Set when the server waits for what it has not heard: a run is taken on, or a task that
        it believes to be in hand is not any more. Whoever tells it clears this first."""
        self._beside: dict[int, asyncio.Task[None]] = {}
        """What is done for a run beside its tasks: it is brought back, or its process started."""
        self._seats = Seats()
        sweep = partial(sweep_scratch, kit.folder)
        self._endings = Endings(
            self._folders, spool, self._stop, on_end, sweep, self._seats, self._longest_s
        )

    def open(self, blob_path: Callable[[str], Path]) -> None:
        """Bring back the runs that were accepted before a restart, verifying them again.

        What cannot be brought back now waits, see `ready`; leftovers are deleted beside the rest.

        Raises:
            DataLossError: which submissions were accepted cannot be read.
        """
        self._resumer.blob_path = blob_path
        accepted, leftovers = self._folders.open()
        records = []
        for number, folder in accepted.items():
            run = self._waiting[number] = WaitingRun(number, folder)
            try:
                self._resumed(run, self._resumer.restore(run))
            except (FLError, OSError) as error:
                self._resumer.judge(run, error, 1)
                if not run.done:
                    self._do_beside(number, self._bring_back(run))
            if run.record is not None:
                records.append(run.record)
        self._folders.note(*records)  # a kill may have come between accepting one and noting it
        for leftover in leftovers:
            self._endings.delete(leftover)

    async def _bring_back(self, run: WaitingRun) -> None:
        found = await self._resumer.until_restored(run)
        if found and not run.done:  # else it has ended meanwhile
            self._resumed(run, found)

    def _resumed(self, waiting: WaitingRun, found: Restored) -> None:
        del self._waiting[waiting.run]
        run = self._add(waiting.folder, found)
        run.turn, run.troubles = waiting.turn, waiting.troubles
        waiting.settle()
        log.info("run %d is resumed", run.run)

    def _check(self, submitter: Identity, package: Package, order: StartOrder) -> Plan:
        return self._policy.check_job(
            submitter,
            package.author,
            has_code=package.has_code,
            data=package.job.data,
            environment=package.job.environment,
            processes=order.gpus.get(self._kit.identity.name, 1),
            purpose=order.purpose,
        )

    def _add(self, folder: Path, found: Restored) -> SiteRun:
        record, submitter = found.record, found.submitter
        on_lines = partial(self._on_lines, record.run)
        run = SiteRun(
            self._kit, folder, record, found.package, found.plan, self._on_metric, on_lines
        )
        self._submitters[record.run] = submitter.name, submitter.organisation
        self._runs[record.run] = run
        return run

    def _do_beside(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._beside[number] = asyncio.create_task(work, name=f"beside run {number}")
        task.add_done_callback(lambda _: self._beside.pop(number, None))

    # ---- what requests need ----

    def recorded(self, signed: Signed, body: StartBody) -> Mapping[str, Any] | None:
        """Return the answer given to this very start before, if its run is at work."""
        run = self._runs.get(body.run)
        if run is None or signed_bytes(run.record) != signed.to_bytes():
            return None
        return {"isolation": run.plan.isolation}

    async def accept(
        self,
        signed: Signed,
        order: StartOrder,
        submitter: Identity,
        body: StartBody,
        record: Callable[[], None] = lambda: None,
    ) -> Mapping[str, Any]:
        """Take a run on: record, download, verify, ask the policy, unpack; durable on return.

        What finds no space waits for it. It is given up when the order's time is over, or its run.

        Args:
            signed: the signed start.
            order: what it says.
            submitter: who signed it.
            body: what the server adds.
            record: writes the audit, before anything is done.

        Raises:
            FLError: refused or failed, and why.
        """
        name = self._kit.identity.name
        if name not in order.sites:
            raise PermissionDeniedError(f"the start does not name {name}", rule="signed targets")
        if body.digest != f"blake3:{order.job_digest}":
            raise PermissionDeniedError(
                "the server offers another package than the one that was signed",
                rule="signed job digest",
            )
        async with self._starts.turn(body.run, order) as start:
            return await self._accept(signed, submitter, body, start, record)

    async def _accept(
        self,
        signed: Signed,
        submitter: Identity,
        body: StartBody,
        start: Start,
        record: Callable[[], None],
    ) -> Mapping[str, Any]:
        if (waiting := self._waiting.get(body.run)) and self._is_of(waiting, signed, start.order):
            await waiting.ask()
            if waiting.refusal:
                raise waiting.refusal
        if (answer := self.recorded(signed, body)) is not None:
            return answer  # asked twice, as after a restart of the server
        self._check_single(start.order.submission_id, body)
        with self._starts.enter(start):
            self.news.set()  # so that the server tells if the run ends first
            what = f"record the start of run {body.run}"
            await persist(what, lambda: in_thread(record), self._longest_s)
            run = await self._take_on(signed, submitter, body, start)
        self.news.set()
        log.info(
            "run %d accepted: %s by %s, isolation %s",
            run.run,
            run.package.job.name,
            submitter.name,
            run.plan.isolation,
        )
        self._do_beside(run.run, self._warm(run))
        return {"isolation": run.plan.isolation}

    def _is_of(self, waiting: WaitingRun, signed: Signed, order: StartOrder) -> bool:
        """Return whether a run that waits was accepted by this very start."""
        if waiting.record is None:
            return self._folders.submissions.get(order.submission_id) == waiting.run
        return signed_bytes(waiting.record) == signed.to_bytes()

    def _check_single(self, submission_id: str, body: StartBody) -> None:
        """A submission is accepted once, as one run; a run number stands for one job.

        A run that this site was withdrawn from may be started anew, even before the site has
        heard of its withdrawal.
        """
        known = (self._starts.submissions | self._folders.submissions).get(submission_id)
        if known is not None:
            raise PermissionDeniedError(
                f"this submission was started here before, as run {known}", rule="single start"
            )
        run = self.held(body.run)
        if run is not None and run.record is not None and run.record.digest != body.digest:
            raise InvalidArgumentError(f"run {body.run} is another job here", field="run")

    async def _take_on(
        self, signed: Signed, submitter: Identity, body: StartBody, start: Start
    ) -> SiteRun:
        number, what = body.run, f"take run {body.run} on"
        now = datetime.now(UTC)

        async def package_of() -> Package:
            path = await self._fetch(ModelRef(body.digest, body.size))
            try:
                return await in_thread(open_package, path, self._trust(), now)
            except FileNotFoundError:  # it had made room for others before it was known as needed
                raise UnavailableError(f"{path} is gone") from None

        package = await persist(what, package_of, self._longest_s)
        plan = self._check(submitter, package, start.order)
        environment = package.job.environment
        busy = Counter(self._places(number).values())[environment]
        self._starts.reserve(start, environment, busy, plan.environment.max_runs)
        record = RunRecord(
            run=number,
            submission_id=start.order.submission_id,
            digest=body.digest,
            size=body.size,
            order=base64.b64encode(signed.to_bytes()).decode(),
            accepted=now,
        )
        self._begin_end(number, "started anew")
        await self.until_ended(number)
        try:
            folder = await persist(
                what, lambda: in_thread(self._unpack, record, package), self._longest_s
            )
        except asyncio.CancelledError:
            if start.given_up:  # else this process ends: the server will ask again
                self._endings.forget(number)
            raise
        return self._add(folder, Restored(record, package, plan, submitter))

    def _unpack(self, record: RunRecord, package: Package) -> Path:
        self._spool.drop_run(record.run)  # what a kill at the end of an earlier start has left
        return self._folders.unpack(record, package)

    def _places(self, without: int = 0) -> dict[int, str]:
        """Return run → environment in which it has a place, as far as that is known."""
        waiting = {number: run for number, run in self._waiting.items() if not run.refusal}
        places = {number: run.environment for number, run in waiting.items()}
        places |= {number: run.package.job.environment for number, run in self._runs.items()}
        reserved = {run: start.environment for run, start in self._starts.entered.items()}
        places |= {run: name for run, name in reserved.items() if name}
        return {run: name for run, name in places.items() if name and run != without}

    # ---- what the task loop needs ----

    def numbers(self) -> list[int]:
        """Return the runs in hand, and those on their way in: of all it matters if they end."""
        return sorted(self._runs.keys() | self._waiting.keys() | self._starts.entered.keys())

    def held(self, run: int) -> SiteRun | WaitingRun | None:
        """Return a run in hand."""
        found: SiteRun | WaitingRun | None = self._runs.get(run)
        return found or self._waiting.get(run)

    def token(self, run: int) -> object:
        """Return what one start of a run is known by, also on its way in; None for none."""
        return self.held(run) or self._starts.entered.get(run)

    async def ready(self, number: int) -> SiteRun | None:
        """Return a run as soon as it can work; None if it is not in hand, or refused.

        One that waits is tried at once. It can work when those that it follows have left it room.
        """
        if waiting := self._waiting.get(number):
            await waiting.ask()
        if (run := self._runs.get(number)) is not None:
            await self._seats.take(run)
        return run

    def over(self, run: int) -> bool:
        """Return whether a run was accepted here and has ended."""
        return self.held(run) is None and run in self._folders.submissions.values()

    def submitter(self, run: int) -> Submitter:
        """Return who submitted a run that was in hand since this process began; else empty."""
        waiting = self._waiting.get(run)
        return waiting.submitter if waiting else self._submitters.get(run, ("", ""))

    def busy(self) -> dict[str, int]:
        """Return how many runs are at work in each environment."""
        return dict(Counter(self._places().values()))

    def needed_blobs(self) -> set[str]:
        """Return the digests of the packages, which the runs in hand need again."""
        waiting = {run.record.digest for run in self._waiting.values() if run.record}
        packages = {run.record.digest for run in self._runs.values()} | waiting
        return packages | self._starts.packages

    def all(self) -> list[SiteRun]:
        """Return all accepted runs that can work, in order."""
        return [run for _, run in sorted(self._runs.items())]

    def reports(self) -> list[tuple[int, int, str, float, str]]:
        """Return the report of each run in hand, see `SiteRun.report`."""
        return [run.report() for number in self.numbers() if (run := self.held(number))]

    def troubles(self, run: int) -> Troubles:
        """Return what went wrong in a run; of one that has ended, what it left."""
        found = self.held(run)
        return found.troubles if found else self._past.get(run, Troubles())

    async def _warm(self, run: SiteRun) -> None:
        try:
            await self._seats.take(run)
            await run.warm_up()
        except (FLError, OSError, RunProcessCrashed) as error:
            log.warning("run %d: its process does not start: %s", run.run, error)
            run.troubles.note(f"its process does not start: {error}")

    # ---- ends ----

    def end(self, number: int, status: str) -> None:
        """Begin to end a run here: its tasks, its process, its code and its state; its log stays.

        Job code may take its time to end: nothing else waits for it, but a new start of the run,
        and one that needs its place. A start on its way in is given up.
        """
        if not self._begin_end(number, status):
            self._starts.give_up(number, status)

    def _begin_end(self, number: int, status: str) -> bool:
        """Begin to end a run in hand; return whether it was."""
        run = self.held(number)
        if run is None:
            return False
        self._runs.pop(number, None)
        self._waiting.pop(number, None)
        log.info("run %d has ended: %s", number, status)
        self._past[number] = run.troubles
        while len(self._past) > PAST_TROUBLES:
            del self._past[next(iter(self._past))]
        if isinstance(run, WaitingRun):
            run.settle()
        self._endings.begin(run)
        return True

    async def until_ended(self, number: int) -> None:
        """Wait until a run that has ended here is over for good; what it leaves is deleted then."""
        await self._endings.until_over(number)

    async def _stop(self, number: int) -> None:
        """End everything that is done for a run."""
        try:
            await self._stop_tasks(number)
        finally:
            if beside := self._beside.get(number):
                beside.cancel()
                await asyncio.wait([beside])

    async def close(self) -> None:
        """End all run processes; the runs stay accepted, and what is ending is ended next time."""
        await self._starts.close()
        beside = list(self._beside.values())
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        aborts = [run.abort() for run in self._runs.values()]
        for error in await asyncio.gather(*aborts, return_exceptions=True):
            if isinstance(error, BaseException):
                log.error("a run process may not have ended: %s", error)
        await self._endings.close()
