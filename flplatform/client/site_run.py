"""One accepted run at its site: its process, and the tasks that it does one after the other."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from flplatform.client.box import Box, remove
from flplatform.client.executors import Outcome, RunProcess, RunProcessCrashed, RunSpec
from flplatform.client.policy import Plan
from flplatform.client.retrying import is_of_space, persist
from flplatform.client.run_log import Listener
from flplatform.client.troubles import Troubles
from flplatform.core.errors import (
    FailedPreconditionError,
    ResourceExhaustedError,
)
from flplatform.core.job import CODE_FOLDER
from flplatform.core.messages import TRAIN, Task, TaskFailure
from flplatform.core.strict import Strict
from flplatform.files.durable import private_dir
from flplatform.files.shortage import demand_room, explaining_shortage
from flplatform.files.threads import in_thread
from flplatform.security.kit import Kit
from flplatform.security.package import Package

log = logging.getLogger(__name__)

MAX_CRASHES = 3
"""A task whose process crashes so often has failed."""

PROCESS_FOLDER = "process"
"""Folder of the run process, below the run's."""

COPIES = 3
"""Models that training leaves on the disk for a while: the code's own, the parent's copy, and what
is made of it to be sent."""

SMALL_BYTES = 1 << 20
"""Room for everything else that a task leaves."""


class RunRecord(Strict):
    """`start.json`: what was accepted, and when."""

    run: int
    submission_id: str
    digest: str
    size: int
    order: str
    accepted: datetime


