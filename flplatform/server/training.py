"""What the FL port does: hand out tasks, take results, admit the bytes behind them."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.core.messages import (
    SUBMIT_MODEL,
    TRAIN,
    ModelRef,
    Task,
    TaskFailure,
    TaskId,
    TaskResult,
    check_examples,
    check_metrics,
)
from flplatform.core.model import check_digest
from flplatform.core.ports import BlobStore
from flplatform.core.workflow import FailureArrived, ResultArrived
from flplatform.rpc.interceptors import Caller
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server.runs import Runs
from flplatform.server.wire import Expected, admissible

MAX_TRACEBACK_CHARS = 16_384


class ResultProcessor(Protocol):
    """Checks one kind of task result and turns it into a value."""

    @property
    def topics(self) -> tuple[str, ...]:
        """Task kinds handled here, without the owner of a validate task."""

    def process(self, task_id: TaskId, outcome: pb.TaskOutcome) -> TaskResult:
        """Check `outcome`.

        Raises:
            InvalidArgumentError: names the field.
        """


class ModelResultProcessor:
    """Results that carry a model, by digest: train and submit_model."""

    topics = (TRAIN, SUBMIT_MODEL)

    def process(self, task_id: TaskId, outcome: pb.TaskOutcome) -> TaskResult:
        """Check digest, metrics and examples.

        Raises:
            InvalidArgumentError: names the field.
        """
        if not outcome.HasField("blob"):
            raise InvalidArgumentError(f"{task_id} needs a model", field="result.blob")
        check_digest(outcome.blob.digest, "result.blob.digest")
        if outcome.trained_from:
            check_digest(outcome.trained_from, "result.trained_from")
        return TaskResult(
            blob=ModelRef(outcome.blob.digest, outcome.blob.size),
            examples=check_examples(outcome.examples),
            metrics=check_metrics(outcome.metrics),
            received=check_metrics(outcome.received, "received"),
            received_examples=check_examples(outcome.received_examples, "received_examples"),
            trained_from=outcome.trained_from,
        )


class ResultProcessors:
    """Result processors by topic; one each.

    Raises:
        AlreadyExistsError: two processors claim one topic.
    """

    def __init__(self, processors: Sequence[ResultProcessor]) -> None:
        self._by_topic: dict[str, ResultProcessor] = {}
        for processor in processors:
            for topic in processor.topics:
                if topic in self._by_topic:
                    raise AlreadyExistsError(f"topic {topic!r} has two result processors")
                self._by_topic[topic] = processor

    def process(self, task_id: TaskId, outcome: pb.TaskOutcome) -> TaskResult:
        """Check a result by the processor of its task's kind.

        Raises:
            InvalidArgumentError: no processor, or the result is malformed.
        """
        topic = task_id.kind.split(".")[0]
        if topic not in self._by_topic:
            raise InvalidArgumentError(f"nobody processes {topic!r} results", field="task_id")
        return self._by_topic[topic].process(task_id, outcome)


class TrainingService:
    """Tasks and results of all sites and runs.

    Args:
        wait_s: a waiting call returns empty after so long.
        refused: told of each result that is refused: (site, task id, error).
    """

    def __init__(
        self,
        runs: Runs,
        blobs: BlobStore,
        processors: ResultProcessors,
        wait_s: float,
        refused: Callable[[str, str, FLError], None] = lambda *_: None,
    ) -> None:
        self._refused = refused
        self._wait_s = wait_s
        self._runs = runs
        self._blobs = blobs
        self._processors = processors
        self._changed: dict[str, asyncio.Event] = {}
        self._closing = False

    def notify(self, sites: set[str]) -> None:
        """Wake the waiting calls of these sites."""
        for site in sites:
            if event := self._changed.get(site):
                event.set()

    def close(self) -> None:
        """Let all waiting calls return: the server is about to end."""
        self._closing = True
        self.notify(set(self._changed))

    async def get_task(
        self, site: str, held: Sequence[str], runs: Sequence[int]
    ) -> tuple[list[Task], Mapping[int, str]]:
        """Return a site's open tasks and which of its runs have ended.

        Waits until the tasks differ from `held` or a run in `runs` has ended, `wait_s` at most.
        """
        event = self._changed.setdefault(site, asyncio.Event())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        while True:
            event.clear()
            tasks = self._runs.tasks.of(site)
            ended = {run: status for run in runs if (status := self._runs.ended(run, site))}
            over = self._closing or loop.time() >= deadline
            if over or ended or {str(task.id) for task in tasks} != set(held):
                return tasks, ended
            try:
                async with asyncio.timeout_at(deadline):
                    await event.wait()
            except TimeoutError:
                continue

    async def submit_result(self, site: str, request: pb.SubmitResultRequest) -> str:
        """Bind a result or a failure to its task; return `accepted` or `duplicate`.

        Raises:
            PermissionDeniedError: the task is another site's.
            FLError: refused, and why; nothing has changed.
        """
        try:
            return await self._submit_result(site, request)
        except FLError as error:
            self._refused(site, request.task_id, error)
            raise

    async def _submit_result(self, site: str, request: pb.SubmitResultRequest) -> str:
        task_id = TaskId.parse(request.task_id)
        if task_id.site != site:
            raise PermissionDeniedError(
                f"{site} may not answer task {task_id}", rule="own_tasks_only"
            )
        self._runs.tasks.demand_enabled(site)
        if request.WhichOneof("outcome") == "failure":
            failure = TaskFailure(
                error=" ".join(request.failure.error.split())[:1000] or "no reason given",
                traceback=request.failure.traceback[-MAX_TRACEBACK_CHARS:],
            )
            events = await self._runs.tasks.tell(task_id, FailureArrived(task_id, failure))
        elif request.WhichOneof("outcome") == "result":
            result = self._processors.process(task_id, request.result)
            if (came := result.blob) is not None:
                if (kept := self._runs.uploads.model_of(task_id, came)) is None:
                    if await self._runs.tasks.settled_by(task_id, came.digest):
                        return "duplicate"
                    raise FailedPreconditionError(
                        f"{came.digest} was not uploaded for this task",
                        rule="upload_first",
                        hint="upload the blob, then submit the result",
                    )
                if kept != came:
                    result = replace(result, blob=kept, wire=came.digest)
            events = await self._runs.tasks.tell(task_id, ResultArrived(task_id, result))
        else:
            raise InvalidArgumentError("has neither result nor failure", field="outcome")
        return "accepted" if events else "duplicate"

    def admit_upload(self, caller: Caller, transfer_id: str, blob: ModelRef) -> Expected:
        """Return what the bytes uploaded for a task must be as they come, see `admissible`.

        Raises:
            PermissionDeniedError: the task is another site's, or the site is disabled.
            FailedPreconditionError: the task is not open.
            InvalidArgumentError: the task takes no model, or one of another size.
        """
        task_id = TaskId.parse(transfer_id)
        if task_id.site != caller.identity.name:
            raise PermissionDeniedError(
                f"{caller.identity.name} may not upload for task {task_id}", rule="own_tasks_only"
            )
        self._runs.tasks.demand_enabled(task_id.site)
        if task_id.owner:
            raise InvalidArgumentError(f"{task_id} takes no model", field="transfer_id")
        actor = self._runs.actor(task_id.run)
        task = actor.tasks.get(task_id.site, {}).get(transfer_id)
        if task is None:
            raise FailedPreconditionError(
                f"task {task_id} is not open", rule="task_closed", hint="drop the result"
            )
        expected = admissible(actor.state.job, actor.manifest, task, blob)
        self._runs.retention.begin(task_id)
        return expected

    async def note_upload(self, _caller: Caller, transfer_id: str, blob: ModelRef) -> None:
        """Take in that an admitted upload is whole; what a codec made is undone and checked now.

        Raises:
            FLError: it is no update of this job, or must be sent again.
        """
        task_id = TaskId.parse(transfer_id)
        task = self._runs.tasks.find(task_id)
        if task is not None and task.codec != "none":
            await self._runs.uploads.take(self._runs.actor(task_id.run), task, blob)
        else:
            self._runs.uploads.note(task_id, blob.digest)

    def note_broken_off(self, transfer_id: str) -> None:
        """Take in that an admitted upload is over without being whole."""
        self._runs.uploads.broke_off(TaskId.parse(transfer_id))

    def release_download(self, caller: Caller, digest: str) -> None:
        """Let a site read the packages and task models of its own runs only.

        Raises:
            PermissionDeniedError: the site is disabled.
            NotFoundError: no such blob, or none of this site's; the two look alike.
        """
        self._runs.tasks.demand_enabled(caller.identity.name)
        if not self._runs.uploads.readable(caller.identity.name, digest) or not self._blobs.has(
            digest
        ):
            raise NotFoundError(f"{caller.identity.name} has no task with blob {digest}")
