"""Which runs a site takes on, and what it remembers of them."""

import asyncio
import dataclasses
import errno
import json
import logging
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from flplatform.client import cache, ending, resuming, retrying, run_folders, site_run
from flplatform.client import site_runs as module
from flplatform.client.box import Box
from flplatform.client.executors import RunProcessCrashed
from flplatform.client.policy import Policy
from flplatform.client.requests import StartBody
from flplatform.client.site_runs import SiteRuns
from flplatform.client.spool import Spool, SpooledResult
from flplatform.core.config import Dataset, Datasets, Environment, Environments, SitePolicy
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from flplatform.core.messages import ModelRef, Task, TaskFailure, TaskId
from flplatform.security.kit import Local
from flplatform.security.package import pack
from flplatform.security.signing import StartOrder, sign_order
from flplatform.store.blobs import FileBlobStore
from tests.support.federation import provision

JOB = "name: tiny\nexecutor: {module: job}\ninitial_model: {file: m}\nargs: {lr: 1}\n"
MODEL = ModelRef("blake3:" + "0" * 64, 100)
TASK = Task(TaskId(1, 4, "train", "site-1"), 5)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    admins = {"amy": "project_admin", "lea": "lead@site-1", "rex": "project_admin"}
    federation = provision(tmp_path_factory.mktemp("runs"), admins=admins)
    signers = {name: (federation.key(name), federation.open(name).chain) for name in admins}
    before = federation.open("site-1").trust
    federation.revoke("rex")
    return SimpleNamespace(kit=federation.open("site-1"), signers=signers, before=before)


class FakeProcess:
    """A `RunProcess` that starts nothing.

    Attributes:
        made: all of them, the newest last.
        gate: what `start` waits for.
        script: what the next calls of `execute` come to; then `done`.
    """

    made: list["FakeProcess"]
    gate: asyncio.Event | None
    script: list[BaseException]

    def __init__(self, spec, on_phase, on_metric):
        self.spec, self.on_phase, self.on_metric = spec, on_phase, on_metric
        self.state = "made"
        self.spent = False
        self.made.append(self)

    async def start(self):
        self.state = "starting"
        try:
            if self.gate:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.state = "cancelled"
            raise
        self.state = "running"

    async def execute(self, task, model, work):
        assert self.state == "running"
        outcome = self.script.pop(0) if self.script else "done"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def abort(self):
        self.state = "aborted"


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    class Process(FakeProcess):
        made: list[FakeProcess] = []
        gate = None
        script: list[BaseException] = []

    monkeypatch.setattr(site_run, "RunProcess", Process)
    monkeypatch.setattr(retrying, "backoff_s", lambda *_: 0.0)
    return Process


class World:
    """A site's folder, and a server that offers packages."""

    def __init__(self, people, folder: Path) -> None:
        self.people, self.folder = people, folder
        self.kit = dataclasses.replace(people.kit, folder=folder)
        self.trust = people.kit.trust
        self.blobs = FileBlobStore(folder / "blobs")
        self.fetched: list[str] = []
        self.stopped: list[int] = []
        self.metrics: list[tuple[object, ...]] = []
        self.gate: asyncio.Event | None = None

    def local(self, max_runs: int = 5, **policy) -> None:
        environments = {"default": Environment(max_runs=max_runs), "fast": Environment()}
        local = Local(
            site_policy=SitePolicy(**policy), environments=Environments(environments=environments)
        )
        self.kit = dataclasses.replace(self.kit, local=local)

    async def fetch(self, blob: ModelRef) -> Path:
        self.fetched.append(blob.digest)
        if self.gate:
            await self.gate.wait()
        return self.blobs.path(blob.digest)

    def spool(self) -> Spool:
        return Spool(self.kit.state_folder() / "spool")

    async def stop_tasks(self, run: int) -> None:
        self.stopped.append(run)

    def runs(self) -> SiteRuns:
        """The runs of a process that has just been started."""
        policy = Policy(self.kit, "sandbox")
        runs = SiteRuns(
            self.kit,
            policy,
            self.fetch,
            self.spool(),
            self.stop_tasks,
            lambda: self.trust,
            lambda *m: self.metrics.append(m),
        )
        runs.open(self.blobs.path)
        return runs

    def mount(self, path: Path) -> None:
        """Map the dataset `mnist` to a path."""
        mnist = Datasets(datasets={"mnist": Dataset(path=str(path), allow=("any",))})
        self.kit = dataclasses.replace(
            self.kit, local=dataclasses.replace(self.kit.local, datasets=mnist)
        )

    def packed(
        self, who: str = "amy", environment: str = "default", code: str = "x = 1", text: str = JOB
    ) -> bytes:
        key, certificate = self.people.signers[who]
        text = f"{text}environment: {environment}\n"
        files = {"job.yml": text.encode(), "code/job.py": code.encode()}
        fields = {"project": "test", "author": who, "job": "tiny"}
        return pack(files, MODEL, **fields, key=key, certificate=certificate)

    def offer(self, run: int = 1, number: int = 1, who: str = "amy", data: bytes = b"", **order):
        """Sign a start of a package and return what `accept` takes."""
        data = data or self.packed()
        blob = self.blobs.create(lambda path: path.write_bytes(data))
        now = datetime.now(UTC)
        fields = {
            "project": "test",
            "issued_at": now,
            "not_after": now + timedelta(hours=1),
            "submission_id": f"{number:032x}",
            "job_digest": blob.digest.partition(":")[2],
            "sites": ("site-1", "site-2"),
        }
        start = StartOrder(**fields | order)
        identity = self.people.before.verify_chain(self.people.signers[who][1], "admin")
        signed = sign_order(start, *self.people.signers[who])
        return signed, start, identity, StartBody(run=run, digest=blob.digest, size=blob.size)

    @property
    def home(self) -> Path:
        return self.folder / "state" / "runs"


@pytest.fixture
def world(people, tmp_path):
    world = World(people, tmp_path)
    world.local()
    return world


def play(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 20)

    return asyncio.run(bounded())


async def end(runs: SiteRuns, number: int, status: str) -> None:
    runs.end(number, status)
    await runs.until_ended(number)
    await runs._endings.until_deleted()


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def refused(coroutine, rule="", error=PermissionDeniedError):
    with pytest.raises(error) as caught:
        await coroutine
    assert rule in caught.value.rule
    return str(caught.value)


