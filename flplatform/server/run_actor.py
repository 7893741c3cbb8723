"""One run at work: a mailbox, one decider, and the hands that carry out its instructions.

Drain the mailbox, decide each input on the provisional state, append all events in one
transaction; only then evolve, answer, act. Instructions are reconciled with what is already in
hand, so that carrying them out twice, or again after a restart, changes nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
)
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from flplatform.algorithms.workflows import RunState, decide, evolve, pending, replay
from flplatform.core import events as ev
from flplatform.core.errors import (
    DataLossError,
    FLError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import Task
from flplatform.core.model import Manifest
from flplatform.core.ports import Row, StateStore
from flplatform.core.workflow import (
    Aggregate,
    Aggregated,
    AnswerArrived,
    Deploy,
    Input,
    InstructionFailed,
    Offer,
    ResultArrived,
    Roster,
    RosterChanged,
    TimerFired,
    Wake,
)
from flplatform.files.shortage import explaining_shortage
from flplatform.server.relay import Reply

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Pause before an instruction that failed for want of space is tried again."""
LOST_RETRY_S = 15.0
"""The same where a file is lost or damaged: it is read whole each time."""

CATCH_UP_S = 5.0
"""What a timer waits at least after a standstill: first comes what sites have sent meanwhile."""


DEPLOY = "deploy/"
"""How the names of jobs begin that carry a signed start."""

APPEND = "append"
"""Name of the trouble that nothing can be stored."""

ROSTER = "roster"
"""Name of the job that takes in who is there."""


def utc_now() -> str:
    """Return the time in UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Hands(Protocol):
    """What a run needs done by the server around it."""

    def roster(self) -> Roster:
        """Return the sites as they are now."""

    def stood_still_s(self) -> float:
        """Return for how long this server has stood still since its start, in all."""

    def deploy(self, item: Deploy, opened: ev.RunOpened) -> "asyncio.Future[Reply]":
        """Carry a signed start to its site; the future resolves with the site's answer."""

    def make(
        self, closed: ev.RoundClosed, codec_down: str
    ) -> AbstractAsyncContextManager[Aggregated]:
        """Compute and store what a closed round comes to; the context keeps it."""

    def hold(self, *digests: str) -> AbstractContextManager[None]:
        """Keep blobs that no log names yet."""

    def tasks_changed(self, sites: set[str]) -> None:
        """Tell waiting sites that their open tasks have changed."""

    def appended(self, actor: "RunActor", events: Sequence[ev.Event]) -> None:
        """Hear of durable events, in order."""


@dataclass(slots=True)
class _Letter:
    given: Input
    answer: "asyncio.Future[tuple[ev.Event, ...]]"


