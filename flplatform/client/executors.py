"""Runs a job's code in a process of its own: the parent's side.

A `RunProcess` starts one process tree, gives it one task at a time and brings each result to a
folder that only the parent writes. In the tree the job's code runs in one process, or in several
that work on each task together, see `client.ranks`. Below its own folder:

    lib/flplatform      a link to this package: all that the run process takes from this one
    inbox/, box/        what it shares with the job's code, see `client.box`

Nothing that the process says or leaves behind is trusted: frames are parsed strictly and bounded,
files are copied without following links. What a task takes of the code (validating the received
model, training, validating the trained one) is looked after by `client.run_process`.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import flplatform
from flplatform.client import process_tree, ranks
from flplatform.client.box import MODEL_FILE, Box, remove
from flplatform.client.conversation import Conversation
from flplatform.client.frames import RESULT_FILE, SECRET, SOCKET, UPDATE_FILE, Order, Start
from flplatform.client.process_tree import ProcessTree
from flplatform.client.replies import Failure
from flplatform.client.run_log import RunLog
from flplatform.client.run_spec import JobCodeError, Outcome, RunProcessCrashed, RunSpec
from flplatform.client.sandbox import (
    NONE,
    Level,
    Mounts,
    available_level,
    command,
    environment,
    interpreter_folders,
    make_scratch,
    seen_at,
)
from flplatform.client.state import USER_STATE, LocalScore, collect, current_state, submit
from flplatform.core.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from flplatform.core.messages import SUBMIT_MODEL, TRAIN, Task, TaskFailure
from flplatform.core.model import MAX_HEADER_BYTES
from flplatform.files.durable import private_dir, write_atomic
from flplatform.files.scratch import Scratch
from flplatform.files.threads import in_thread

log = logging.getLogger(__name__)

__all__ = ["JobCodeError", "Outcome", "RunProcess", "RunProcessCrashed", "RunSpec"]

T = TypeVar("T")
START_TIMEOUT_S = 600.0
"""For the imports of the job's code, which on a cold disk take minutes with some frameworks."""
END_TIMEOUT_S = 2.0
"""For what is left to read of a process that has ended, or the end of one that has hung up."""


