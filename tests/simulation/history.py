"""One seed, one history: a federation, its jobs, what goes wrong, and how it ends."""

import asyncio
import contextvars
import gc
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flplatform.core.errors import FLError
from flplatform.core.job import JobSpec
from tests.simulation import models, programs, system
from tests.simulation.disk import Disks
from tests.simulation.faults import Fault, Injector, draw, draw_errands
from tests.simulation.invariants import Watcher, undisturbed
from tests.simulation.network import Link, Network
from tests.simulation.operators import Errand, Operators
from tests.simulation.server import Blobs, Server, identity
from tests.simulation.site import Behaviour, JobProcess, Package, Site, start_order
from tests.simulation.system import SimPath
from tests.simulation.world import DefectHandler, Process, StoryHandler, Violation, World

UP_CODECS = ("none", "none", "bf16", "zstd", "int8", "int8+zstd")
DOWN_CODECS = ("none", "none", "bf16", "zstd", "bf16+zstd")
NAMES = ("a", "bb", "ccc", "dddd")
LONGEST_S = 120.0
"""The last fault begins before."""

PATIENCE_S = 2500.0
"""Virtual seconds after the last fault within which every run must have ended."""

HEARD_S = 120.0
"""Virtual seconds within which everybody must have heard of that."""

QUIET_S = 35.0
"""Virtual seconds after that in which nothing more may happen: longer than anything waits."""

FOREVER_S = 30 * 86400.0


@dataclass
class Told:
    """How a history went."""

    seed: int
    violations: list[str]
    faults: list[Fault]
    counts: Counter[str]
    seconds: float
    story: list[str] = field(default_factory=list)


