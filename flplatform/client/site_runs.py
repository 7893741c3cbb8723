"""The runs that this site has accepted: each in a folder of its own, remembered over restarts."""

import asyncio
import base64
import json
import logging
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from flplatform.client.executors import RunProcessCrashed
from flplatform.client.policy import Plan, Policy
from flplatform.client.requests import StartBody
from flplatform.client.retrying import persist
from flplatform.client.site_run import RunRecord, SiteRun
from flplatform.client.spool import Spool
from flplatform.client.troubles import Troubles
from flplatform.client.verbs import Submitter
from flplatform.core.errors import (
    DataLossError,
    FLError,
    InvalidArgumentError,
    PermissionDeniedError,
)
from flplatform.core.job import CODE_FOLDER
from flplatform.core.messages import ModelRef
from flplatform.core.strict import parse_json
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import fsync_dir, private_dir, remove_temporaries, write_atomic
from flplatform.files.threads import in_thread
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.kit import Kit
from flplatform.security.package import Package, open_package
from flplatform.security.signing import Signed, StartOrder, open_order

log = logging.getLogger(__name__)

RECORD = "start.json"
SUBMISSIONS = "submissions.json"
PAST_TROUBLES = 20
"""Ended runs whose last errors are remembered."""


class SiteRuns:
    """Accepts runs, brings them back after a restart, and ends them.

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
        self._on_end = on_end
        self._submitters: dict[int, Submitter] = {}
        self._kit = kit
        self._policy = policy
        self._fetch = fetch
        self._spool = spool
        self._stop_tasks = stop_tasks
        self._trust = trust
        self._on_metric = on_metric
        self._folder = private_dir(kit.state_folder() / "runs")
        self._runs: dict[int, SiteRun] = {}
        self._past: dict[int, Troubles] = {}
        self._submissions: dict[str, int] = {}
        self._accepting = asyncio.Lock()
        self.news = asyncio.Event()
        """Set when the server waits for what it has not heard: a run was taken on, or a task that
        it believes to be in hand is not any more. Whoever tells it clears this first."""
        self._warming: dict[int, asyncio.Task[None]] = {}
        self._ending: dict[int, asyncio.Task[None]] = {}

    def open(self, blob_path: Callable[[str], Path]) -> None:
        """Bring back the runs that were accepted before a restart, verifying them again.

        Raises:
            DataLossError: which submissions were accepted cannot be read.
        """
        remove_temporaries(self._folder)
        path = self._folder / SUBMISSIONS
        if path.exists():
            self._submissions = _read_submissions(path)
        known = dict(self._submissions)
        for folder in sorted(self._folder.iterdir()):
            if not (folder / RECORD).exists():
                continue
            try:
                record = parse_json(RunRecord, (folder / RECORD).read_bytes(), str(folder))
                self._submissions[record.submission_id] = record.run
                signed = Signed.from_bytes(base64.b64decode(record.order))
                identity, order = open_order(StartOrder, signed, self._trust(), record.accepted)
                path = blob_path(record.digest)
                if digest_of_file(path)[0] != f"blake3:{order.job_digest}":
                    raise DataLossError(f"{path} is not the package that was signed")
                package = open_package(path, self._trust(), record.accepted)
                plan = self._check(identity, package, order)
            except (FLError, OSError, ValueError) as error:
                log.error("%s is not resumed: %s", folder.name, error)
                continue
            self._add(folder, record, package, plan, identity)
            log.info("run %d is resumed", record.run)
        if self._submissions != known:  # a kill came between accepting one and noting it
            self._note_submissions(self._submissions)

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

    def _add(
        self, folder: Path, record: RunRecord, package: Package, plan: Plan, submitter: Identity
    ) -> SiteRun:
        on_lines = partial(self._on_lines, record.run)
        run = SiteRun(self._kit, folder, record, package, plan, self._on_metric, on_lines)
        self._submitters[record.run] = submitter.name, submitter.organisation
        self._runs[record.run] = run
        self._submissions[record.submission_id] = record.run
        return run

    # ---- what requests need ----

    def recorded(self, signed: Signed, body: StartBody) -> Mapping[str, Any] | None:
        """Return the answer given to this very start before."""
        run = self._runs.get(body.run)
        if run is None or base64.b64decode(run.record.order) != signed.to_bytes():
            return None
        return {"isolation": run.plan.isolation}

    async def accept(
        self, signed: Signed, order: StartOrder, submitter: Identity, body: StartBody
    ) -> Mapping[str, Any]:
        """Take a run on: download, verify, ask the policy, unpack; durable on return.

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
        async with self._accepting:
            if (answer := self.recorded(signed, body)) is not None:
                return answer  # asked twice, as after a restart of the server
            self._check_single(order.submission_id, body)
            path = await self._fetch(ModelRef(body.digest, body.size))
            now = datetime.now(UTC)
            package = await asyncio.to_thread(open_package, path, self._trust(), now)
            plan = self._check(submitter, package, order)
            busy = sum(
                run.package.job.environment == package.job.environment
                for run in self._runs.values()
                if run.run != body.run
            )
            if busy >= plan.environment.max_runs:
                raise PermissionDeniedError(
                    f"{busy} runs are at work in environment {package.job.environment!r}",
                    rule=f"environments.yml: max_runs = {plan.environment.max_runs}",
                )
            record = RunRecord(
                run=body.run,
                submission_id=order.submission_id,
                digest=body.digest,
                size=body.size,
                order=base64.b64encode(signed.to_bytes()).decode(),
                accepted=now,
            )
            self.end(body.run, "started anew")
            await self.until_ended(body.run)
            folder = await persist(
                f"take run {body.run} on",
                lambda: in_thread(self._unpack, record, package),
                self._kit.site.backoff_max_s,
            )
            run = self._add(folder, record, package, plan, submitter)
            self.news.set()
        log.info(
            "run %d accepted: %s by %s, isolation %s",
            run.run,
            package.job.name,
            submitter.name,
            plan.isolation,
        )
        warming = asyncio.create_task(_warm(run))
        self._warming[run.run] = warming
        warming.add_done_callback(lambda _: self._warming.pop(run.run, None))
        return {"isolation": plan.isolation}

    def _check_single(self, submission_id: str, body: StartBody) -> None:
        """A submission is accepted once, as one run; a run number stands for one job.

        A run that this site was withdrawn from may be started anew, even before the site has
        heard of its withdrawal.
        """
        known = self._submissions.get(submission_id)
        if known is not None:
            raise PermissionDeniedError(
                f"this submission was started here before, as run {known}", rule="single start"
            )
        known_run = self._runs.get(body.run)
        if known_run is not None and known_run.record.digest != body.digest:
            raise InvalidArgumentError(f"run {body.run} is another job here", field="run")

    def _unpack(self, record: RunRecord, package: Package) -> Path:
        self._spool.drop_run(record.run)  # where the end of an earlier start could not
        folder = self._folder / f"run-{record.run}"
        temporary = self._folder / f".tmp-{record.run}"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        private_dir(temporary)
        package.extract(temporary)
        private_dir(temporary / CODE_FOLDER)
        write_atomic(temporary / RECORD, record.model_dump_json().encode())
        temporary.rename(folder)
        fsync_dir(self._folder)
        try:
            self._note_submissions({**self._submissions, record.submission_id: record.run})
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _note_submissions(self, submissions: Mapping[str, int]) -> None:
        write_atomic(self._folder / SUBMISSIONS, json.dumps(submissions).encode())

    # ---- what the task loop needs ----

    def numbers(self) -> list[int]:
        """Return the runs in hand."""
        return sorted(self._runs)

    def get(self, run: int) -> SiteRun | None:
        """Return an accepted run."""
        return self._runs.get(run)

    def over(self, run: int) -> bool:
        """Return whether a run was accepted here and has ended."""
        return run not in self._runs and run in self._submissions.values()

    def submitter(self, run: int) -> Submitter:
        """Return who submitted a run that was in hand since this process began; else empty."""
        return self._submitters.get(run, ("", ""))

    def busy(self) -> dict[str, int]:
        """Return how many runs are at work in each environment."""
        return dict(Counter(run.package.job.environment for run in self._runs.values()))

    def needed_blobs(self) -> set[str]:
        """Return the digests that the runs in hand need again: packages, and filters' bases."""
        bases = {f"blake3:{run.last_model.name}" for run in self._runs.values() if run.last_model}
        return bases | {run.record.digest for run in self._runs.values()}

    def all(self) -> list[SiteRun]:
        """Return all accepted runs in order."""
        return [self._runs[number] for number in self.numbers()]

    def reports(self) -> list[tuple[int, int, str, float, str]]:
        """Return each run's report, see `SiteRun.report`."""
        return [run.report() for run in self.all()]

    def troubles(self, run: int) -> Troubles:
        """Return what went wrong in a run; of one that has ended, what it left."""
        found = self._runs.get(run)
        return found.troubles if found else self._past.get(run, Troubles())

    def end(self, number: int, status: str) -> None:
        """Begin to end a run here: its tasks, its process, its code and its state; its log stays.

        Job code may take its time to end: nothing else waits for it, but a new start of the run.
        """
        if (run := self._runs.pop(number, None)) is not None:
            log.info("run %d has ended: %s", number, status)
            ending = asyncio.create_task(self._end(run), name=f"end run {number}")
            self._ending[number] = ending
            ending.add_done_callback(lambda _: self._ending.pop(number, None))

    async def until_ended(self, number: int) -> None:
        """Wait until nothing is left of a run that has ended here."""
        if number in self._ending:
            await asyncio.shield(self._ending[number])

    async def _end(self, run: SiteRun) -> None:
        number = run.run
        self._past[number] = run.troubles
        while len(self._past) > PAST_TROUBLES:
            del self._past[next(iter(self._past))]
        await self._stop_tasks(number)
        if warming := self._warming.get(number):
            warming.cancel()
            await asyncio.wait([warming])
        await run.close()
        self._on_end(number)
        await in_thread(self._remove, run)

    def _remove(self, run: SiteRun) -> None:
        try:
            self._spool.drop_run(run.run)
        except OSError as error:
            log.error("run %d: its results stay in the spool: %s", run.run, error)
        shutil.rmtree(run.folder, ignore_errors=True)

    async def close(self) -> None:
        """End all run processes; the runs stay accepted."""
        warming = list(self._warming.values())
        for task in warming:
            task.cancel()
        await asyncio.gather(*warming, return_exceptions=True)
        await asyncio.gather(*(run.abort() for run in self._runs.values()))
        await asyncio.gather(*self._ending.values(), return_exceptions=True)


def _read_submissions(path: Path) -> dict[str, int]:
    """Return submission id → run of what was accepted here.

    Raises:
        DataLossError: the file is damaged.
    """
    try:
        return {str(key): int(run) for key, run in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataLossError(
            f"{path} is damaged: {error}",
            hint="restore it; without it, submissions of before could be started again",
        ) from None


async def _warm(run: SiteRun) -> None:
    try:
        await run.warm_up()
    except (FLError, OSError, RunProcessCrashed) as error:
        log.warning("run %d: its process does not start: %s", run.run, error)
        run.troubles.note(f"its process does not start: {error}")