class SiteRun:
    """One accepted run and its run process.

    Args:
        folder: the run's own folder.
        plan: what the site's policy grants it.
    """

    def __init__(
        self,
        kit: Kit,
        folder: Path,
        record: RunRecord,
        package: Package,
        plan: Plan,
        on_metric: Callable[[int, int, str, float, int | None], None],
        on_lines: Listener = lambda *_: None,
    ) -> None:
        self._on_lines = on_lines
        self.record = record
        self.package = package
        self.plan = plan
        self.folder = folder
        self.round = 0
        self._kit = kit
        self._on_metric = on_metric
        self._phase = ("deployed", time.monotonic())
        self._process: RunProcess | None = None
        self._closed = False
        self.troubles = Troubles()
        self._room = 0  # bytes that a try before was short of
        self.turn = asyncio.Lock()
        """Held while a task is at work, and until a trained state is settled."""

    @property
    def run(self) -> int:
        """The run's number."""
        return self.record.run

    @property
    def state(self) -> Path:
        """Where the committed state of the run lies."""
        return self.folder / "state"

    def report(self) -> tuple[int, int, str, float, str]:
        """Return run, round, phase, seconds in it, and isolation level."""
        phase, since = self._phase
        if self.troubles.held_up:
            phase = f"{phase}, {self.troubles.held_up}"
        return self.run, self.round, phase, time.monotonic() - since, self.plan.isolation

    def enter(self, phase: str) -> None:
        """Note what the run is doing here."""
        if phase != self._phase[0]:
            self._phase = (phase, time.monotonic())

    async def execute(self, task: Task, model: Path | None, work: Path) -> Outcome | TaskFailure:
        """Have the run process do a task; start it again if it crashes, also while it starts.

        Raises:
            RunProcessCrashed: it crashed on this task again and again.
        """
        async with self.turn:
            self.round = task.id.round
            try:
                return await self._repeat(task, model, work)
            except asyncio.CancelledError:
                try:
                    await asyncio.shield(self.abort())
                except Exception:  # whatever it is: who was withdrawn has not failed
                    log.exception("run %d: its process may not have ended", self.run)
                raise

    async def _repeat(self, task: Task, model: Path | None, work: Path) -> Outcome | TaskFailure:
        for crashes in range(1, MAX_CRASHES + 1):
            try:
                found = await persist(
                    str(task.id),
                    lambda: self.troubles.watch(lambda: self._try(task, model, work)),
                    self._kit.site.backoff_max_s,
                )
                if isinstance(found, RunProcessCrashed):
                    raise found
                return found
            except RunProcessCrashed as error:
                log.warning("run %d: %s crashed (%d): %s", self.run, task.id, crashes, error)
                self.troubles.held_up = f"crashed {crashes} of {MAX_CRASHES}"
                last = _last_words(error.log_tail)
                self.troubles.note(f"{error}: {last}" if last else str(error))
                await self.abort()
                if crashes == MAX_CRASHES:
                    raise
        raise AssertionError("unreachable")

    async def _try(
        self, task: Task, model: Path | None, work: Path
    ) -> Outcome | TaskFailure | RunProcessCrashed:
        """Have the run process do a task, if the disk has room for what comes of it.

        Raises:
            ResourceExhaustedError: it has not, or this machine is short of something else. The
                process has ended: the next one starts from the state that is committed.
        """
        trained = COPIES * model.stat().st_size if model and task.id.kind == TRAIN else 0
        room = max(trained + SMALL_BYTES, self._room)
        result: Outcome | TaskFailure | RunProcessCrashed | None = None
        try:
            with explaining_shortage():
                await in_thread(self._clear, work)
                demand_room(self.folder, room)
                try:
                    process = await self._ready()
                    result = await process.execute(task, model, work)
                except RunProcessCrashed as error:
                    result = error
                if isinstance(result, TaskFailure | RunProcessCrashed):
                    demand_room(self.folder, room)  # or this may be what it came from
                self._room = 0
                return result
        except ResourceExhaustedError as error:
            await self.abort()
            with explaining_shortage():
                left = await in_thread(self._clear, work)
            if result is None:
                if is_of_space(error):  # for the code's, and the copy
                    self._room = max(self._room, 2 * left + SMALL_BYTES)
                raise
            demand_room(self.folder, room)
            return result  # it was the task's own leavings that took the room

    def _clear(self, work: Path) -> int:
        """Remove what tries before have left, in the box and beside it; return its bytes."""
        remove(work)
        return Box(self.folder / PROCESS_FOLDER).clear()

    async def warm_up(self) -> None:
        """Start the run process before its first task."""
        async with self.turn:
            await self._ready()

    async def _ready(self) -> RunProcess:
        if self._closed:
            raise FailedPreconditionError(f"run {self.run} has ended here", rule="run_ended")
        if self._process is not None and self._process.spent:
            await self.abort()
        if self._process is None:
            process = self._make_process()
            await process.start()
            self._process = process
        return self._process

    def _make_process(self) -> RunProcess:
        job = self.package.job
        spec = RunSpec(
            run=self.run,
            site=self._kit.identity.name,
            folder=self.folder / PROCESS_FOLDER,
            code=self.folder / CODE_FOLDER,
            kit=self._kit.folder,
            log=private_dir(self._kit.folder / "logs") / f"run-{self.run}.log",
            state=self.state,
            executor=job.executor,
            args=job.args,
            data=self.plan.data,
            watch=job.watch,
            environment=self.plan.environment,
            environment_name=job.environment,
            processes=self.plan.processes,
            isolation=self.plan.isolation,
            hidden=(self._kit.state_folder(),),
            delta=job.updates == "delta",
            partial=job.partial_updates,
            on_lines=self._on_lines,
        )
        return RunProcess(spec, on_phase=self.enter, on_metric=self._metric)

    def _metric(self, name: str, value: float, step: int | None) -> None:
        self._on_metric(self.run, self.round, name, value, step)

    async def close(self) -> None:
        """End the run process for good, also one that a kill of this site has left."""
        self._closed = True
        if self._process is None:
            self._process = self._make_process()
        await self.abort()

    async def abort(self) -> None:
        """End the run process and everything that it started."""
        process = self._process
        if process:
            await process.abort()  # may be cancelled: until it is through the process is known
            if self._process is process:
                self._process = None


def _last_words(text: str) -> str:
    """Return the last line that says something: torchrun ends its report with a bar."""
    lines = reversed(text.splitlines())
    return next((line for line in lines if any(map(str.isalnum, line))), "")
