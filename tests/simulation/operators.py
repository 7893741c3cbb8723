"""Operators: commands that are given once, and errands that are pursued until they are done."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    FLError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.events import FEDERATION, JobStaged, RunPrepared
from flplatform.core.validation import Wanted
from flplatform.core.workflow import Abort, AbortTasks, AddTargets, SetQuorum, Withdraw
from tests.simulation import models
from tests.simulation.faults import CHANGING, Fault
from tests.simulation.site import encoded, start_order

AGAIN_S = 12.0
"""An operator who has heard nothing for so long asks again."""

ME = "lead"

Step = Callable[[], Awaitable[Any]]


class Errand:
    """Steps one after the other, each tried until it is answered, whatever dies meanwhile.

    Args:
        history: whose operator pursues it.
        what: its name.
        steps: each may be carried out twice.
        anew: begin again after a refusal, until it is done; else a refusal ends it.
    """

    def __init__(self, history: Any, what: str, steps: Sequence[Step], anew: bool = False) -> None:
        self._history = history
        self._what = what
        self._steps = steps
        self._anew = anew
        self._at = 0
        self._rounds = 0
        history.errands.append(self)
        self._go(0, 0)

    @property
    def over(self) -> bool:
        """Whether it is done or given up."""
        return self._at == len(self._steps)

    def _go(self, at: int, rounds: int) -> None:
        """Try a step, unless the errand has gone on from there."""
        history = self._history
        if history.over or (self._at, self._rounds) != (at, rounds) or self.over:
            return
        server = history.server
        if server.up is not None:
            server.up.spawn(self._try(at, rounds))
        history.network.later(AGAIN_S if server.up else 2.0, self._go, at, rounds)

    async def _try(self, at: int, rounds: int) -> None:
        history = self._history
        answer, refused = f"{self._what}, step {at}: done", False
        following, pause = at + 1, history.world.rng.choice([0.0, 0.1, 2.0, 8.0])
        try:
            await self._steps[at]()
        except (UnavailableError, ResourceExhaustedError, OSError) as error:
            history.world.note("operator", f"{self._what}, step {at}: not yet: {error}")
            return
        except FLError as error:
            answer, refused = f"{self._what}, step {at}: refused: {error}", True
            following, pause = (0, 5.0) if self._anew else (len(self._steps), 0.0)
        except Exception as error:  # noqa: BLE001 - whatever it is, a command must not meet it
            history.watcher.object(f"{self._what}: {error!r}")
            return
        ended_it = not refused and following == len(self._steps)
        if (self._at, self._rounds) != (at, rounds) and not ended_it:
            return  # a try before was answered
        history.world.note("operator", answer)
        if following == len(self._steps):
            history.world.count("errand given up" if refused else "errand done")
        self._at, self._rounds = following, rounds + 1
        history.network.later(pause, self._go, self._at, self._rounds)


def _submission_id(fault: Fault) -> str:
    return f"{fault.number:016x}{int(fault.at * 1e6):016x}"


class Preparation:
    """The steps of one run, each as often as it takes.

    Args:
        history: whose operator takes them.
        name: what the job is staged as.
        package: the job's package.
    """

    def __init__(self, history: Any, name: str, package: bytes) -> None:
        self._history = history
        self._name = name
        self._package = package
        self._number = 0

    @property
    def _staging(self) -> Any:
        return self._history.server.control.staging

    async def stage(self) -> None:
        """Upload a package and its model, and keep them under a name."""
        digest = models.ref(self._package).digest
        for data in (self._history.initial, self._package):
            self._history.put(self._history.server.blobs, data)
        await self._staging.stage(self._name, digest, ME, ME)
        events = self._history.server.log.events(FEDERATION)
        staged = [event for event in events if isinstance(event, JobStaged)]
        there = any((e.name, e.job_blob.digest) == (self._name, digest) for e in staged)
        self._history.demand(there, f"{self._name} is staged")

    async def reserve(self) -> None:
        """Take a number, and keep to it."""
        if not self._number:
            self._number = 1 + max(
                (s.run for s in self._history.server.runs.summaries()), default=0
            )
        number = self._number
        try:
            await self._staging.reserve(number, ME, ME)
        except FailedPreconditionError:
            self._number = 0  # somebody else was faster, or has dropped it
            raise
        self._history.demand(number in self._history.watcher.steps.numbers, f"number {number}")

    async def deploy(self, sites: tuple[str, ...]) -> None:
        """Deploy the job at sites."""
        number, digest = self._number, models.ref(self._package).digest
        await self._staging.deploy(number, self._name, sites, ME)
        there = any(
            (event.run, event.job_blob.digest) == (number, digest) and {*sites} <= {*event.sites}
            for event in self._history.server.log.events(FEDERATION)
            if isinstance(event, RunPrepared)
        )
        self._history.demand(there, f"{self._name} is deployed as run {number}")

    async def begin(self, index: int) -> None:
        """Start the run, which is that of a job of this history."""
        number, digest = self._number, models.ref(self._package).digest
        try:
            plan = self._staging.plan(number)
            if plan.package.digest != digest:
                raise FailedPreconditionError("somebody else has deployed something as this run")
            order = start_order(plan.submission_id, digest, tuple(plan.sites))
            await self._staging.begin(number, order, ME, None)
        except FailedPreconditionError:
            if not self._history.server.log.run(number):  # else a try before was obeyed
                raise
        first = self._history.server.log.run(number)[:1]
        there = bool(first) and first[0].sites == tuple(sorted(self._history.sites))
        self._history.demand(there, f"run {number} begins")
        self._history.submitted(index, number)

    async def drop(self) -> None:
        """Give the run up before it has begun."""
        await self._history.server.control.lifecycle.delete(self._number, ME)
        self._history.demand(
            self._number not in self._history.watcher.steps.prepared,
            f"run {self._number} is dropped",
        )


class Operators:
    """Carries out what operators do."""

    def __init__(self, history: Any) -> None:
        self._history = history

    @property
    def _control(self) -> Any:
        return self._history.server.control

    def command(self, fault: Fault) -> None:
        """Do what a schedule says."""
        server = self._history.server
        if fault.kind in CHANGING:
            self._leave(fault, again=fault.kind == "start anew")
        elif fault.kind == "validate":
            self._validate(fault)
        elif fault.kind == "prepare":
            self._prepare(fault)
        elif fault.kind == "bar":
            self._bar(fault)
        elif server.up is not None:
            server.up.spawn(self._once(fault))

    # ---- errands ----

    def _leave(self, fault: Fault, again: bool) -> None:
        """Withdraw a site from a run, and perhaps start the run there anew."""
        history = self._history
        active = [run for run in history.server.log.runs() if not history.server.log.ended(run)]
        if not active:
            return
        run, site = active[fault.number % len(active)], fault.site
        opened = history.server.log.run(run)[0]
        order = start_order(_submission_id(fault), opened.job_blob.digest, (site,))

        async def withdraw() -> None:
            try:
                await self._control.lifecycle.withdraw(run, (site,), ME)
            except FailedPreconditionError as error:
                if error.rule != "no_part":  # it is withdrawn already, or has declined
                    raise

        async def start() -> None:
            try:
                await self._control.add_targets(run, order, ME)
            except AlreadyExistsError:
                pass  # this is so since a try before
            else:
                stored = history.server.log.run(run)
                given = encoded(order)
                there = any(getattr(event, "order", "") == given for event in stored)
                history.demand(there, f"{site} joins run {run}")

        what = f"{fault.kind}: run {run} at {site}"
        Errand(history, what, [withdraw, start] if again else [withdraw])

    def _validate(self, fault: Fault) -> None:
        """Measure models of a run again."""
        history, number = self._history, fault.number
        runs = history.server.log.runs()
        if not runs:
            return
        run, site = runs[number % len(runs)], fault.site
        owners = ((), ("global",), ("best", "last"), ("r0",), (site,), (site, "r1"))
        wanted = Wanted(owners[number % len(owners)], (site,) if number % 5 == 0 else ())
        submission = _submission_id(fault)
        orders: list[bytes] = []

        async def plan() -> None:
            found = await self._control.validations.plan(run, wanted)
            orders[:] = [
                start_order(submission, found.package.digest, tuple(found.sites), "validate")
            ]

        async def begin() -> None:
            made = await self._control.validations.open(run, orders[0], ME, wanted)
            first = history.server.log.run(made)[:1]
            there = bool(first) and (first[0].source_run, first[0].submission_id) == (
                run,
                submission,
            )
            history.demand(there, f"run {made} validates run {run}")

        Errand(history, f"validate run {run}", [plan, begin])

    def _bar(self, fault: Fault) -> None:
        """Disable a site and enable it again.

        Who is disabled when it is asked to start declines: a result that must not change waits.
        """
        history = self._history

        async def set_enabled(enabled: bool) -> None:
            runs = history.server.runs
            asked = any(fault.site in actor.state.awaited for actor in runs.active())
            early = asked or len(history.acknowledged) < len(history.jobs)
            if early and history.reproducible and not enabled:
                raise UnavailableError("not everybody has answered yet")
            await runs.set_enabled(fault.site, enabled, ME)

        steps = partial(set_enabled, False), partial(set_enabled, True)
        Errand(self._history, f"bar {fault.site}", steps)

    def _prepare(self, fault: Fault) -> None:
        """Prepare a run that is never started; drop it again, or not."""
        data = self._history.packages[0] + b" " * (10 + fault.number)
        run = Preparation(self._history, f"other{fault.number}", data)
        sites = (fault.site,), tuple(self._history.sites)
        steps: list[Step] = [run.stage, run.reserve, *(partial(run.deploy, each) for each in sites)]
        Errand(self._history, "prepare a run", [*steps, run.drop] if fault.number % 2 else steps)

    def submit_in_steps(self, index: int) -> None:
        """Stage a job, take a number, deploy and start it, one step after the other."""
        run = Preparation(self._history, f"job{index}", self._history.packages[index])
        everywhere = partial(run.deploy, tuple(self._history.sites))
        begin = partial(run.begin, index)
        Errand(self._history, "submit", [run.stage, run.reserve, everywhere, begin], anew=True)

    # ---- commands ----

    async def _once(self, fault: Fault) -> None:
        """Give a command once, whatever comes of it."""
        history = self._history
        runs = history.server.runs
        world = history.world
        try:
            if fault.kind in ("disable", "enable"):
                await runs.set_enabled(fault.site, fault.kind == "enable", "operator")
                return
            if fault.kind == "unstage":
                jobs = sorted(self._control.staging.jobs())
                if jobs:
                    await self._control.staging.unstage(jobs[fault.number % len(jobs)], ME)
                return
            numbers = [summary.run for summary in runs.summaries()]
            if not numbers:
                return
            number = numbers[fault.number % len(numbers)]
            if fault.kind == "delete":
                await self._control.lifecycle.delete(number, "operator")
                return
            actor = runs.actor(number)
            sites = (fault.site,)
            given: Any
            match fault.kind:
                case "abort":
                    given = Abort("operator", "aborted")
                case "withdraw":
                    given = Withdraw(sites, "operator")
                case "abort tasks":
                    given = AbortTasks(sites, "operator")
                case "set quorum":
                    given = SetQuorum(1 + fault.number % len(history.sites), "operator")
                case _:
                    again = f"{fault.number:032x}"
                    digest = actor.state.opened.job_blob.digest
                    given = AddTargets(sites, encoded(start_order(again, digest, sites)), "o")
            events = await actor.tell(given)
        except FLError as error:
            world.note("operator", f"refused: {error}")
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, a command must not meet it
            history.watcher.object(f"a command: {error!r}")
            return
        world.count("command obeyed")
        stored = history.server.log.run(number)
        if missing := [event for event in events if event not in stored]:
            history.watcher.object(f"I1: obeyed and not stored: {missing[0]}")
