"""Virtual time, one random number generator, and processes that can be killed or frozen."""

import asyncio
import contextvars
import logging
import random
import traceback
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any

from flplatform.core.errors import FLError

PROCESS: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)

RESOLUTION_S = 1e-6
"""Timers so close together are due together."""


class Killed(BaseException):
    """Unwinds what a process that has just been killed was about to do; it does nothing more."""


class Violation(AssertionError):
    """Something that must hold does not."""


class Process:
    """One incarnation of a program on a host: its tasks run until it is killed.

    Attributes:
        dead: nothing of it runs any more.
        frozen: stopped like by SIGSTOP; what is due waits in `backlog`.
        waiting: what has been sent to it meanwhile.
        steps: kill it after so many more steps of its event loop; 0 for never.
        touches: kill it at the so many-th next touch of its disk; 0 for never.
    """

    def __init__(self, name: str, loop: "VirtualLoop") -> None:
        self.name = name
        self._loop = loop
        self.dead = self.frozen = False
        self.backlog: list[Any] = []
        self.waiting: list[Callable[[], None]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.steps = self.touches = 0
        self.died: Callable[[str], None] = lambda _: None
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function as this process."""
        return self._context.copy().run(function, *args)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Start a task of this process."""
        return self._loop.create_task(work, context=self._context.copy())

    def kill(self, why: str) -> None:
        """End it now: no handler, no `finally`, nothing."""
        if not self.dead:
            self.dead = True
            self.backlog.clear()
            self.died(why)

    def thaw(self) -> None:
        """Let it go on after having been frozen."""
        self.frozen = False
        backlog, self.backlog = self.backlog, []
        if not self.dead:
            self._loop.requeue(backlog)
        waiting, self.waiting = self.waiting, []
        for letter in waiting:
            self._loop.call_later(0.01, letter, context=contextvars.Context())

    def step(self) -> None:
        """Count a step of its event loop; it may be the last."""
        if self.steps:
            self.steps -= 1
            if not self.steps:
                self.kill("killed at a step")

    def touch(self) -> None:
        """Count a touch of its disk; it may be the last.

        Raises:
            Killed: it is dead.
        """
        if self.touches and not self.dead:
            self.touches -= 1
            if not self.touches:
                self.kill("killed at its disk")
        if self.dead:
            raise Killed


class _Handle:
    """A callback that waits; what stands between it and its process."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context", "_when")

    def __init__(self, callback: Any, args: Any, context: Any, when: float = 0.0) -> None:
        self._callback = callback
        self._args = args
        self._context = contextvars.copy_context() if context is None else context
        self._when = when
        self._cancelled = False

    def cancel(self) -> None:
        """Let it not happen."""
        self._cancelled = True

    def cancelled(self) -> bool:
        """Return whether it will not happen."""
        return self._cancelled

    def when(self) -> float:
        """Return the virtual time of a timer."""
        return self._when

    def run(self) -> None:
        """Call back, unless its process is dead or frozen."""
        process = self._context.get(PROCESS)
        if process is not None:
            if process.dead:
                return
            if process.frozen:
                process.backlog.append(self)
                return
            if process.steps:
                process.step()
                if process.dead:
                    return
        try:
            self._context.run(self._callback, *self._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:  # noqa: BLE001, S110 - Killed, or as a loop does without a handler
            pass


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that never waits: time jumps to the next timer; equal times in their order.

    `asyncio.to_thread` and executors do their work on the loop, a little later.

    Args:
        rng: draws how much later.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now = 0.0
        self.rng = rng
        self.tasks: list[asyncio.Task[Any]] = []
        self._handles: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._count = 0

    def time(self) -> float:
        """Return virtual seconds."""
        return self.now

    def _run_once(self) -> None:
        """Run until somebody stops it."""
        handles, timers, busy = self._handles, self._timers, 0
        while not self._stopping:  # type: ignore[attr-defined]
            busy += 1
            if not handles:
                while timers and timers[0][2]._cancelled:
                    heappop(timers)
                if not timers:
                    raise RuntimeError("nothing will ever happen again")
                if timers[0][0] > self.now:
                    self.now += timers[0][0] - self.now
                    busy = 0
            elif busy > 20_000:
                raise Violation("the program turns in a circle without time passing")
            due = self.now + RESOLUTION_S
            while timers and timers[0][0] < due:
                handles.append(heappop(timers)[2])
            for _ in range(len(handles)):
                handle = handles.popleft()
                if not handle._cancelled:
                    handle.run()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Take no notice of what nobody has retrieved: those who died left it."""

    def _write_to_self(self) -> None:
        pass

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        pass

    def create_task(
        self, work: Any, *, name: Any = None, context: contextvars.Context | None = None
    ) -> "asyncio.Task[Any]":
        """Start a task."""
        task = asyncio.Task(work, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.tasks.append(task)
        return task

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        """Call back next."""
        handle = _Handle(callback, args, context)
        self._handles.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """Call back at a virtual time."""
        handle = _Handle(callback, args, context, when)
        self._count += 1
        heappush(self._timers, (when, self._count, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """Call back after virtual seconds."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def requeue(self, handles: list[Any]) -> None:
        """Have handles run after all."""
        self._handles.extend(handles)

    def run_in_executor(  # type: ignore[override]
        self, _executor: Any, func: Any, *args: Any
    ) -> Any:
        """Do work "in a thread": whole, also if nobody waits for it any more."""
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - as an executor does
                if not future.done():
                    future.set_exception(error)
                    future.exception()
            else:
                if not future.done():
                    future.set_result(result)

        self.call_later(self.rng.random() * 0.01, work)
        return future

    def bury(self) -> None:
        """End everything at the end of a history, without a sound."""
        for task in self.tasks:
            if task.done():
                continue
            coroutine = task.get_coro()
            with suppress(BaseException):
                coroutine.close()
        self.tasks.clear()
        self._handles.clear()
        self._timers.clear()
        self.close()


class LoopExecutor(Executor):
    """Threads for those who want an executor: the loop, a little later."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Do `fn` later."""
        future: Future[Any] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except Exception as error:  # noqa: BLE001 - as an executor does
                    future.set_exception(error)

        self._loop.call_later(self._loop.rng.random() * 0.01, work)
        return future


class World:
    """What one history consists of besides the programs.

    Attributes:
        rng: every choice that the model makes while it runs.
        secrets: draws tokens and names of passing files.
        counts: what happened, by kind.
        absent: what a program has used of its machine that is not modelled.
        told: the story, line by line, if it is wanted.
    """

    def __init__(self, seed: int, tell: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(f"{seed}/world")  # noqa: S311
        self.secrets = random.Random(f"{seed}/secrets")  # noqa: S311
        random.seed(seed)  # the programs draw their back-off from the module's own
        self.loop = VirtualLoop(self.rng)
        self.counts: Counter[str] = Counter()
        self.absent: list[str] = []
        self.tells = tell
        self.told: list[str] = []

    def note(self, who: str, what: str) -> None:
        """Add a line to the story."""
        if self.tells:
            self.told.append(f"{self.loop.now:10.3f}  {who:<8} {what}")

    def count(self, what: str) -> None:
        """Count something that was injected or happened."""
        self.counts[what] += 1

    def process(self, name: str, died: Callable[[str], None]) -> Process:
        """Begin a process."""
        process = Process(name, self.loop)

        def ended(why: str) -> None:
            self.note(name, f"✝ {why}")
            died(why)

        process.died = ended
        return process


class StoryHandler(logging.Handler):
    """Puts what the programs log into the story."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.DEBUG)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        process = PROCESS.get()
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            error = record.exc_info[1]
            where = traceback.extract_tb(error.__traceback__)[-3:]
            places = " < ".join(f"{each.name}:{each.lineno}" for each in reversed(where))
            text += f" [{error!r} at {places}]"
        self._world.note(process.name if process else "-", f"  {text}")


class DefectHandler(logging.Handler):
    """Tells of every exception that a program logs and did not expect."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, FLError | OSError):
            self._tell(f"a defect: {record.getMessage()} [{error!r}]")