def test_a_run_is_taken_on(world, processes):
    async def go():
        runs, offer = world.runs(), world.offer()
        assert runs.recorded(offer[0], offer[3]) is None
        assert await runs.accept(*offer) == {"isolation": "sandbox"}
        await settle()
        assert runs.numbers() == [1]
        (run,) = runs.all()
        assert run is runs.get(1)
        assert run.report()[:3] == (1, 0, "deployed")
        assert run.report()[4] == "sandbox"
        assert (world.home / "run-1" / "code" / "job.py").read_text() == "x = 1"
        assert json.loads((world.home / "run-1" / "start.json").read_bytes())["run"] == 1
        (process,) = processes.made
        assert process.state == "running"
        spec = process.spec
        assert (spec.run, spec.site, spec.isolation) == (1, "site-1", "sandbox")
        assert spec.code == world.home / "run-1" / "code"
        assert spec.args == {"lr": 1}
        assert world.kit.state_folder() in spec.hidden
        assert await run.execute(TASK, None, world.folder / "work") == "done"
        process.on_metric("loss", 0.5, 7)
        assert world.metrics == [(1, 4, "loss", 0.5, 7)]
        await runs.close()
        assert process.state == "aborted"
        assert runs.numbers() == [1]

    play(go())


def test_the_same_start_gets_the_same_answer(world, processes):
    async def go():
        runs, offer = world.runs(), world.offer()
        answer = await runs.accept(*offer)
        signed, _, _, body = offer
        assert runs.recorded(signed, body) == answer
        assert runs.recorded(world.offer()[0], body) is None  # signed once more
        assert runs.recorded(signed, body.model_copy(update={"run": 2})) is None
        assert world.runs().recorded(signed, body) == answer
        await runs.close()

    play(go())


def test_asked_twice_at_once(world, processes):
    """A server that is started again asks again while the site is still downloading."""

    async def go():
        world.gate = asyncio.Event()
        runs, offer = world.runs(), world.offer()
        both = [asyncio.create_task(runs.accept(*offer)) for _ in range(2)]
        await settle()
        world.gate.set()
        assert await asyncio.gather(*both) == [{"isolation": "sandbox"}] * 2
        assert len(world.fetched) == 1
        await runs.close()
        assert len(processes.made) == 1

    play(go())


def test_a_submission_is_started_once(world):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(run=1))
        text = await refused(runs.accept(*world.offer(run=2)), "single start")
        assert "as run 1" in text
        await refused(world.runs().accept(*world.offer(run=2)), "single start")
        await end(runs, 1, "finished")
        for later in (runs, world.runs()):
            await refused(later.accept(*world.offer(run=1)), "single start")
            await refused(later.accept(*world.offer(run=2)), "single start")
            assert later.numbers() == []
        await runs.close()

    play(go())


def test_a_kill_between_accepting_and_noting_it(world):
    async def go():
        runs, offer = world.runs(), world.offer()
        await runs.accept(*offer)
        await runs.close()
        (world.home / "submissions.json").unlink()
        again = world.runs()
        assert again.recorded(offer[0], offer[3])
        await end(again, 1, "finished")
        await refused(world.runs().accept(*offer), "single start")

    play(go())


def test_a_full_disk_leaves_nothing(world, monkeypatch):
    def full(path, data):
        if path.name == "submissions.json":
            raise OSError("full")
        write(path, data)

    async def go():
        runs = world.runs()
        with monkeypatch.context() as patch:
            patch.setattr(run_folders, "write_atomic", full)
            with pytest.raises(OSError, match="full"):
                await runs.accept(*world.offer())
        assert list(world.home.iterdir()) == []
        assert await runs.accept(*world.offer())
        await runs.close()

    write = run_folders.write_atomic
    play(go())


def test_a_run_number_stands_for_one_job(world):
    other = world.packed(code="x = 2")

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(run=1, number=1))
        await refused(
            runs.accept(*world.offer(run=1, number=2, data=other)), error=InvalidArgumentError
        )
        again = world.runs()
        await refused(
            again.accept(*world.offer(run=1, number=2, data=other)), error=InvalidArgumentError
        )
        await runs.close()

    play(go())


def test_a_run_is_started_anew_by_another_order(world, processes):
    """A site that was withdrawn joins again, maybe before it has heard of its withdrawal."""
    world.local(max_runs=1)
    data = world.packed()

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(run=1, number=1, data=data))
        await settle()
        first, (process,) = runs.get(1), processes.made
        (world.home / "run-1" / "state").mkdir(exist_ok=True)
        again = world.offer(run=1, number=2, data=data)
        await runs.accept(*again)
        await settle()
        assert (process.state, runs.get(1) is first) == ("aborted", False)
        assert processes.made[-1].state == "running"
        assert not (world.home / "run-1" / "state").exists()
        # Whoever still holds the old run gets no process out of it.
        with pytest.raises(FailedPreconditionError, match="run 1 has ended here"):
            await first.execute(TASK, None, world.folder / "work")
        await refused(runs.accept(*world.offer(run=1, number=1, data=data)), "single start")
        assert runs.recorded(again[0], again[3]) is not None
        await runs.close()

    play(go())


def test_a_run_that_is_ending_does_not_take_its_successor_along(world, processes, monkeypatch):
    gate, data = asyncio.Event(), world.packed()

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(run=1, number=1, data=data))
        await settle()
        aborting = processes.made[0].abort

        async def slow() -> None:
            await gate.wait()
            await aborting()

        monkeypatch.setattr(processes.made[0], "abort", slow)
        leaving = asyncio.create_task(end(runs, 1, "withdrawn"))
        await settle()
        joining = asyncio.create_task(runs.accept(*world.offer(run=1, number=2, data=data)))
        await settle()
        gate.set()
        await asyncio.gather(leaving, joining)
        assert runs.numbers() == [1]
        assert (world.home / "run-1" / "start.json").exists()
        await runs.close()

    play(go())


def test_the_results_of_a_run_end_with_it(world, processes, monkeypatch, caplog):
    """At the latest before it is started anew: its tasks have the same names then."""

    def left() -> list[str]:
        return [str(entry.task_id) for entry in world.spool().entries()]

    async def go():
        data = world.packed()
        runs = world.runs()
        for number in (1, 2):
            await runs.accept(*world.offer(run=1, number=number, data=data))
            work = world.folder / f"work-{number}"
            work.mkdir()
            world.spool().commit(SpooledResult(TaskId.parse("1/1/train/site-1"), None, 5), work)
            if number == 1:
                await end(runs, 1, "withdrawn")
                assert (world.stopped, left()) == ([1], [])
        failures, drop = [OSError(errno.EIO, "Input/output error")] * 2, Spool.drop_run

        def failing(*args):
            if failures:
                raise failures.pop()
            drop(*args)

        monkeypatch.setattr(Spool, "drop_run", failing)
        await end(runs, 1, "withdrawn")
        assert "forget run 1: try 1 failed, next in 0.0 s: [Errno 5]" in caplog.text
        assert not (world.home / "run-1").exists()
        assert (left(), failures) == ([], [])
        await runs.close()

    play(go())