class RunActor:
    """The one decider of a run.

    Args:
        rows: the run's stream as stored, RunOpened first.
        manifest: the tensors of the run's model.
    """

    def __init__(
        self, rows: Sequence[Row], manifest: Manifest, store: StateStore, hands: Hands
    ) -> None:
        self.events = [
            ev.decode(row.type, row.version, row.body, f"{row.stream}#{row.seq}") for row in rows
        ]
        self.times = [row.time for row in rows]
        self.state: RunState = replay(self.events)
        self.manifest = manifest
        self.tasks: dict[str, dict[str, Task]] = {}
        self._store = store
        self._hands = hands
        self._mailbox: asyncio.Queue[_Letter] = asyncio.Queue(maxsize=10_000)
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.wakes_at: dict[str, float] = {}
        self.troubles: dict[str, tuple[str, str, str]] = {}
        """What waits for space → since when (UTC), and the error."""
        self._loop_task: asyncio.Task[None] | None = None
        self._deciding: Sequence[_Letter] = ()
        self._stopped = False
        self._reconsider = False

    @property
    def run(self) -> int:
        """The run's number."""
        return self.state.run

    def start(self) -> None:
        """Begin to decide, and carry out what is pending."""
        self._loop_task = asyncio.create_task(self._loop(), name=f"run {self.run}")
        self._perform()

    async def stop(self) -> None:
        """Stop deciding; nothing is lost, the log has it all. Who waits is told to try again."""
        self._stopped = True
        tasks = [*self._jobs.values(), *([self._loop_task] if self._loop_task else [])]
        for timer in self._timers.values():
            timer.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._dismiss(self._deciding)

    def _dismiss(self, letters: Sequence[_Letter] = ()) -> None:
        """Answer `letters` and the mailbox: nobody decides here any more."""
        waiting = list(letters)
        while not self._mailbox.empty():
            waiting.append(self._mailbox.get_nowait())
        for letter in waiting:
            _fail(letter, UnavailableError(f"run {self.run} is not at work", hint="try again"))

    async def tell(self, given: Input) -> tuple[ev.Event, ...]:
        """Have an input decided; return its events once they are durable.

        Raises:
            FLError: the input is refused, and the state unchanged.
        """
        answer: asyncio.Future[tuple[ev.Event, ...]] = asyncio.get_running_loop().create_future()
        with ExitStack() as leaving:
            leaving.callback(answer.cancel)
            held = leaving.enter_context(ExitStack())
            held.enter_context(self._hands.hold(*_named(given)))
            await self._mailbox.put(_Letter(given, answer))
            leaving.pop_all()
        # Until it is in the log or refused, also if the caller leaves meanwhile.
        answer.add_done_callback(lambda _: held.close())
        if self._stopped:
            self._dismiss()
        return await asyncio.shield(answer)

    def reconsider(self) -> None:
        """Decide again, with the sites as they are now; on a full disk, again and again."""
        self._reconsider = True
        self._begin(ROSTER, self._decide_anew)

    async def _decide_anew(self) -> None:
        self._reconsider = False
        await self._report(RosterChanged())
        self.troubles.pop(APPEND, None)  # also where nothing is to be stored any more

    async def _loop(self) -> None:
        while True:
            letters = [await self._mailbox.get()]
            while not self._mailbox.empty():
                letters.append(self._mailbox.get_nowait())
            self._deciding = letters
            try:
                await self._decide_all(letters)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.exception("run %d: a decision failed", self.run)
                for letter in letters:
                    _fail(letter, error)

    async def _decide_all(self, letters: Sequence[_Letter]) -> None:
        state = self.state
        decided: list[tuple[_Letter, tuple[ev.Event, ...]]] = []
        rows: list[Row] = []
        refused: list[tuple[_Letter, Exception]] = []
        for letter in letters:
            try:
                events = decide(state, letter.given, self._hands.roster())
            except FLError as error:
                refused.append((letter, error))
                continue
            except Exception as error:  # noqa: BLE001 - a defect met by one input stays its own
                log.error("run %d: %s failed", self.run, letter.given, exc_info=error)
                refused.append((letter, error))
                continue
            for event in events:
                state = evolve(state, event)
                seq = len(self.events) + len(rows) + 1
                rows.append(Row(ev.run_stream(self.run), seq, utc_now(), *ev.encode(event)))
            decided.append((letter, events))
        if rows:
            try:
                await asyncio.wrap_future(self._store.append(rows))
            except ResourceExhaustedError as error:
                level = logging.DEBUG if APPEND in self.troubles else logging.ERROR
                log.log(level, "run %d: nothing can be stored: %s", self.run, error)
                self._note_trouble(APPEND, error)
                for letter in letters:  # also who was refused for what has not come about
                    _fail(letter, error)
                return
            self.troubles.pop(APPEND, None)
        self.state = state
        new = [event for _, events in decided for event in events]
        self.events.extend(new)
        self.times.extend(row.time for row in rows)
        for letter, events in decided:
            if not letter.answer.done():
                letter.answer.set_result(events)
        for letter, refusal in refused:
            _fail(letter, refusal)
        if new:
            self._perform()
            self._hands.appended(self, new)

    def _perform(self) -> None:
        """Bring what is in hand into line with what the state asks for."""
        wanted = pending(self.state)
        self._offer({item.task for item in wanted if isinstance(item, Offer)})
        wakes = {item.id: item for item in wanted if isinstance(item, Wake)}
        for timer_id in self._timers.keys() - wakes.keys():
            self._timers.pop(timer_id).cancel()
            self.wakes_at.pop(timer_id, None)
        for wake in wakes.values():
            if wake.id not in self._timers:
                self._arm(wake)
        deploys = {_deploy_key(item): item for item in wanted if isinstance(item, Deploy)}
        for key, job in self._jobs.items():
            if key.startswith(DEPLOY) and key not in deploys:
                job.cancel()  # its site has answered, was withdrawn or is asked anew
        for key, deploy in deploys.items():
            self._begin(key, partial(self._deploy, deploy))
        for item in wanted:
            if isinstance(item, Aggregate):
                self._begin(item.id, partial(self._aggregate, item))
        if self.state.ended:
            for job in self._jobs.values():
                job.cancel()

    def _offer(self, tasks: set[Task]) -> None:
        wanted: dict[str, dict[str, Task]] = {}
        for task in sorted(tasks, key=lambda task: task.id):
            wanted.setdefault(task.id.site, {})[str(task.id)] = task
        sites = wanted.keys() | self.tasks.keys()
        changed = {site for site in sites if wanted.get(site) != self.tasks.get(site)}
        self.tasks = wanted
        if self.state.ended:
            changed |= self.state.deployed
        if changed:
            self._hands.tasks_changed(changed)

    def _arm(self, wake: Wake) -> None:
        """Set a timer; what the server stands still meanwhile is added to it."""
        loop = asyncio.get_running_loop()
        still_s = self._hands.stood_still_s()

        def fire() -> None:
            nonlocal still_s
            more_s = self._hands.stood_still_s() - still_s
            if more_s:
                still_s += more_s
                wait(max(self.wakes_at[wake.id] + more_s - loop.time(), CATCH_UP_S))
                return
            self._timers.pop(wake.id, None)
            self.wakes_at.pop(wake.id, None)
            self._begin(f"fire/{wake.id}", partial(self._report, TimerFired(wake.id)))

        def wait(seconds: float) -> None:
            self.wakes_at[wake.id] = loop.time() + seconds
            self._timers[wake.id] = loop.call_later(seconds, fire)

        wait(wake.after_s)

    def _begin(self, key: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a job unless one of that name is at work."""
        if key in self._jobs:
            return

        task = asyncio.create_task(work(), name=f"run {self.run} {key}")
        self._jobs[key] = task

        def done(ended: asyncio.Task[None]) -> None:
            del self._jobs[key]
            if not ended.cancelled() and (error := ended.exception()):
                log.error("run %d: %s failed", self.run, key, exc_info=error)
            if ended.cancelled() and key.startswith(DEPLOY) and not self._stopped:
                self._perform()  # the same may be wanted again by now
            if key == ROSTER and self._reconsider and not self._stopped:
                self.reconsider()  # a site came or went while that was decided

        task.add_done_callback(done)

    async def _report(self, given: Input) -> None:
        """Tell the run something it must learn; on a full disk, again and again."""
        while True:
            try:
                await self.tell(given)
            except ResourceExhaustedError:
                await asyncio.sleep(RETRY_S)
            else:
                break
        if isinstance(given, TimerFired):
            self._perform()  # re-arms a timer that changed nothing

    async def _deploy(self, item: Deploy) -> None:
        reply = await self._hands.deploy(item, self.state.opened)
        await self._report(
            AnswerArrived(
                site=item.site,
                accepted=reply.status == "ok",
                rule=reply.rule,
                reason=reply.message,
                isolation=str(reply.body.get("isolation", ""))[:20],
                order=item.order,
            )
        )

    async def _aggregate(self, item: Aggregate) -> None:
        async with AsyncExitStack() as kept:
            await self._report(await self._made(item, kept))

    async def _made(self, item: Aggregate, kept: AsyncExitStack) -> Aggregated | InstructionFailed:
        """Aggregate, again and again if what prevents it may pass, or be mended by an operator."""
        while True:
            try:
                with explaining_shortage():
                    made = self._hands.make(item.closed, self.state.job.codec_down)
                    found = await kept.enter_async_context(made)
            except (ResourceExhaustedError, UnavailableError, OSError, MemoryError) as error:
                log.error("run %d: %s waits: %r", self.run, item.id, error)
                self._note_trouble(item.id, error)
                await asyncio.sleep(RETRY_S)
            except DataLossError as error:
                log.error("run %d: %s waits until it is mended: %s", self.run, item.id, error)
                self._note_trouble(item.id, error, "blob_lost")
                await asyncio.sleep(LOST_RETRY_S)
            except FLError as error:
                return InstructionFailed(item.id, f"aggregation: {error}")
            except Exception as error:
                log.exception("run %d: %s failed", self.run, item.id)
                return InstructionFailed(item.id, f"aggregation: {type(error).__name__}: {error}")
            else:
                self.troubles.pop(item.id, None)
                return found

    def _note_trouble(self, what: str, error: Exception, cause: str = "disk_full") -> None:
        since, *_ = self.troubles.get(what, (utc_now(),))
        self.troubles[what] = since, str(error) or type(error).__name__, cause


def _fail(letter: _Letter, error: Exception) -> None:
    if not letter.answer.done():
        letter.answer.set_exception(error)
        letter.answer.exception()  # who asked may have left: nobody need look at it


def _named(given: Input) -> list[str]:
    """Return the digests of the blobs that an input brings."""
    match given:
        case ResultArrived():
            brought = [given.result.blob]
        case Aggregated():
            brought = [given.model, given.state, given.wire]
        case _:
            return []
    return [blob.digest for blob in brought if blob]


def _deploy_key(item: Deploy) -> str:
    return f"{DEPLOY}{item.site}/{hash(item.order)}"