class History:
    """A federation that lives through a schedule of faults.

    Args:
        seed: decides everything.
        faults: the schedule; None to draw it.
        tell: whether the story is wanted.
    """

    def __init__(self, seed: int, faults: Sequence[Fault] | None = None, tell: bool = False):
        programs.install()
        plan = random.Random(f"{seed}/plan")  # noqa: S311
        self.world = World(seed, tell)
        self.disks = Disks(self.world)
        system.use(self.disks)
        names = list(NAMES[: plan.randint(2, 4)])
        self.reproducible = plan.random() < 0.5
        self.behaviour = Behaviour(
            self.reproducible,
            train_s=plan.choice([1.0, 5.0, 15.0]),
            crash=0.0 if self.reproducible else plan.choice([0.0, 0.1]),
            failure=0.0 if self.reproducible else plan.choice([0.0, 0.0, 0.1]),
            decline=0.0 if self.reproducible else plan.choice([0.0, 0.0, 0.2]),
        )
        JobProcess.world, JobProcess.behaviour = self.world, self.behaviour
        self.network = Network(self.world, names)
        programs.connect(self.network)
        self.watcher = Watcher(self.world, self.disks)
        JobProcess.attendance = self.watcher.attendance
        self.server = Server(self.world, self.disks, self.network, self.watcher)
        self.watcher.server = self.server
        self.sites = {
            name: Site(self.world, self.disks, self.network, name, self.behaviour) for name in names
        }
        self.jobs = [self._job(plan, names) for _ in range(plan.choice([1, 1, 1, 2]))]
        self.begins = [0.0] + [plan.random() * 60 for _ in self.jobs[1:]]
        more = random.Random(f"{seed}/more")  # noqa: S311
        self.in_steps = [more.random() < 0.15 for _ in self.jobs]
        self.expected: dict[int, list[bytes]] = {}
        if faults is None:
            count = plan.choice([0, 1, 2, 3, 4, 6, 8, 12])
            faults = draw(plan, names, self._horizon_s(), count, self.reproducible)
            errands = draw_errands(more, names, self._horizon_s(), self.reproducible)
            faults = sorted([*faults, *errands], key=lambda fault: fault.at)
        self.faults = list(faults)
        self.acknowledged: dict[int, int] = {}
        self.operators = Operators(self)
        self.errands: list[Errand] = []
        self.over = False

    def _horizon_s(self) -> float:
        """Return about how long there will be work: faults that hit nobody at work find little."""
        rounds = sum(job.rounds for job in self.jobs)
        each = max(job.wait_after_min_s for job in self.jobs) + 2 * self.behaviour.train_s + 2.0
        return min(LONGEST_S, max(self.begins) + 15.0 + rounds * each)

    def _job(self, plan: random.Random, names: list[str]) -> JobSpec:
        long = self.reproducible
        workflow = plan.choice(
            [
                ("scatter_gather",),
                ("scatter_gather",),
                ("scatter_gather", "cross_site_validation"),
                ("cross_site_validation",) if not long else ("scatter_gather",),
            ]
        )
        quorum = len(names) if long else plan.randint(1, len(names))
        aggregators: list[Any] = [{"name": "weighted_mean"}] * 3
        if len(names) >= 3:
            aggregators.append({"name": "median"})
        if quorum >= 3:
            aggregators.append({"name": "trimmed_mean", "args": {"trim": 1}})
            aggregators.append({"name": "krum", "args": {"byzantine": 0}})
        return JobSpec.model_validate(
            {
                "aggregator": plan.choice(aggregators),
                "optimizer": plan.choice([None, None, {"name": "fedavgm"}, {"name": "fedadam"}]),
                "updates": plan.choice(["full", "delta"]),
                "codec": plan.choice(UP_CODECS),
                "codec_down": plan.choice(DOWN_CODECS),
                "name": "job",
                "executor": {"module": "job"},
                "initial_model": {"file": "model.safetensors"},
                "workflow": workflow,
                "rounds": plan.randint(1, 4),
                "min_clients": quorum,
                "wait_after_min_s": plan.choice([0.0, 5.0, 20.0]),
                "round_deadline_s": FOREVER_S if long else plan.choice([20.0, 60.0]),
                "on_deadline": plan.choice(["extend", "abort"]),
                "deploy_wait_s": plan.choice([5.0, 30.0]),
                "quorum_wait_s": FOREVER_S if long else 120.0,
                "validate_deadline_s": plan.choice([20.0, 60.0]),
                "seed": plan.randint(0, 1000),
                "watch": plan.choice([None, {"metric": "accuracy"}]),
                "keep_updates": plan.choice(["last 2", "last 2", "all", "none"]),
            }
        )

    # ---- living ----

    def live(self) -> Told:
        """Play it."""
        logger = logging.getLogger("flplatform")
        logger.handlers = [DefectHandler(self.watcher.object)]
        if self.world.tells:
            logger.setLevel(logging.DEBUG)
            logger.handlers.append(StoryHandler(self.world))
        gc.disable()  # what is collected when must not differ between two plays of a seed
        try:
            self.world.loop.run_until_complete(self._whole())
        except (Violation, RuntimeError) as error:
            self.watcher.object(f"{type(error).__name__}: {error}")
        finally:
            if self.world.absent:
                self.watcher.object(f"not modelled: {', '.join(sorted(set(self.world.absent)))}")
            self.over = True
            self.world.tells = False
            logger.handlers = [logging.NullHandler()]  # what is buried unwinds without a loop
            self.world.loop.bury()
            gc.enable()
        return Told(
            self.world.seed,
            self.watcher.violations,
            self.faults,
            self.world.counts,
            self.world.loop.now,
            self.world.told,
        )

    async def _whole(self) -> None:
        self._prepare()
        self.server.boot()
        for site in self.sites.values():
            self.network.later(self.world.rng.random() * 3, self._boot, site)
        self._watch_over(self.server)
        for index, at in enumerate(self.begins):
            way = self.operators.submit_in_steps if self.in_steps[index] else self._submit
            self.network.later(at, way, index)
        injector = Injector(self)
        for fault in self.faults:
            self.network.later(fault.at, injector, fault)
        last = max([*(fault.at + fault.length for fault in self.faults), *self.begins, 1.0])
        await self._until(lambda: False, last)
        self._heal()
        await self._until(self._all_over, PATIENCE_S)
        await self._until(self._all_heard, HEARD_S)
        await self._until(lambda: False, QUIET_S)
        if missing := len(self.jobs) - len(self.acknowledged):
            self.watcher.object(f"{missing} submissions never became runs")
        if unfinished := sum(not errand.over for errand in self.errands):
            self.watcher.object(f"{unfinished} errands never come to their end")
        self.watcher.final(self.sites, self.expected)
        if not self.watcher.violations:
            await self._last_restart()

    async def _until(self, true: Any, patience_s: float) -> None:
        until = self.world.loop.now + patience_s
        while self.world.loop.now < until and not self.watcher.violations and not true():
            await asyncio.sleep(min(5.0, max(0.01, until - self.world.loop.now)))
            self.watcher.attendance.look(self.sites)

    def _prepare(self) -> None:
        blobs = Blobs(SimPath("/server/state/blobs"))  # type: ignore[arg-type]
        self.initial = models.model(*(self.world.rng.randint(0, 255) / 4 for _ in range(6)))
        self.put(blobs, self.initial)
        Package.model = models.ref(self.initial)
        self.packages = []
        for index, job in enumerate(self.jobs):
            self.packages.append(job.model_dump_json().encode() + b" " * index)
            self.put(blobs, self.packages[-1])
        self.server.host.sync_all()

    @staticmethod
    def put(blobs: Any, data: bytes) -> None:
        """Have a blob in a store, as if it had been uploaded."""
        if not blobs.has(models.ref(data).digest):
            blobs.create(lambda path: path.write_bytes(data))

    # ---- supervision ----

    def _boot(self, victim: Any) -> None:
        if victim.up is None and not self.over:
            self.watcher.attendance.disturb(victim.name)
            victim.boot()
            self._watch_over(victim)

    def _watch_over(self, victim: Any) -> None:
        """Start a program again some time after it has died."""
        process: Process | None = victim.up
        if process is None:  # it did not even start
            self.network.later(5.0, self._boot, victim)
            return
        before = process.died

        def died(why: str) -> None:
            before(why)
            self.world.count("recovery")
            pause = min(60.0, 0.5 + self.world.rng.expovariate(1 / 10.0))
            self.watcher.attendance.disturb(victim.name, pause)
            self.network.later(pause, self._boot, victim)

        process.died = died

    def _heal(self) -> None:
        self.world.note("fault", "all faults are over")
        for name in self.network.links:
            self.network.links[name] = Link()
        victims: list[Any] = [self.server, *self.sites.values()]
        for victim in victims:
            victim.host.full = victim.host.broken = victim.host.log_broken = False
            if victim.up is not None:
                victim.up.steps = victim.up.touches = 0
                victim.up.thaw()
        for name in self.sites:
            self._enable(name)

    def _enable(self, name: str) -> None:
        if self.server.up is None:
            self.network.later(1.0, self._enable, name)
            return

        async def enable() -> None:
            if name in self.server.clients.disabled:
                await self.server.runs.set_enabled(name, True, "operator")

        self.server.up.spawn(enable())

    def _all_over(self) -> bool:
        log = self.server.log
        pursued = any(not errand.over for errand in self.errands)
        return (
            len(self.acknowledged) == len(self.jobs)
            and not pursued
            and all(log.ended(run) for run in log.runs())
        )

    def _all_heard(self) -> bool:
        return all(site.program and not site.program.runs for site in self.sites.values())

    # ---- the operator who submits ----

    def _submit(self, index: int) -> None:
        """Submit a job until that is acknowledged; always under the same id."""
        if self.over:
            return
        if self.server.up is None:
            self.network.later(2.0, self._submit, index)
            return
        self.server.up.spawn(self._submitting(index))
        self.network.later(20.0, self._submit_again, index)

    def _submit_again(self, index: int) -> None:
        if index not in self.acknowledged:
            self.world.count("submitted again")
            self._submit(index)

    async def _submitting(self, index: int) -> None:
        submission = f"{index:032x}"
        sites = tuple(self.sites)
        blob = models.ref(self.packages[index])
        try:
            for data in (self.initial, self.packages[index]):  # a deleted run may have had them
                self.put(self.server.blobs, data)
            package: Any = Package(self.server.blobs.path(blob.digest))  # type: ignore[arg-type]
            run = await self.server.runs.submit(
                package,
                identity("lead", "admin"),
                order=start_order(submission, blob.digest, sites),
                submission_id=submission,
                blob=blob,
                sites=sites,
                min_clients=None,
            )
        except FLError as error:
            self.world.note("operator", f"submission refused: {error}")
            return
        self.submitted(index, run)

    def demand(self, there: bool, what: str) -> None:
        """Object to what was acknowledged and is not in the log."""
        if not there:
            self.watcher.object(f"I1: acknowledged and not stored: {what}")

    def submitted(self, index: int, run: int) -> None:
        """Hear that a submission has become a run."""
        if self.acknowledged.setdefault(index, run) != run:
            self.watcher.object(f"submission {index} became run {run}, before another one")
        if run not in self.server.log.runs():
            self.watcher.object(f"I1: run {run} is acknowledged and not stored")
        if self.reproducible:
            initial, sites = self.initial, tuple(self.sites)
            self.expected[run] = undisturbed(self.jobs[index], initial, sites)

    # ---- the very end ----

    async def _last_restart(self) -> None:
        """Start everything once more: it must find what it left, and free what nothing needs."""
        self.world.note("fault", "the last restart")
        self.server.crash(host=True)
        await self._until(lambda: self.server.up is not None, 100.0)
        await self._until(lambda: False, 5.0)
        server, watcher = self.server, self.watcher
        if server.up is None:
            watcher.object("the server does not come back")
            return
        for summary in server.runs.summaries():
            if summary.run not in server.log.runs():
                continue
            ended = server.log.run(summary.run)[-1]
            if summary.status != getattr(ended, "status", ""):
                watcher.object(f"run {summary.run} was {ended}, after a restart {summary.status}")
        shelf, steps = server.runs.shelf, watcher.steps
        if (set(shelf.jobs), set(shelf.prepared)) != (set(steps.staged), set(steps.prepared)):
            watcher.object("other jobs or prepared runs lie ready than before the restart")

        async def collect() -> None:
            await server.runs.retention.free(())
            await server.runs.retention.free(server.blobs.digests())

        server.up.spawn(collect())
        await self._until(lambda: False, 5.0)
        watcher.leftovers()


def play(seed: int, faults: Sequence[Fault] | None = None, tell: bool = False) -> Told:
    """Play one history, in a context of its own."""
    return contextvars.Context().run(lambda: History(seed, faults, tell).live())