def test_results_that_a_kill_has_left_go_before_the_run_is_started_anew(world):
    async def go():
        data = world.packed()
        runs = world.runs()
        await runs.accept(*world.offer(run=1, number=1, data=data))
        await end(runs, 1, "withdrawn")
        work = world.folder / "work"
        work.mkdir()
        world.spool().commit(SpooledResult(TaskId.parse("1/1/train/site-1"), None, 5), work)
        await runs.accept(*world.offer(run=1, number=2, data=data))
        assert world.spool().entries() == []
        await runs.close()

    play(go())


def test_what_was_not_signed(world):
    async def go():
        runs = world.runs()
        await refused(runs.accept(*world.offer(sites=("site-2",))), "signed targets")
        await refused(runs.accept(*world.offer(job_digest="1" * 64)), "signed job digest")
        assert world.fetched == []
        assert list(world.home.iterdir()) == []

    play(go())


def test_packages_that_are_refused(world):
    async def go():
        runs = world.runs()
        data = world.packed()
        broken = data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]
        await refused(runs.accept(*world.offer(data=broken)), error=InvalidArgumentError)
        await refused(runs.accept(*world.offer(data=b"zip")), error=InvalidArgumentError)
        revoked = world.offer(data=world.packed("rex"))
        assert "revoked" in await refused(runs.accept(*revoked), error=UnauthenticatedError)
        assert runs.numbers() == []
        assert list(world.home.iterdir()) == []
        # None of them used up the submission.
        assert await runs.accept(*world.offer())
        await runs.close()

    play(go())


def test_the_policy_is_asked(world):
    async def go():
        world.local(byoc=("o:site",))
        runs = world.runs()
        await refused(runs.accept(*world.offer()), "policy byoc = o:site")
        await refused(runs.accept(*world.offer(data=world.packed("lea"))), "policy byoc")
        text = await refused(
            runs.accept(*world.offer(who="lea", data=world.packed("lea", "slow"))), "environments"
        )
        assert "'slow'" in text
        assert await runs.accept(*world.offer(who="lea", data=world.packed("lea")))
        await runs.close()

    play(go())


def test_processes_are_what_the_signed_start_says(world, processes):
    async def go():
        runs = world.runs()
        several = {"gpus": {"site-1": 3, "site-2": 9}}
        await runs.accept(*world.offer(**several))
        await runs.get(1).warm_up()
        assert processes.made[-1].spec.processes == 3
        await refused(runs.accept(*world.offer(2, 2, gpus={"site-1": 9})), "max_processes = 8")
        await runs.accept(*world.offer(2, 2, gpus={"site-2": 9}))
        assert runs.get(2).plan.processes == 1
        await runs.close()
        again = world.runs()
        assert again.get(1).plan.processes == 3
        await again.close()

    play(go())


def test_a_crash_is_noted_with_the_last_line_that_says_something(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(gpus={"site-1": 2}))
        tail = "Root cause\n  exitcode: -9 (SIGKILL)\n====="
        processes.script.append(RunProcessCrashed("rank 1 went first", tail))
        await runs.get(1).execute(TASK, None, world.folder / "work")
        assert [line["text"] for line in runs.get(1).troubles.lines] == [
            "rank 1 went first: exitcode: -9 (SIGKILL)"
        ]
        await runs.close()

    play(go())


def test_processes_that_a_failure_has_ended_are_started_anew_without_a_crash(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(gpus={"site-1": 2}))
        run = runs.get(1)
        await run.execute(TASK, None, world.folder / "work")
        processes.made[-1].spent = True
        assert await run.execute(TASK, None, world.folder / "work") == "done"
        assert [each.state for each in processes.made] == ["aborted", "running"]
        assert run.troubles.lines == []
        await runs.close()

    play(go())


def test_runs_at_once(world):
    async def go():
        world.local(max_runs=2)
        runs = world.runs()
        for number in (1, 2):
            await runs.accept(*world.offer(number, number))
        await refused(runs.accept(*world.offer(3, 3)), "environments.yml: max_runs = 2")
        fast = world.packed(environment="fast")
        await runs.accept(*world.offer(4, 4, data=fast))
        await refused(runs.accept(*world.offer(5, 5, data=fast)), "max_runs = 1")
        await end(runs, 2, "aborted")
        await runs.accept(*world.offer(3, 3))
        assert runs.numbers() == [1, 3, 4]
        await runs.close()

    play(go())


def test_a_download_that_fails(world, monkeypatch):
    async def go():
        runs = world.runs()
        offer = world.offer()

        async def gone(blob):
            raise NotFoundError("there is no such package")

        with monkeypatch.context() as patch:
            patch.setattr(runs, "_fetch", gone)
            await refused(runs.accept(*offer), error=NotFoundError)
        assert await runs.accept(*offer)
        await runs.close()

    play(go())


# ---- restarts


@pytest.fixture
def accepted(world):
    """The offer of a run that was accepted before a restart."""
    offer = world.offer()

    async def go():
        runs = world.runs()
        await runs.accept(*offer)
        await runs.close()

    play(go())
    return offer


def not_resumed(world, caplog, text: str) -> None:
    """A run is refused for good: the server hears of it until it says that the run has ended."""

    async def go():
        runs = world.runs()
        await runs.ready(1)
        assert (runs.numbers(), runs.get(1), runs.over(1)) == ([1], None, False)
        assert await runs.ready(1) is None
        assert runs.reports()[0][2].startswith("not resumed, ")
        assert text in runs.troubles(1).lines[-1]["text"]
        await runs.close()

    caplog.clear()
    with caplog.at_level(logging.ERROR):
        play(go())
    assert caplog.text.count("run-1 is not resumed") == 1
    assert text in caplog.text


def resumed(world) -> list[int]:
    """Return the runs that can work right after a restart."""

    async def go():
        runs = world.runs()
        try:
            return [run.run for run in runs.all()]
        finally:
            await runs.close()

    return play(go())


def replace(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_a_run_is_resumed(world, accepted, processes):
    async def go():
        (world.home / ".tmp-9").mkdir()
        runs = world.runs()
        await runs._endings.until_deleted()
        assert not (world.home / ".tmp-9").exists()
        assert runs.numbers() == [1]
        await settle()
        assert processes.made == []  # it starts with its first task
        assert await runs.get(1).execute(TASK, None, world.folder / "work") == "done"
        assert len(processes.made) == 1
        await runs.close()

    play(go())


def test_a_run_outlives_its_order(world, accepted, monkeypatch):
    """The start has expired since, but it was accepted in time."""

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=2)

    monkeypatch.setattr(module, "datetime", Later)
    assert resumed(world) == [1]


def test_a_package_that_is_not_what_was_signed_is_not_resumed(world, accepted, caplog):
    path = world.blobs.path(accepted[3].digest)
    data = path.read_bytes()
    replace(path, world.packed(code="steal()"))  # well signed, but not what was started
    not_resumed(world, caplog, "is not the package that was signed")
    assert world.fetched[-1] == accepted[3].digest  # it would do if that brought another
    replace(path, data)
    assert resumed(world) == [1]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: replace(path, b"rot")])