class RunProcess:
    """One process tree that runs a job's code, from `start` to `abort` or `close`.

    Not thread-safe: everything happens on the event loop that called `start`.

    Args:
        spec: what to run.
        on_phase: hears what the process is doing: validate_received, train, validate_trained,
            validate, submit_model.
        on_metric: hears name, value and step of what the code logs.

    Attributes:
        mark: names the process tree on this host.
        spent: one of several processes has failed a task; that has ended them all, because the
            others may have waited for it. The next task needs a new object.
    """

    def __init__(
        self,
        spec: RunSpec,
        on_phase: Callable[[str], None] = lambda _: None,
        on_metric: Callable[[str, float, int | None], None] = lambda *_: None,
    ) -> None:
        self._spec = spec
        self._on_phase = on_phase
        self._on_metric = on_metric
        self._folder = spec.folder.resolve()
        digest = hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]
        self.mark = f"{spec.site}/{spec.run}/{digest}"
        self.spent = False
        self._conversation: Conversation | None = None
        self._end: asyncio.Task[RunProcessCrashed] | None = None
        self._busy = False
        self._why = ""
        self._resources = contextlib.ExitStack()
        self._scratch: Scratch | None = None

    async def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start the process and wait until the job's code is loaded; once per object.

        What a predecessor in the same folder has left running is killed first. After an error
        nothing runs.

        Raises:
            FailedPreconditionError: this host has no such isolation, or several processes are
                asked for and the environment has no torch.
            JobCodeError: the code raised while it was loaded.
            RunProcessCrashed: the process ended.
            DeadlineExceededError: the code was not loaded in time.
            OSError: a folder cannot be written, or no process can be started.
        """
        try:
            level = await self._level()
            await in_thread(self._prepare)
            conversation = await self._spawn(level)
            async with asyncio.timeout(timeout_s):
                failure = await self._until(conversation.ready)
            if failure is not None:
                raise JobCodeError(failure)
        except BaseException as error:
            await _to_its_end(self.abort(0))
            if isinstance(error, TimeoutError):
                message = f"the job's code was not loaded within {timeout_s:g} s"
                raise DeadlineExceededError(message) from None
            raise

    async def execute(self, task: Task, model: Path | None, work: Path) -> Outcome | TaskFailure:
        """Have the job's code do a task.

        If this call is cancelled, the process is left at work and must be aborted.

        Args:
            task: what to do.
            model: the file of the task's model, if it has one.
            work: where the result goes, made anew. Model and state in it are copies that the
                job's code cannot reach.

        Raises:
            FailedPreconditionError: not started, or another task is at work.
            RunProcessCrashed: the process ended before it answered.
            OSError: the disk is full, or a file cannot be read.
        """
        if self._end is None or self._conversation is None or self._busy:
            raise FailedPreconditionError("the run process is not waiting for a task")
        if self._end.done():
            raise self._end.result()
        self._busy = True
        try:
            self._log.note(f"task {task.id}")
            if task.id.kind == SUBMIT_MODEL:
                self._on_phase(SUBMIT_MODEL)
                outcome = await in_thread(self._submit, work)
            else:
                outcome = await self._perform(self._conversation, task, model, work)
        except Exception:
            self._busy = False
            raise
        self._busy = False
        if isinstance(outcome, TaskFailure):
            self._log.note(f"task {task.id} failed: {outcome.error}")
        return outcome

    async def abort(self, grace_s: float = 8.0) -> None:
        """End the process and everything that it started; idempotent.

        SIGTERM to each process that runs the job's code; if it is not gone after `grace_s`
        seconds, SIGKILL to the whole tree: with the default nothing is left after ten seconds.
        A waiting `execute` raises RunProcessCrashed.

        Without descriptors or threads it does what it can, and returns when it has them again and
        has seen that nothing is left. Only the temporary folder may stay, see `sweep_scratch`.
        """
        self._why = self._why or "was ended"
        if self._end is None:  # it may run all the same, if it could not be looked after
            await process_tree.end(self.mark)
            await self._release()
            return
        if grace_s > 0 and not self._end.done():
            self._terminate()
            await asyncio.wait({self._end}, timeout=grace_s)
        if not self._end.done():
            await self._tree.kill()
        await asyncio.wait({self._end})

    async def close(self, grace_s: float = 5.0) -> None:
        """Let the job's code end by itself (`receive()` returns None), then abort it."""
        if self._end is not None and not self._end.done():
            self._why = "was closed"
            if self._conversation is not None:
                self._conversation.stop()
            await asyncio.wait({self._end}, timeout=grace_s)
        await self.abort(0)

    # ---- starting ----

    @property
    def _python(self) -> str:
        return self._spec.environment.python or sys.executable

    async def _level(self) -> Level:
        if self._spec.isolation == "none":
            return NONE
        level = await in_thread(available_level)
        if level.name != self._spec.isolation:
            raise FailedPreconditionError(f"no isolation here: {level.reason}")
        return level

    def _prepare(self) -> None:
        process_tree.kill(self.mark)
        if self._spec.processes > 1:
            ranks.demand_torch(self._python, self._spec.environment_name)
        library = private_dir(self._folder / "lib") / "flplatform"
        library.unlink(missing_ok=True)
        library.symlink_to(_package())
        self._box = Box(self._folder)
        self._box.clear()
        self._scratch = make_scratch(self._spec.kit, self._spec.run)
        self._log = RunLog(self._spec.log, on_lines=self._spec.on_lines)
        self._resources.callback(self._log.close)

    async def _spawn(self, level: Level) -> Conversation:
        spec = self._spec
        python = self._python
        assert self._scratch is not None
        outside, library = self._scratch.folder, self._folder / "lib"
        scratch = str(seen_at(level, outside))
        shown = (library, _package(), spec.code, self._box.inbox, *interpreter_folders(python))
        mounts = Mounts(
            scratch=outside,
            read_only=(*shown, *spec.data.values()),
            writable=(self._box.box,),
            hidden=(spec.kit, self._folder, spec.state, *spec.hidden),
        )
        argv = [python, "-P", "-m", "flplatform.client.run_process", scratch]
        variables = environment(spec.environment, scratch, library)
        if spec.processes > 1:
            argv = ranks.torchrun(python, spec.processes, argv)
            variables |= ranks.variables(spec.processes)
        secret, note = secrets.token_hex(16), self._log.note
        write_atomic(outside / SECRET, secret.encode())
        conversation = Conversation(
            self._start_frame(), secret, self._on_phase, self._on_metric, note
        )
        self._resources.callback(conversation.close)
        await conversation.listen(outside / SOCKET, outside / SECRET)
        what = f"{spec.processes} processes start" if spec.processes > 1 else "process starts"
        note(f"{what}, isolation {level.name}")
        self._tree = await ProcessTree.start(
            command(level, mounts, argv),
            environment=variables,
            folder=outside,
            mark=self.mark,
            on_output=self._log.feed,
        )
        self._conversation = conversation
        self._end = asyncio.create_task(self._supervise(conversation))
        return conversation

    async def _supervise(self, conversation: Conversation) -> RunProcessCrashed:
        """Wait for the end of the process and of what it said; return why it ended."""
        ended = asyncio.create_task(self._tree.wait())
        either: tuple[asyncio.Future[Any], ...] = ended, conversation.over
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            # It has hung up, so it ends now or it is made to.
            await asyncio.wait({ended}, timeout=0 if conversation.fault else END_TIMEOUT_S)
            if not ended.done():
                await self._tree.kill()
        status = await ended
        if conversation.begun:
            await asyncio.wait({conversation.over}, timeout=END_TIMEOUT_S)
        why = f"the run process {conversation.fault or self._why or _describe(status)}"
        if conversation.lost and not self._why:
            why += f"; {conversation.lost} went first"
        tail = self._log.tail
        if not conversation.begun and tail:
            why += f" before it began: {tail.splitlines()[-1]:.300}"
        self._log.note(why)
        await self._release()
        return RunProcessCrashed(why, tail)

    async def _release(self) -> None:
        """Give up what the process was given; no process of the tree is left."""
        with contextlib.suppress(OSError):
            self._resources.close()
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            try:
                await in_thread(scratch.close)
            except OSError as error:
                log.warning("%s stays for now: %s", scratch.folder, error)
            except ResourceExhaustedError as error:  # no thread has begun it
                os.close(scratch.lock)
                log.warning("%s stays for now: %s", scratch.folder, error)

    def _start_frame(self) -> Start:
        spec = self._spec
        return Start(
            run=spec.run,
            site=spec.site,
            code=str(spec.code.resolve()),
            box=str(self._box.box),
            module=spec.executor.module,
            script=spec.executor.script,
            args=dict(spec.args),
            data={name: str(path.resolve()) for name, path in spec.data.items()},
            watch_metric=spec.watch.metric if spec.watch else "",
            watch_mode=spec.watch.mode if spec.watch else "",
            memory_limit_bytes=spec.environment.memory_limit_bytes,
            world_size=spec.processes,
            delta=spec.delta,
            partial=spec.partial,
        )

    async def _until(self, future: "asyncio.Future[T]") -> T:
        """Wait for what the process will say, or for its end.

        Raises:
            RunProcessCrashed: its end came first.
        """
        assert self._end is not None
        either: tuple[asyncio.Future[Any], ...] = future, self._end
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        raise self._end.result()

    async def _perform(
        self, conversation: Conversation, task: Task, model: Path | None, work: Path
    ) -> Outcome | TaskFailure:
        """Have the process do a task, and collect what it leaves."""
        spec = self._spec
        current = current_state(spec.state)
        user = current / USER_STATE if current else None
        try:
            await in_thread(self._box.prepare, model, user, spec.max_state_bytes)
        except ResourceExhaustedError as error:
            return TaskFailure(f"the run's state cannot be given to the job's code: {error}")
        path = str(self._box.inbox / MODEL_FILE) if model else None
        reply = await self._until(conversation.order(Order(str(task.id), task.seed, path)))
        if isinstance(reply, Failure):
            if spec.processes > 1:
                await self._retire()
            return TaskFailure(reply.error, reply.traceback)
        try:
            if (task.id.kind == TRAIN) != (reply.file is not None):
                raise InvalidArgumentError("a model came that should not, or did not")
            await in_thread(_make_empty, work)
            if model is not None and reply.file is not None:
                score = LocalScore(
                    round=task.id.round, metrics=reply.local, examples=reply.local_examples
                )
                # The file of the same tensors: only its header may be written otherwise.
                limits = model.stat().st_size + MAX_HEADER_BYTES, spec.max_state_bytes
                await in_thread(collect, self._box, work, current, spec.watch, score, *limits)
                if spec.delta or spec.partial:
                    update = work / UPDATE_FILE
                    collect_model = self._box.collect_model
                    await in_thread(collect_model, update, limits[0], UPDATE_FILE)
        except (InvalidArgumentError, ResourceExhaustedError) as error:
            return TaskFailure(f"what the job's code left cannot be taken: {error}")
        return Outcome(
            file=reply.file,
            examples=reply.examples,
            metrics=reply.metrics,
            received=reply.received,
            received_examples=reply.received_examples,
            update=UPDATE_FILE if reply.file and (spec.delta or spec.partial) else None,
            delta=spec.delta and reply.file is not None,
        )

    async def _retire(self) -> None:
        """End all processes: after one has failed, another may wait for it for ever."""
        assert self._end is not None
        self.spent, self._why = True, "was ended because a rank had failed its task"
        await self._tree.kill()
        await asyncio.wait({self._end})

    def _submit(self, work: Path) -> Outcome | TaskFailure:
        """Bring the best local model; the job's code has no part in it."""
        _make_empty(work)
        score = submit(current_state(self._spec.state), work)
        if score is None:
            return TaskFailure(
                "no local model yet: this site has finished no training task of the run"
            )
        return Outcome(RESULT_FILE, score.examples, score.metrics, {}, 0)

    def _terminate(self) -> None:
        """Ask each process that runs the job's code to end, or the launcher if there is none."""
        peers = self._conversation.peers.values() if self._conversation else ()
        processes = [process for process in peers if process is not None]
        for process in processes:
            process_tree.ask_to_end(process)
        if not processes:
            with contextlib.suppress(OSError):
                self._tree.terminate()


def _package() -> Path:
    return Path(flplatform.__file__).resolve().parent


def _make_empty(work: Path) -> None:
    remove(work)
    private_dir(work)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work`, however often the caller is cancelled; then he is."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


def _describe(status: int) -> str:
    number = -status if status < 0 else status - 128
    if number in {item.value for item in signal.Signals}:
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with exit status {status}"
