"""Tasks at a site: fetch, download, have them done, spool, answer.

A result is in the spool before it is sent: filters run once, and nothing is trained again because
a wire broke.
"""

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from flplatform.client.answering import Answers
from flplatform.client.cache import BlobCache, CachedBlobs
from flplatform.client.executors import JobCodeError, Outcome, RunProcessCrashed
from flplatform.client.outgoing import prepare
from flplatform.client.session import WAITING_CALL_S, Session
from flplatform.client.site_run import SiteRun
from flplatform.client.site_runs import SiteRuns
from flplatform.client.spool import Spool, SpooledResult
from flplatform.client.state import base_of
from flplatform.client.troubles import Troubles
from flplatform.core.config import SitePolicy
from flplatform.core.diagnosis import rejoin, run_lost
from flplatform.core.errors import FLError, PermissionDeniedError, ResourceExhaustedError
from flplatform.core.messages import TRAIN, ModelRef, Task, TaskFailure, TaskId
from flplatform.files.counters import Counters
from flplatform.files.durable import private_dir
from flplatform.files.threads import in_thread
from flplatform.rpc.v1 import federated_pb2 as pb

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Pause after an error that answers no task, before the server may offer the task again."""

T = TypeVar("T")


class TaskLoop:
    """One waiting call for all runs of this site, and a worker per task in hand."""

    def __init__(
        self,
        session: Session,
        runs: SiteRuns,
        spool: Spool,
        blobs: CachedBlobs,
        policy: SitePolicy,
        work: Path,
        cache_bytes: int = 64 << 30,
    ) -> None:
        self._session = session
        self._runs = runs
        self._spool = spool
        self.policy = policy
        self._work = private_dir(work)
        self._workers: dict[str, asyncio.Task[bool]] = {}
        self._stopping: set[str] = set()
        """Cancelled, and not over: job code may take its time."""
        self._withdrawn: set[str] = set()
        self.counters = Counters()
        self._answers = Answers(session, runs.held, spool, self.counters)
        self._persist = self._answers.persist
        self._cache = BlobCache(session, blobs, cache_bytes, runs.needed_blobs, self.counters)

    async def run(self) -> None:
        """Work until cancelled."""

        def clear() -> list[SpooledResult]:
            for leftover in self._work.iterdir():
                shutil.rmtree(leftover, ignore_errors=True)
            return self._spool.entries()

        for entry in await self._session.persist("read the spool", lambda: in_thread(clear)):
            self._begin(entry.task_id, partial(self._answers.submit, entry))
        await self._session.repeat("get tasks", self._step)

    async def close(self) -> None:
        """Stop all workers; what they have spooled stays."""
        await self._stop(list(self._workers))

    async def stop(self, run: int) -> None:
        """End the tasks of a run that is over here."""
        await self._stop(self._of(run))

    async def fetch(self, blob: ModelRef, troubles: Troubles | None = None) -> Path:
        """Download a blob, once however many ask, until it is here.

        It stays until the asyncio task that asks is over, or as long as a run needs it.

        Args:
            blob: what is wanted.
            troubles: where failed tries are noted.

        Raises:
            FLError: the server refused.
        """
        return await self._persist(
            f"download {blob.digest}", lambda: self._cache.fetch(blob), troubles or Troubles()
        )

    async def _step(self) -> None:
        self._runs.news.clear()
        before = set(self._workers)
        held = [task_id for task_id in self._workers if task_id not in self._withdrawn]
        starts = {number: self._runs.token(number) for number in self._runs.numbers()}
        request = pb.GetTaskRequest(held=held, runs=list(starts))
        call = self._session.training("GetTask", request, WAITING_CALL_S)
        reply = await _unless(self._runs.news, call)
        if reply is None:
            return  # the server is asked anew: it has been told what is not so any more
        for ended in reply.ended:
            if self._runs.token(ended.run) is starts.get(ended.run):  # not anew meanwhile
                self._runs.end(ended.run, ended.status)
        offered = {task.id: _read(task) for task in reply.tasks}
        self._withdrawn = set(self._workers) - set(offered)
        for task_id in self._withdrawn - self._answers.begun:  # else the answer settles the state
            if self._cancel(task_id):
                log.info("task %s is withdrawn", task_id)
        short = any(run.troubles.short_of_space for run in self._runs.all())
        await self._cache.offer(offered.values(), short_of_space=short)
        for task_id, task in offered.items():
            # What was in hand when the server was asked may have been answered since.
            if task_id not in before:
                self._begin(task.id, partial(self._do, task))

    def _of(self, run: int) -> list[str]:
        return [key for key in self._workers if TaskId.parse(key).run == run]

    def _cancel(self, task_id: str) -> bool:
        """Cancel a worker, once: it is shielding the end of its run process from the first."""
        fresh = task_id not in self._stopping
        if fresh:
            self._stopping.add(task_id)
            self._workers[task_id].cancel()
        return fresh

    async def _stop(self, task_ids: list[str]) -> None:
        for task_id in task_ids:
            self._cancel(task_id)
        await self._wait(task_ids)

    async def _wait(self, task_ids: list[str]) -> None:
        """Wait until workers are through."""
        if workers := [self._workers[task_id] for task_id in task_ids]:
            await asyncio.wait(workers)

    def _begin(self, task_id: TaskId, work: Callable[[], Awaitable[None]]) -> None:
        key = str(task_id)

        async def worker() -> bool:
            try:
                await work()
                return True
            except FLError as error:
                log.warning("task %s: not answered: %s", key, error)
            except Exception:
                log.exception("task %s: a defect of this program", key)
            await asyncio.sleep(RETRY_S)
            return False

        task = asyncio.create_task(worker(), name=f"task {key}")
        self._workers[key] = task

        def done(ended: asyncio.Task[bool]) -> None:
            del self._workers[key]
            self._answers.begun.discard(key)
            self._stopping.discard(key)
            unanswered = ended.cancelled() or not ended.result()
            if unanswered and key not in self._withdrawn:
                self._runs.news.set()  # the server believes that it is in hand here

        task.add_done_callback(done)

    # ---- one task ----

    async def _do(self, task: Task) -> None:
        task_id = task.id
        await self._wait([key for key in self._of(task_id.run) if key in self._stopping])
        if entry := await self._answers.spooled(task_id):
            return await self._answers.submit(entry)
        run = await self._runs.ready(task_id.run)
        if run is None:
            anew = "if it goes on, first {}, then {}".format(*rejoin(task_id.site, task_id.run))
            text = "task %s: run %d is not here: never accepted, or lost; %s"
            log.error(text, task_id, task_id.run, anew)
            lacks = TaskFailure(f"{run_lost(task_id.run)}: {anew}")
            return await self._answers.fail(task_id, lacks)
        try:
            outcome = await self._produce(run, task)
        except RunProcessCrashed as error:
            outcome = TaskFailure(str(error), error.log_tail)
        except JobCodeError as error:
            outcome = TaskFailure(str(error), error.traceback)
        except (FLError, OSError) as error:
            outcome = TaskFailure(str(error))
        except Exception as error:
            log.exception("task %s: a defect of this program", task_id)
            outcome = TaskFailure(f"a defect of the site's program: {type(error).__name__}")
        finally:
            run.enter("idle")
            run.troubles.clear()
        if isinstance(outcome, TaskFailure):
            log.warning("task %s failed: %s", task_id, outcome.error)
            run.troubles.note(f"task {task_id}: {outcome.error}")
            return await self._answers.fail(task_id, outcome)
        return await self._answers.submit(outcome)

    async def _produce(self, run: SiteRun, task: Task) -> SpooledResult | TaskFailure:
        _demand_signed(run, task)
        model = None
        if task.model:
            run.enter("downloading")
            model = await self._fetch_model(task, run)
        work = self._work / str(task.id).replace("/", "-")
        try:
            outcome = await run.execute(task, model, work)
            if isinstance(outcome, TaskFailure):
                return outcome
            return await self._spool_result(run, task, outcome, model, work)
        finally:
            await _remove(work)

    async def _fetch_model(self, task: Task, run: SiteRun) -> Path | None:
        """Download a task's model, if it has one, in the form in which it crosses the wire."""
        what = f"download the model of {task.id}"
        return await self._persist(what, lambda: self._cache.model_of(task), run.troubles)

    async def _spool_result(
        self, run: SiteRun, task: Task, outcome: Outcome, model: Path | None, work: Path
    ) -> SpooledResult:
        """Make what is sent of what the run process made, outside its reach, and spool it."""
        policy = self.policy

        def make() -> ModelRef | None:
            return prepare(work, outcome, base_of(work, model), policy.filters, task)

        async def commit() -> None:
            with self._answers.committing(task.id):
                await in_thread(self._spool.commit, entry, work)

        blob = await self._make(run, task, partial(in_thread, make))
        examples = outcome.examples
        if blob and policy.max_examples is not None:
            examples = min(examples, policy.max_examples)
        entry = SpooledResult(
            task_id=task.id,
            blob=blob,
            examples=examples,
            metrics=outcome.metrics,
            received=outcome.received,
            received_examples=outcome.received_examples,
            trained_from=task.model.digest if task.model and blob else "",
        )
        await self._make(run, task, commit)
        return entry

    async def _make(self, run: SiteRun, task: Task, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step, again while this machine is short of what it takes."""
        size = task.model.size if task.model else 0
        return await self._persist(
            str(task.id), lambda: self._cache.with_room(size, step), run.troubles
        )


def _read(offer: pb.Task) -> Task:
    return Task(
        TaskId.parse(offer.id),
        offer.seed,
        ModelRef(offer.model.digest, offer.model.size) if offer.HasField("model") else None,
        offer.codec or "none",
        ModelRef(offer.wire.digest, offer.wire.size) if offer.HasField("wire") else None,
        offer.wire_codec or "none",
    )


async def _remove(work: Path) -> None:
    """Delete what a task has left; where that fails, the next start of this site does."""
    try:
        await in_thread(shutil.rmtree, work, ignore_errors=True)
    except ResourceExhaustedError as error:
        log.warning("%s stays for now: %s", work, error)


def _demand_signed(run: SiteRun, task: Task) -> None:
    """Refuse what the signed start and the signed job do not say.

    Raises:
        PermissionDeniedError: the server asks for another kind of work, or another form of it.
    """
    if run.plan.purpose == "validate" and not task.id.owner:
        raise PermissionDeniedError(
            f"run {run.run} was started for validation: it takes no {task.id.kind} task",
            rule="signed purpose",
        )
    job = run.package.job
    forms = (
        ("codec", task.codec, (job.codec if task.id.kind == TRAIN else "none",)),
        ("codec_down", task.wire_codec, ("none", job.codec_down)),
    )
    for name, asked, signed in forms:
        if asked not in signed:
            raise PermissionDeniedError(
                f"the server asks for {name} {asked!r}, the job says {signed[-1]!r}",
                rule="signed job",
            )


async def _unless(event: asyncio.Event, call: Awaitable[T]) -> T | None:
    """Wait for a call, or give it up when an event comes first."""
    asked, news = asyncio.ensure_future(call), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({asked, news}, return_when=asyncio.FIRST_COMPLETED)
        return asked.result() if asked.done() else None
    finally:
        news.cancel()
        asked.cancel()
        await asyncio.wait({asked})