def test_a_package_that_is_gone_or_damaged_is_fetched_again(world, accepted, spoil):
    path = world.blobs.path(accepted[3].digest)
    data = path.read_bytes()
    spoil(path)

    async def fetch(blob):
        replace(path, data) if path.exists() else path.write_bytes(data)
        return path

    async def go():
        world.fetch = fetch
        runs = world.runs()
        assert (runs.numbers(), runs.get(1)) == ([1], None)
        assert runs.needed_blobs() == {accepted[3].digest}
        run = await runs.ready(1)
        assert await run.execute(TASK, None, world.folder / "work") == "done"
        await runs.close()

    play(go())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"order": "AAAA"}, "is not JSON"),
        ({"order": "?"}, "is not JSON"),
        ({"more": 1}, "unknown key"),
        ({"accepted": "2001-01-01T00:00:00Z"}, "not yet valid"),
    ],
)
def test_a_changed_record_is_not_resumed(world, accepted, caplog, change, text):
    path = world.home / "run-1" / "start.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    not_resumed(world, caplog, text)


def test_a_narrowed_policy_is_not_resumed_until_it_is_widened(world, accepted, caplog):
    world.local(submitters=("o:site",))
    not_resumed(world, caplog, "policy submitters = o:site")

    async def go():
        runs = world.runs()
        assert await runs.ready(1) is None
        assert runs.busy() == {}  # nobody waits for its place
        world.local()
        runs._policy = Policy(world.kit, "sandbox")
        assert await runs.ready(1) is runs.get(1) is not None
        await runs.close()

    play(go())


def test_a_revoked_submitter_is_not_resumed(world, caplog):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(who="rex", data=world.packed("rex")))
        await runs.close()

    world.trust = world.people.before
    play(go())
    assert resumed(world) == [1]
    world.trust = world.people.kit.trust
    not_resumed(world, caplog, "it is revoked")


def test_a_run_that_is_refused_goes_when_the_server_says_that_it_has_ended(world, accepted):
    path = world.home / "run-1" / "start.json"
    path.write_text("{")

    async def go():
        runs = world.runs()
        with pytest.raises(InvalidArgumentError):  # the server asks again
            await runs.accept(*accepted)
        await end(runs, 1, "finished")
        assert (runs.numbers(), runs.over(1)) == ([], True)
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        await refused(runs.accept(*accepted), "single start")
        await runs.close()

    play(go())


def test_one_bad_run_does_not_keep_the_others(world, accepted):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(2, 2, data=world.packed(code="x = 2")))
        await runs.close()

    play(go())
    world.blobs.delete(accepted[3].digest)
    assert resumed(world) == [2]


# ---- what is not there after a restart, and comes


@pytest.fixture
def patient(monkeypatch):
    """Nothing is tried again by itself."""
    monkeypatch.setattr(resuming, "backoff_s", lambda *_: 3600.0)


@pytest.fixture
def unmounted(world):
    """The offer of a run that was accepted before a restart; its data is not there any more."""
    mount = world.folder / "mnt"
    mount.mkdir()
    world.mount(mount)
    text = f"{JOB}data: [mnist]\n"
    offer = world.offer(data=world.packed(text=text))

    async def go():
        runs = world.runs()
        await runs.accept(*offer)
        await runs.close()

    play(go())
    mount.rmdir()
    return SimpleNamespace(offer=offer, mount=mount)


def test_a_run_waits_until_its_data_is_there(world, unmounted, patient, caplog):
    async def go():
        runs = world.runs()
        assert (runs.numbers(), runs.get(1), runs.all()) == ([1], None, [])
        assert runs.held(1).run == 1
        assert runs.reports()[0][:3] == (1, 0, "waiting, retries: permission_denied")
        assert "does not exist" in runs.troubles(1).lines[0]["text"]
        assert "run 1 waits, try 1 failed: dataset 'mnist' is mapped" in caplog.text
        assert runs.busy() == {"default": 1}
        assert runs.submitter(1)[0] == "amy"
        state = runs.held(1).state
        task = asyncio.create_task(runs.ready(1))
        asked = asyncio.create_task(runs.accept(*unmounted.offer))  # the server asks again
        await settle()
        assert runs.recorded(unmounted.offer[0], unmounted.offer[3]) is None
        waited, turn = await asyncio.wait([task, asked], timeout=0), runs.held(1).turn
        assert not waited[0]
        unmounted.mount.mkdir()
        run = await runs.ready(1)
        assert (await task) is run is runs.get(1)
        assert await asked == {"isolation": "sandbox"}
        assert (run.state, run.turn) == (state, turn)
        assert run.troubles.held_up == ""
        assert run.report()[2] == "deployed"
        assert world.fetched == [unmounted.offer[3].digest]
        await runs.close()

    play(go())


def test_a_run_that_waits_is_tried_again_by_itself(world, unmounted, monkeypatch):
    tries = []

    def pause(attempt, longest_s):
        tries.append((attempt, longest_s))
        if len(tries) == 3:
            unmounted.mount.mkdir()
        return 0.0

    monkeypatch.setattr(resuming, "backoff_s", pause)

    async def go():
        runs = world.runs()
        waiting = runs.held(1)
        await waiting._settled.wait()
        assert runs.get(1) is not None
        assert tries == [(n, world.kit.site.backoff_max_s) for n in (1, 2, 3)]
        await runs.close()

    play(go())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("what", ["start.json", "package"])
def test_what_cannot_be_read_now_is_read_later(world, accepted, monkeypatch, patient, number, what):
    failing = True
    real = Path.read_bytes

    def read(path):
        if failing and path.name == what:
            raise short(number)
        return real(path)

    def digest(path):
        if failing and what == "package":
            raise short(number)
        return digest_of_file(path)

    digest_of_file = resuming.digest_of_file
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(resuming, "digest_of_file", digest)

    async def go():
        nonlocal failing
        runs = world.runs()
        assert (runs.numbers(), runs.get(1)) == ([1], None)
        asked = asyncio.create_task(runs.accept(*accepted))
        await settle()
        failing = False
        assert await runs.ready(1) is not None
        assert await asked == {"isolation": "sandbox"}
        await runs.close()

    play(go())


def test_a_run_that_waits_is_ended(world, unmounted, patient):
    async def go():
        runs = world.runs()
        task = asyncio.create_task(runs.ready(1))
        await settle()
        await end(runs, 1, "finished")
        assert await task is None
        assert (runs.numbers(), runs.over(1)) == ([], True)
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        unmounted.mount.mkdir()
        assert world.runs().numbers() == []

    play(go())


