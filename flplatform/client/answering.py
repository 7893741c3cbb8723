"""What became of a task, told to the server until it has answered.

A result is sent byte for byte from the spool, which is settled by the answer. One that the disk
does not give back any more is dropped: its task is done again.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from flplatform.client.resuming import WaitingRun
from flplatform.client.session import Session
from flplatform.client.site_run import SiteRun
from flplatform.client.spool import Spool, SpooledResult
from flplatform.client.troubles import Troubles
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import TRAIN, TaskFailure, TaskId
from flplatform.files.counters import Counters
from flplatform.files.shortage import explaining_shortage
from flplatform.files.threads import in_thread
from flplatform.rpc.transfers import send_blob
from flplatform.rpc.v1 import federated_pb2 as pb

log = logging.getLogger(__name__)

READ_TRIES = 5
"""What a disk has refused to read so often is lost."""

T = TypeVar("T")


class _LostError(DataLossError):
    """A result is not in the spool any more as it was put there."""


class Answers:
    """Answers the server's tasks with what is in the spool, or with failures.

    Args:
        held: returns a run in hand.
        counters: told what is sent.

    Attributes:
        begun: ids of tasks whose answer is on its way: no withdrawal stops it any more. Whoever
            has a task done takes it out when the task is out of hand.
    """

    def __init__(
        self,
        session: Session,
        held: Callable[[int], SiteRun | WaitingRun | None],
        spool: Spool,
        counters: Counters,
    ) -> None:
        self._session = session
        self._held = held
        self._spool = spool
        self._counters = counters
        self.begun: set[str] = set()

    async def persist(self, what: str, step: Callable[[], Awaitable[T]], troubles: Troubles) -> T:
        """Do a step of a task until it is answered; how it fails is noted in `troubles`.

        A refusal because the site is disabled is no answer: what it has done is not lost. A task
        that was settled meanwhile is told from that once the site is enabled; if the run has
        ended, `GetTask` says so.
        """

        async def enabled() -> T:
            try:
                return await step()
            except PermissionDeniedError as error:
                if error.rule != "disabled":
                    raise
                raise UnavailableError(error.message, hint=error.hint) from None

        return await self._session.persist(what, lambda: troubles.watch(enabled))

    async def spooled(self, task_id: TaskId) -> SpooledResult | None:
        """Return the result of a task that is in the spool already; one that is lost is dropped."""
        troubles = Troubles()
        try:
            return await self._read(task_id, partial(self._spool.get, task_id), troubles)
        except DataLossError as error:
            log.error("task %s: what was kept is lost, it is done again: %s", task_id, error)
        await self._write(task_id, partial(self._spool.give_up, task_id), troubles)
        return None

    @contextmanager
    def committing(self, task_id: TaskId) -> Iterator[None]:
        """While its result comes into the spool a task counts as answered: it must be sent then."""
        self.begun.add(str(task_id))
        try:
            yield
        except Exception:
            self.begun.discard(str(task_id))
            raise

    async def submit(self, entry: SpooledResult) -> None:
        """Send a spooled result until the server has settled it.

        Raises:
            DataLossError: it is lost, and dropped.
            FLError: what answers nothing.
        """
        self.begun.add(str(entry.task_id))
        run = self._held(entry.task_id.run)
        if run and entry.task_id.kind == TRAIN:
            async with run.turn:  # the next task must start from the state that this one brings
                return await self._settle(entry, run)
        return await self._settle(entry, run)

    async def _settle(self, entry: SpooledResult, run: SiteRun | WaitingRun | None) -> None:
        task_id, troubles = entry.task_id, run.troubles if run else Troubles()
        if run:
            run.enter("uploading")
        adopt = False
        lost: _LostError | None = None
        try:
            await self.persist(f"submit {task_id}", lambda: self._try(entry, troubles), troubles)
            adopt = True
            self._counters.add("tasks_done")
        except (AlreadyExistsError, FailedPreconditionError, NotFoundError) as error:
            log.info("task %s: %s", task_id, error)
        except (InvalidArgumentError, PermissionDeniedError) as error:
            log.warning("task %s: the server refused the result: %s", task_id, error)
            await self.fail(task_id, TaskFailure(f"the server refused it: {error}"))
        except _LostError as error:
            log.error("task %s: %s", task_id, error)
            lost = error
        except DataLossError as error:
            await self.fail(task_id, TaskFailure(f"the server cannot use it: {error}"))
        state = run.state if run and adopt else None
        # Whatever the disk says: the next task would start from the state before this one's.
        await self._write(task_id, partial(self._spool.settle, task_id, state), troubles)
        if run:
            run.enter("idle")
        if lost:
            raise lost

    async def _try(self, entry: SpooledResult, troubles: Troubles) -> None:
        """Send a result once.

        Raises:
            _LostError: it cannot be read, nor will be.
            DataLossError: it is whole here, so it is the server's loss.
        """
        try:
            with explaining_shortage():
                await self._send(entry)
        except (DataLossError, OSError) as error:
            if not await self._is_whole(entry, troubles):
                raise _LostError(f"its result is lost and made again: {error}") from error
            if isinstance(error, OSError):
                raise UnavailableError(f"its result could not be read: {error}") from error
            raise

    async def _is_whole(self, entry: SpooledResult, troubles: Troubles) -> bool:
        try:
            return await self._read(entry.task_id, partial(self._spool.is_whole, entry), troubles)
        except DataLossError:
            return False

    async def _read(self, task_id: TaskId, read: Callable[[], T], troubles: Troubles) -> T:
        """Read something of the spool.

        Raises:
            DataLossError: again and again it could not be read.
        """
        tries = 0

        async def step() -> T:
            nonlocal tries
            try:
                with explaining_shortage():
                    return await in_thread(read)
            except (DataLossError, OSError) as error:
                tries += 1
                kind = UnavailableError if tries < READ_TRIES else DataLossError
                raise kind(str(error)) from error

        return await self.persist(f"read {task_id}", step, troubles)

    async def _write(self, task_id: TaskId, write: Callable[[], None], troubles: Troubles) -> None:
        """Change the spool, whatever the disk says before."""

        async def step() -> None:
            try:
                await in_thread(write)
            except NotFoundError:
                pass  # done by the try before, or the run has ended
            except OSError as error:
                raise UnavailableError(f"the spool cannot be written: {error}") from error

        await self.persist(f"settle {task_id}", step, troubles)

    async def _send(self, entry: SpooledResult) -> None:
        task_id = str(entry.task_id)
        if entry.blob:
            blob, path = entry.blob, self._spool.file(entry.task_id)
            try:
                await self._session.transfer(
                    lambda channel, token: send_blob(channel, path, blob, task_id, token=token)
                )
                self._counters.add("sent_bytes", amount=blob.size)
            except (FailedPreconditionError, NotFoundError) as error:
                # The task may be settled by this very result, its acknowledgement lost.
                log.debug("upload for %s: %s", task_id, error)
        request = pb.SubmitResultRequest(
            task_id=task_id,
            result=pb.TaskOutcome(
                blob=pb.Blob(digest=entry.blob.digest, size=entry.blob.size)
                if entry.blob
                else None,
                examples=entry.examples,
                metrics=entry.metrics,
                received=entry.received,
                received_examples=entry.received_examples,
                trained_from=entry.trained_from,
            ),
        )
        try:
            await self._session.training("SubmitResult", request)
        except FailedPreconditionError as error:
            if error.rule == "upload_first":
                raise ResourceExhaustedError("the server has lost the uploaded bytes") from None
            raise

    async def fail(self, task_id: TaskId, failure: TaskFailure) -> None:
        """Report that a task has failed, until the server has heard it."""
        self.begun.add(str(task_id))
        self._counters.add("tasks_failed")
        request = pb.SubmitResultRequest(
            task_id=str(task_id),
            failure=pb.TaskFailure(error=failure.error, traceback=failure.traceback),
        )
        try:
            await self.persist(
                f"report failure of {task_id}",
                lambda: self._session.training("SubmitResult", request),
                Troubles(),
            )
        except FLError as error:
            log.info("failure of %s: %s", task_id, error)
