"""Which runs a site takes on, and what it remembers of them."""

import asyncio
import dataclasses
import errno
import json
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from flplatform.client import retrying, site_run
from flplatform.client import site_runs as module
from flplatform.client.box import Box
from flplatform.client.executors import RunProcessCrashed
from flplatform.client.policy import Policy
from flplatform.client.requests import StartBody
from flplatform.client.site_runs import SiteRuns
from flplatform.client.spool import Spool, SpooledResult
from flplatform.core.config import Environment, Environments, SitePolicy
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
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

    def packed(self, who: str = "amy", environment: str = "default", code: str = "x = 1") -> bytes:
        key, certificate = self.people.signers[who]
        text = f"{JOB}environment: {environment}\n"
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
            patch.setattr(module, "write_atomic", full)
            with pytest.raises(OSError, match="full"):
                await runs.accept(*world.offer())
        assert list(world.home.iterdir()) == []
        assert await runs.accept(*world.offer())
        await runs.close()

    write = module.write_atomic
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
        ending = asyncio.create_task(end(runs, 1, "withdrawn"))
        await settle()
        joining = asyncio.create_task(runs.accept(*world.offer(run=1, number=2, data=data)))
        await settle()
        gate.set()
        await asyncio.gather(ending, joining)
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
        with monkeypatch.context() as patch:

            def failing(*_):
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(Spool, "drop_run", failing)
            await end(runs, 1, "withdrawn")
        assert "its results stay in the spool: [Errno 5]" in caplog.text
        assert not (world.home / "run-1").exists()
        assert left() == ["1/1/train/site-1"]
        await runs.accept(*world.offer(run=1, number=3, data=data))
        assert left() == []
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

        async def full(blob):
            raise ResourceExhaustedError("full")

        with monkeypatch.context() as patch:
            patch.setattr(runs, "_fetch", full)
            await refused(runs.accept(*offer), error=ResourceExhaustedError)
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
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        assert world.runs().numbers() == []
    assert "run-1 is not resumed" in caplog.text
    assert text in caplog.text


def replace(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_a_run_is_resumed(world, accepted, processes):
    async def go():
        (world.home / ".tmp-9").mkdir()
        runs = world.runs()
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
    assert world.runs().numbers() == [1]


def test_a_replaced_package_is_not_resumed(world, accepted, caplog):
    path = world.blobs.path(accepted[3].digest)
    data = path.read_bytes()
    replace(path, world.packed(code="steal()"))  # well signed, but not what was started
    not_resumed(world, caplog, "is not the package that was signed")
    replace(path, data[:-1])
    not_resumed(world, caplog, "is not the package that was signed")
    path.unlink()
    not_resumed(world, caplog, "there is no blob")
    replace_with = world.blobs.create(lambda file: file.write_bytes(data))
    assert replace_with.digest == accepted[3].digest
    assert world.runs().numbers() == [1]


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


def test_a_narrowed_policy_is_not_resumed(world, accepted, caplog):
    world.local(submitters=("o:site",))
    not_resumed(world, caplog, "policy submitters = o:site")
    world.local()
    assert world.runs().numbers() == [1]


def test_a_revoked_submitter_is_not_resumed(world, caplog):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(who="rex", data=world.packed("rex")))
        await runs.close()

    world.trust = world.people.before
    play(go())
    assert world.runs().numbers() == [1]
    world.trust = world.people.kit.trust
    not_resumed(world, caplog, "it is revoked")


def test_one_bad_run_does_not_keep_the_others(world, accepted):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(2, 2, data=world.packed(code="x = 2")))
        await runs.close()

    play(go())
    world.blobs.delete(accepted[3].digest)
    assert world.runs().numbers() == [2]


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
    write = module.write_atomic

    async def go():
        runs = world.runs()
        monkeypatch.setattr(module, "write_atomic", full)
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