def test_a_run_that_waits_is_started_anew(world, unmounted, patient):
    async def go():
        runs = world.runs()
        task = asyncio.create_task(runs.ready(1))
        await settle()
        unmounted.mount.mkdir()
        data = world.blobs.path(unmounted.offer[3].digest).read_bytes()
        anew = world.offer(run=1, number=2, data=data)
        await runs.accept(*anew)
        assert await runs.ready(1) is runs.get(1)
        assert runs.recorded(anew[0], anew[3])
        await task
        await runs.close()

    play(go())


def test_an_end_while_a_run_is_read_again(world, unmounted, patient, monkeypatch):
    """It is not brought back to where it has no part any more."""
    reading, go_on = asyncio.Event(), threading.Event()
    real = resuming.open_package

    async def go():
        loop = asyncio.get_running_loop()
        runs = world.runs()
        unmounted.mount.mkdir()

        def slowly(*args):
            loop.call_soon_threadsafe(reading.set)
            assert go_on.wait(10)
            return real(*args)

        monkeypatch.setattr(resuming, "open_package", slowly)
        task = asyncio.create_task(runs.ready(1))
        await reading.wait()
        runs.end(1, "finished")
        go_on.set()
        await runs.until_ended(1)
        assert await task is None
        assert (runs.numbers(), (world.home / "run-1").exists()) == ([], False)
        await runs.close()

    play(go())


def test_an_end_at_the_moment_when_a_run_is_back(world, unmounted, patient, monkeypatch):
    async def go():
        runs = world.runs()
        waiting = runs.held(1)
        runs._beside[1].cancel()
        await settle()
        found = asyncio.get_running_loop().create_future()

        async def until_restored(_run):
            return await found

        monkeypatch.setattr(runs._resumer, "until_restored", until_restored)
        back = asyncio.create_task(runs._bring_back(waiting))
        await settle()
        found.set_result("restored")
        runs.end(1, "finished")
        await back
        await runs.until_ended(1)
        assert (runs.numbers(), (world.home / "run-1").exists()) == ([], False)
        await runs.close()

    play(go())


# ---- starts beside each other


def trimmed(runs, world) -> list[str]:
    return cache.trim(world.blobs, runs.needed_blobs(), 0)


def test_the_package_of_a_start_is_needed_from_the_beginning(world, monkeypatch):
    stages = []

    async def go():
        offer = world.offer()
        runs = world.runs()
        real = runs._folders.unpack

        async def fetch(blob):
            stages.append(trimmed(runs, world))
            return world.blobs.path(blob.digest)

        def unpack(*args):
            found = real(*args)
            stages.append(trimmed(runs, world))
            return found

        runs._fetch = fetch
        monkeypatch.setattr(runs._folders, "unpack", unpack)
        await runs.accept(*offer)
        assert [*stages, trimmed(runs, world)] == [[], [], []]
        await runs.close()
        assert resumed_in(world) == [1]

    def resumed_in(world):
        return [run.run for run in world.runs().all()]

    play(go())


def test_a_package_that_made_room_before_it_was_needed_is_fetched_once_more(world):
    async def go():
        offer = world.offer()
        path = world.blobs.path(offer[3].digest)
        data = path.read_bytes()
        runs = world.runs()

        async def fetch(blob):
            world.fetched.append(blob.digest)
            if len(world.fetched) == 1:
                path.unlink()  # the trim that had begun before
            else:
                path.write_bytes(data)
            return path

        runs._fetch = fetch
        assert await runs.accept(*offer)
        assert len(world.fetched) == 2
        await runs.close()

    play(go())


def test_a_start_that_waits_holds_up_no_other(world):
    async def go():
        runs = world.runs()
        big, small = world.offer(1, 1, data=world.packed(code="x = 'big'")), world.offer(2, 2)
        fetch, gate = world.fetch, asyncio.Event()

        async def full(blob):
            if blob.digest == big[3].digest:
                await gate.wait()
            return await fetch(blob)

        runs._fetch = full
        one = asyncio.create_task(runs.accept(*big))
        await settle()
        assert runs.numbers() == [1]
        assert (runs.held(1), runs.reports(), runs.over(1)) == (None, [], False)
        assert await runs.accept(*small)
        # What comes again, by another number, is refused at once: it is on its way in.
        again = world.offer(3, 1, data=world.packed(code="x = 'big'"))
        await refused(runs.accept(*again), "single start")
        gate.set()
        assert await one
        assert runs.numbers() == [1, 2]
        await runs.close()

    play(go())


def test_a_start_is_given_up_when_its_run_ends(world):
    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        one = asyncio.create_task(runs.accept(*world.offer()))
        await settle()
        assert runs.news.is_set()  # so that the server is asked about it
        runs.end(1, "aborted")
        runs.end(1, "aborted")
        text = await refused(one, "run_ended", error=FailedPreconditionError)
        assert "given up before it began here: aborted" in text
        assert runs.numbers() == []
        world.gate.set()
        assert await runs.accept(*world.offer())  # nothing was used up
        await runs.close()

    play(go())


def test_a_start_that_is_given_up_while_it_is_unpacked_leaves_nothing(world, monkeypatch):
    unpacked, go_on = asyncio.Event(), threading.Event()

    async def go():
        loop = asyncio.get_running_loop()
        runs = world.runs()
        real = runs._folders.unpack

        def unpack(*args):
            found = real(*args)
            loop.call_soon_threadsafe(unpacked.set)
            assert go_on.wait(10)
            return found

        monkeypatch.setattr(runs._folders, "unpack", unpack)
        one = asyncio.create_task(runs.accept(*world.offer()))
        await unpacked.wait()
        runs.end(1, "aborted")
        go_on.set()
        await refused(one, "run_ended", error=FailedPreconditionError)
        await runs.until_ended(1)
        await runs._endings.until_deleted()
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        await runs.close()

    play(go())


def test_a_start_is_given_up_when_its_time_is_over(world):
    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        soon = datetime.now(UTC) + timedelta(seconds=0.1 - world.kit.site.clock_skew_s)
        before = soon - timedelta(hours=1)
        await refused(
            runs.accept(*world.offer(issued_at=before, not_after=soon)),
            "signed not_after",
            error=FailedPreconditionError,
        )
        assert (runs.numbers(), list(world.home.iterdir())) == ([], [])
        await runs.close()

    play(go())


def test_a_start_by_another_order_takes_the_place_of_one_that_waits(world):
    """The server has withdrawn the first, and does not say so any more."""
    data = world.packed()

    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        tokens = [runs.token(1)]
        one = asyncio.create_task(runs.accept(*world.offer(1, 1, data=data)))
        await settle()
        tokens.append(runs.token(1))
        same = asyncio.create_task(runs.accept(*world.offer(1, 1, data=data)))
        await settle()
        assert runs.token(1) is tokens[-1]
        two = asyncio.create_task(runs.accept(*world.offer(1, 2, data=data)))
        for given_up in (one, same):
            text = await refused(given_up, "run_ended", error=FailedPreconditionError)
            assert "it was started anew" in text
        await settle()
        tokens.append(runs.token(1))
        world.gate.set()
        assert await two == {"isolation": "sandbox"}
        assert runs.get(1).record.submission_id == f"{2:032x}"
        tokens.append(runs.token(1))
        assert tokens[0] is None
        assert len(set(map(id, tokens))) == len(tokens)
        await runs.close()

    play(go())


