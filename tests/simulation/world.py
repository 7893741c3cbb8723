"""Virtual time, one random number generator, and processes that can be killed or frozen."""

import asyncio
import contextvars
import heapq
import logging
import random
import traceback
from asyncio import events
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

PROCESS: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


class Killed(BaseException):
    """Unwinds what a process that has just been killed was about to do; it does nothing more."""


class Violation(AssertionError):
    """Something that must hold does not."""


class Process:
    """One incarnation of a program on a host: its tasks run until it is killed.

    Attributes:
        dead: nothing of it runs any more.
        frozen: stopped like by SIGSTOP; what is due waits in `backlog`.
        steps: kill it after so many more steps of its event loop; 0 for never.
        touches: kill it at the so many-th next touch of its disk; 0 for never.
    """

    def __init__(self, name: str, loop: "VirtualLoop") -> None:
        self.name = name
        self._loop = loop
        self.dead = self.frozen = False
        self.backlog: list[Any] = []
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


class _Gate:
    """What stands between a callback and its process."""

    __slots__ = ()

    def _run(self: Any) -> None:
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
        with suppress(Killed):
            super()._run()  # type: ignore[misc]


class _Handle(_Gate, events.Handle):
    __slots__ = ()


class _Timer(_Gate, events.TimerHandle):
    __slots__ = ()


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose selector never waits: time jumps to the next timer.

    `asyncio.to_thread` and executors do their work on the loop, a little later.

    Args:
        rng: draws how much later.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now = 0.0
        self.rng = rng
        self.tasks: list[asyncio.Task[Any]] = []
        self._selector = self
        self._clock_resolution = 1e-6
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda _loop, _context: None)
        self.busy = 0

    def time(self) -> float:
        """Return virtual seconds."""
        return self.now

    def select(self, timeout: float | None) -> list[Any]:
        """Let time pass."""
        if timeout is None:
            raise RuntimeError("nothing will ever happen again")
        self.busy = 0 if timeout > 0 else self.busy + 1
        if self.busy > 20_000:
            raise Violation("the program turns in a circle without time passing")
        self.now += max(0.0, timeout)
        return []

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        pass

    def _make_task(
        self, _loop: Any, work: Any, context: contextvars.Context | None = None
    ) -> "asyncio.Task[Any]":
        task = asyncio.Task(work, loop=self, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.tasks.append(task)
        return task

    def _call_soon(self, callback: Any, args: Any, context: Any) -> Any:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """Call back at a virtual time."""
        timer: Any = _Timer(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True
        return timer

    def requeue(self, handles: list[Any]) -> None:
        """Have handles run after all."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

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
            coroutine = task.get_coro()
            with suppress(BaseException):
                coroutine.close()
        self.tasks.clear()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
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
        counts: what happened, by kind.
        told: the story, line by line, if it is wanted.
    """

    def __init__(self, seed: int, tell: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(f"{seed}/world")  # noqa: S311
        random.seed(seed)  # the programs draw their back-off from the module's own
        self.loop = VirtualLoop(self.rng)
        self.counts: Counter[str] = Counter()
        self._tell = tell
        self.told: list[str] = []

    def note(self, who: str, what: str) -> None:
        """Add a line to the story."""
        if self._tell:
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