def test_who_gives_a_start_up_ends_it(world):
    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        one = asyncio.create_task(runs.accept(*world.offer()))
        await settle()
        one.cancel()
        await asyncio.wait([one])
        assert (one.cancelled(), runs.numbers()) == (True, [])
        other = asyncio.create_task(runs.accept(*world.offer()))
        await settle()
        await runs.close()
        assert other.cancelled()

    play(go())


def test_a_place_is_reserved_while_a_run_is_unpacked(world, monkeypatch):
    world.local(max_runs=1)

    async def go():
        runs = world.runs()
        loop, real, others = asyncio.get_running_loop(), runs._folders.unpack, []

        def unpack(*args):
            if not others:
                others.append(
                    asyncio.run_coroutine_threadsafe(
                        runs.accept(*world.offer(2, 2, data=world.packed(code="x = 2"))), loop
                    )
                )
                assert "max_runs = 1" in str(others[0].exception(10))
            return real(*args)

        monkeypatch.setattr(runs._folders, "unpack", unpack)
        assert await runs.accept(*world.offer())
        assert runs.numbers() == [1]
        await runs.close()

    play(go())


# ---- the end of runs and processes


def test_the_end_of_a_run(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        await settle()
        spec = processes.made[0].spec
        spec.log.write_text("what happened")
        spec.state.mkdir()
        await end(runs, 1, "finished")
        assert processes.made[0].state == "aborted"
        assert (runs.numbers(), runs.get(1)) == ([], None)
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        assert spec.log.read_text() == "what happened"
        await end(runs, 1, "finished")
        assert world.runs().numbers() == []

    play(go())


def test_whoever_follows_the_log_hears_its_lines_and_its_end(world, processes):
    async def go():
        heard = []
        policy = Policy(world.kit, "sandbox")
        runs = SiteRuns(
            world.kit,
            policy,
            world.fetch,
            world.spool(),
            world.stop_tasks,
            lambda: world.trust,
            lambda *_: None,
            lambda *line: heard.append(line),
            heard.append,
        )
        assert (runs.over(1), runs.submitter(1)) == (False, ("", ""))
        await runs.accept(*world.offer())
        await settle()
        assert (runs.over(1), runs.submitter(1)) == (False, ("amy", world.offer()[2].organisation))
        processes.made[0].spec.on_lines("now", "job", ["one"])
        await end(runs, 1, "finished")
        await end(runs, 2, "finished")
        assert heard == [(1, "now", "job", ["one"]), 1]
        assert (runs.over(1), runs.over(2)) == (True, False)
        assert runs.submitter(1)[0] == "amy"
        restarted = world.runs()
        assert (restarted.over(1), restarted.submitter(1)) == (True, ("", ""))

    play(go())


def test_the_submitter_is_known_again_after_a_restart(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        await runs.close()
        restarted = world.runs()
        assert restarted.submitter(1)[0] == "amy"
        await restarted.close()

    play(go())


@pytest.mark.parametrize("how", ["end", "close"])
def test_a_process_that_is_starting_is_ended_too(world, processes, how):
    async def go():
        processes.gate = asyncio.Event()
        runs = world.runs()
        await runs.accept(*world.offer())
        await settle()
        assert processes.made[0].state == "starting"
        await (end(runs, 1, "aborted") if how == "end" else runs.close())
        processes.gate.set()
        await settle()
        assert [process.state for process in processes.made] == ["cancelled"]

    play(go())


def test_a_crash_is_tried_again(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        run = runs.get(1)
        processes.script[:] = [RunProcessCrashed("crashed")] * (site_run.MAX_CRASHES - 1)
        assert await run.execute(TASK, None, world.folder / "work") == "done"
        assert len(processes.made) == site_run.MAX_CRASHES
        processes.script[:] = [RunProcessCrashed("crashed", "tail")] * site_run.MAX_CRASHES
        with pytest.raises(RunProcessCrashed, match="crashed") as error:
            await run.execute(TASK, None, world.folder / "work")
        assert error.value.log_tail == "tail"
        assert all(process.state == "aborted" for process in processes.made)
        assert not run.turn.locked()
        await runs.close()

    play(go())


def test_a_start_that_fails_is_told_with_the_first_task(world, processes, monkeypatch, caplog):
    async def broken(self):
        raise RunProcessCrashed("no interpreter")

    async def go():
        runs = world.runs()
        monkeypatch.setattr(processes, "start", broken)
        with caplog.at_level(logging.WARNING):
            assert await runs.accept(*world.offer())
            await settle()
        assert "its process does not start: no interpreter" in caplog.text
        caplog.clear()
        with pytest.raises(RunProcessCrashed, match="no interpreter"):
            await runs.get(1).execute(TASK, None, world.folder / "work")
        assert caplog.text.count("crashed (") == site_run.MAX_CRASHES
        await runs.close()

    play(go())


def test_a_process_that_is_killed_while_it_starts_is_started_again(world, processes, monkeypatch):
    real, kills = processes.start, [RunProcessCrashed("was killed by SIGKILL")] * 2

    async def start(self):
        if kills:
            raise kills.pop()
        await real(self)

    async def go():
        runs = world.runs()
        monkeypatch.setattr(processes, "start", start)
        await runs.accept(*world.offer())
        await settle()
        assert await runs.get(1).execute(TASK, None, world.folder / "work") == "done"
        assert not kills
        await runs.close()

    play(go())


def short(number):
    """Return a disk that is full, and so on, once."""
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_a_shortage_is_waited_for_with_a_new_process_and_is_no_crash(world, processes, number):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        run = runs.get(1)
        processes.script[:] = [short(number)] * (site_run.MAX_CRASHES + 1)
        assert await run.execute(TASK, None, world.folder / "work") == "done"
        assert len(processes.made) == site_run.MAX_CRASHES + 2
        assert run.troubles.held_up == ""
        assert len(run.troubles.lines) == 1
        await runs.close()

    play(go())


@pytest.mark.parametrize("outcome", [TaskFailure("no space"), RunProcessCrashed("no space")])
def test_what_fails_while_the_disk_has_no_room_is_tried_when_it_has(
    world, processes, monkeypatch, outcome
):
    """Job code that finds the disk full fails; whether it says so is its own affair."""

    def look(folder, count):
        looks.append(count)
        if len(looks) in (2, 3):  # after the failure, and when its leavings are gone
            raise ResourceExhaustedError("no room")

    looks: list[int] = []
    model = world.folder / "model"
    model.write_bytes(bytes(1000))

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        monkeypatch.setattr(site_run, "demand_room", look)
        processes.script[:] = [outcome]
        assert await runs.get(1).execute(TASK, model, world.folder / "work") == "done"
        assert set(looks) == {3000 + site_run.SMALL_BYTES}
        await runs.close()

    play(go())


def test_a_task_does_not_begin_without_room_for_its_result(world, processes, monkeypatch):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        run = runs.get(1)
        refusals = [ResourceExhaustedError("no room")] * 2

        def look(*_):
            if refusals:
                raise refusals.pop()

        monkeypatch.setattr(site_run, "demand_room", look)
        assert await run.execute(TASK, None, world.folder / "work") == "done"
        assert not refusals
        await runs.close()

    play(go())


def test_a_full_disk_is_waited_for_when_a_run_is_taken_on(world, monkeypatch):
    def full(path, data):
        if path.name == "submissions.json" and refusals:
            raise refusals.pop()
        write(path, data)

    refusals = [short(errno.ENOSPC)] * 2
    write = run_folders.write_atomic

    async def go():
        runs = world.runs()
        monkeypatch.setattr(run_folders, "write_atomic", full)
        assert await runs.accept(*world.offer())
        assert not refusals
        await runs.close()

    play(go())


def box_of(run):
    """Return where the job's code leaves what it makes."""
    box = Box(run.folder / site_run.PROCESS_FOLDER)
    return box.box


def test_a_failure_whose_own_leavings_fill_the_disk_is_an_answer(world, processes, monkeypatch):
    """And not a shortage to be waited for: nobody else would make room."""

    def look(folder, count):
        if (box_of(runs.get(1)) / "state.bin").exists():
            raise ResourceExhaustedError("no room")

    async def leave(self, task, model, work):
        (box_of(runs.get(1)) / "state.bin").write_bytes(bytes(1000))
        return TaskFailure("ValueError: a plain defect")

    runs = world.runs()

    async def go():
        await runs.accept(*world.offer())
        monkeypatch.setattr(site_run, "demand_room", look)
        monkeypatch.setattr(processes, "execute", leave)
        found = await runs.get(1).execute(TASK, None, world.folder / "work")
        assert found.error == "ValueError: a plain defect"
        assert not any(box_of(runs.get(1)).iterdir())
        await runs.close()

    play(go())


def test_the_results_of_tasks_before_take_no_room_from_the_next(world, monkeypatch):
    def look(folder, count):
        assert not any(box_of(runs.get(1)).iterdir())

    runs = world.runs()

    async def go():
        await runs.accept(*world.offer())
        (box_of(runs.get(1)) / "result.safetensors").write_bytes(bytes(1000))
        monkeypatch.setattr(site_run, "demand_room", look)
        assert await runs.get(1).execute(TASK, None, world.folder / "work") == "done"
        await runs.close()

    play(go())


def test_what_did_not_fit_is_demanded_before_the_next_try(world, processes, monkeypatch):
    async def full(self, task, model, work):
        monkeypatch.setattr(processes, "execute", done)
        (box_of(runs.get(1)) / "state.bin").write_bytes(bytes(5_000_000))
        raise short(errno.ENOSPC)

    async def done(self, task, model, work):
        return "done"

    demanded: list[int] = []
    runs = world.runs()

    async def go():
        await runs.accept(*world.offer())
        monkeypatch.setattr(site_run, "demand_room", lambda _, count: demanded.append(count))
        monkeypatch.setattr(processes, "execute", full)
        assert await runs.get(1).execute(TASK, None, world.folder / "work") == "done"
        assert demanded == [site_run.SMALL_BYTES, 10_000_000 + site_run.SMALL_BYTES]
        await runs.close()

    play(go())


def test_a_process_is_known_until_its_end_is_through(world, processes, monkeypatch):
    """An end that was cut off by a cancel is asked for again, else the tree would live on."""
    begun, ends = asyncio.Event(), []

    async def slowly(self):
        ends.append(self)
        if len(ends) == 1:
            begun.set()
            await asyncio.Event().wait()
        self.state = "aborted"

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        await settle()
        monkeypatch.setattr(processes, "abort", slowly)
        processes.script[:] = [short(errno.ENOSPC)]
        task = asyncio.create_task(runs.get(1).execute(TASK, None, world.folder / "work"))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [each.state for each in ends] == ["aborted", "aborted"]
        await runs.close()

    play(go())


# ---- ends that meet something


@pytest.fixture
def slow_end(processes, monkeypatch):
    """Processes take their time to end."""
    gone = asyncio.Event()

    async def abort(self):
        self.state = "ending"
        await gone.wait()
        self.state = "aborted"

    monkeypatch.setattr(processes, "abort", abort)
    return gone


def test_a_run_is_accepted_while_its_place_is_left_and_starts_when_it_is(
    world, processes, slow_end
):
    world.local(max_runs=1)

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        await settle()
        runs.end(1, "aborted")
        await settle()
        await runs.accept(*world.offer(2, 2, data=world.packed(code="x = 2")))
        fast = world.packed(environment="fast")
        await runs.accept(*world.offer(3, 3, data=fast))
        task = asyncio.create_task(runs.ready(2))
        await settle()
        assert [(each.spec.run, each.state) for each in processes.made] == [
            (1, "ending"),
            (3, "running"),  # its environment has room
        ]
        assert runs.get(2).report()[2] == "deployed, a run before it ends"
        assert not task.done()
        slow_end.set()
        assert await task is runs.get(2)
        await settle()
        assert [(each.spec.run, each.state) for each in processes.made] == [
            (1, "aborted"),
            (3, "running"),
            (2, "running"),
        ]
        assert runs.get(2).report()[2] == "deployed"
        await runs.close()

    play(go())


def test_runs_that_wait_for_a_place_begin_one_by_one(world, processes, monkeypatch):
    world.local(max_runs=2)
    gates = {1: asyncio.Event(), 2: asyncio.Event()}

    async def abort(self):
        if gate := gates.get(self.spec.run):
            await gate.wait()
        self.state = "aborted"

    monkeypatch.setattr(processes, "abort", abort)

    def started() -> list[int]:
        return [each.spec.run for each in processes.made]

    async def go():
        runs = world.runs()
        for number in (1, 2):
            await runs.accept(*world.offer(number, number))
        await settle()
        for number in (1, 2):
            runs.end(number, "aborted")
        for number in (3, 4):
            await runs.accept(*world.offer(number, number))
        await settle()
        assert started() == [1, 2]
        gates[2].set()
        await runs.until_ended(2)
        await settle()
        assert started() == [1, 2, 3]
        # A run that ends while it waits for its place leaves no trace of that.
        runs.end(4, "aborted")
        await runs.until_ended(4)
        await runs.accept(*world.offer(5, 5))
        gates[1].set()
        await runs.until_ended(1)
        await settle()
        assert started() == [1, 2, 3, 5]
        await runs.close()

    play(go())


@pytest.mark.parametrize("where", ["tasks", "process", "rename", "sync", "delete"])
def test_an_end_is_tried_until_it_is_through(world, processes, monkeypatch, where):
    errors = [short(errno.EMFILE), short(errno.EIO), ValueError("a defect")]
    ended = []

    def failing(real):
        def call(*args):
            if errors:
                raise errors.pop(0)
            return real(*args)

        return call

    def failing_async(real):
        async def call(*args):
            if errors:
                raise errors.pop(0)
            await real(*args)

        return call

    async def go():
        runs = world.runs()
        runs._endings._on_end = ended.append
        await runs.accept(*world.offer())
        await settle()
        if where == "tasks":
            runs._stop_tasks = failing_async(runs._stop_tasks)
        elif where == "process":
            monkeypatch.setattr(processes, "abort", failing_async(processes.abort))
        elif where == "rename":
            monkeypatch.setattr(
                run_folders, "replace_durably", failing(run_folders.replace_durably)
            )
        elif where == "sync":

            def rename(source, target):
                os.replace(source, target)
                raise errors.pop(0)

            monkeypatch.setattr(run_folders, "replace_durably", rename)
            monkeypatch.setattr(run_folders, "fsync_dir", failing(run_folders.fsync_dir))
        else:
            monkeypatch.setattr(ending, "remove", failing(ending.remove))
        await end(runs, 1, "finished")
        assert not errors
        assert (processes.made[0].state, world.stopped[-1], ended) == ("aborted", 1, [1])
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        await runs.close()

    play(go())


def test_a_process_is_ended_also_if_its_tasks_cannot_be(world, processes):
    async def never(run):
        tried.set()
        raise short(errno.EMFILE)

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        await settle()
        runs._stop_tasks = never
        runs.end(1, "finished")
        await tried.wait()
        await settle()
        assert processes.made[0].state == "aborted"
        await runs.close()

    tried = asyncio.Event()
    play(go())


def test_an_end_that_fails_does_not_hold_up_the_end_of_the_process(world, processes, monkeypatch):
    """What is left is done by the next one, once the server says again that the run has ended."""
    monkeypatch.setattr(retrying, "backoff_s", lambda *_: 3600.0)
    failed = asyncio.Event()

    async def never(_self):
        failed.set()
        raise short(errno.EMFILE)

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(1, 1))
        await runs.accept(*world.offer(2, 2))
        await settle()
        aborts = processes.abort
        monkeypatch.setattr(processes.made[0], "abort", lambda: never(processes.made[0]))
        runs.end(1, "finished")
        await failed.wait()
        await settle()
        await runs.close()
        assert processes.abort is aborts
        assert processes.made[1].state == "aborted"
        again = world.runs()
        assert again.numbers() == [1, 2]
        await end(again, 1, "finished")
        assert sorted(path.name for path in world.home.iterdir()) == ["run-2", "submissions.json"]
        await again.close()

    play(go())


def test_a_process_that_cannot_be_ended_keeps_no_other(world, processes, monkeypatch):
    async def never():
        raise short(errno.EMFILE)

    async def go():
        runs = world.runs()
        for number in (1, 2):
            await runs.accept(*world.offer(number, number))
        await settle()
        monkeypatch.setattr(processes.made[0], "abort", never)
        await runs.close()
        assert processes.made[1].state == "aborted"

    play(go())


def test_what_a_run_leaves_elsewhere_is_swept_at_its_end(world, monkeypatch):
    swept = []
    monkeypatch.setattr(module, "sweep_scratch", lambda *args: swept.append(args))

    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        await end(runs, 1, "finished")
        assert swept == [(world.kit.folder, 1)]
        await runs.close()

    play(go())


class Killed(BaseException):
    """A kill -9."""


CALLS = ["replace", "rename", "unlink", "rmdir", "open", "fsync"]


def test_a_kill_at_any_instant_of_an_end_leaves_a_run_or_a_leftover(world, monkeypatch):
    """It is over, or it is whole; and what is left is deleted at the next start."""

    async def begin(number: int) -> SiteRuns:
        runs = world.runs()
        await runs.accept(*world.offer(1, number, data=data))
        state = world.home / "run-1" / "state" / "1"
        state.mkdir(parents=True)
        (state / "best").write_bytes(b"state")
        cache = world.home / "run-1" / "process" / "box" / "cache"
        cache.mkdir(parents=True)
        (cache / "file").write_text("cached")
        cache.chmod(0o500)
        return runs

    def whole() -> bool:
        return (world.home / "run-1" / "state" / "1" / "best").exists()

    def killed_at(count: int, change) -> bool:
        """Make one change; return whether the kill came before its end."""
        calls = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= count:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                change()
            except Killed:
                return True
        return False

    async def go():
        outcomes = set()
        for count in range(1, 100):
            runs = await begin(count)
            leftover = runs._folders.leftover()

            def change(runs=runs, leftover=leftover):
                runs._folders.retire(1, leftover)
                ending.remove(leftover)

            killed = killed_at(count, change)
            await runs.close()
            again = world.runs()
            assert whole() == (again.numbers() == [1])
            outcomes.add(tuple(again.numbers()))
            await end(again, 1, "finished")
            assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
            await again.close()
            if not killed:
                assert outcomes == {(1,), ()}
                return
        raise AssertionError("it never came to its end")

    data = world.packed()
    play(go())


def test_folders_without_a_record_are_deleted_at_the_start(world):
    """As the removal of releases before has left them."""
    for name in ("run-7/state", ".tmp-gone-1/code", "other"):
        (world.home / name).mkdir(parents=True)
    (world.home / "run-7" / "state").chmod(0o500)
    (world.home / ".tmp-file").write_text("cut off")

    async def go():
        runs = world.runs()
        assert not (world.home / "run-7").exists()
        await runs._endings.until_deleted()
        assert [path.name for path in world.home.iterdir()] == ["other"]
        assert runs.numbers() == []
        await runs.close()

    play(go())


def test_a_record_that_nobody_can_look_for_is_not_missing(world, accepted, monkeypatch, patient):
    real = Path.exists

    def exists(path):
        if path.name == "start.json":
            raise short(errno.EIO)
        return real(path)

    async def go():
        with monkeypatch.context() as patch:
            patch.setattr(Path, "exists", exists)
            runs = world.runs()
        assert await runs.ready(1) is not None
        await runs.close()

    play(go())


def test_submissions_of_starts_beside_each_other_are_all_noted(world):
    async def go():
        runs = world.runs()
        await asyncio.gather(*(runs.accept(*world.offer(n, n)) for n in range(1, 5)))
        for number in range(1, 5):
            await end(runs, number, "finished")
        await runs.close()
        again = world.runs()
        for number in range(1, 5):
            await refused(again.accept(*world.offer(number, number)), "single start")

    world.local(max_runs=4)
    play(go())
