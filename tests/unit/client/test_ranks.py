"""Several processes that work on one task: what they say, and that nothing of them is left."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from flplatform.client import executors, process_tree, ranks
from flplatform.client.executors import JobCodeError, Outcome, RunProcess, RunProcessCrashed
from flplatform.client.frames import MAX_ERROR_CHARS, MAX_TRACEBACK_BYTES
from flplatform.client.ranks import Answers, demand_torch, failure_of, torchrun, variables
from flplatform.client.replies import Done, Failure, Result
from flplatform.core.config import Environment
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.core.job import Watch
from flplatform.core.messages import TaskFailure
from flplatform.files.modelfile import load
from tests.support.jobs import ECHO, Site, left, running
from tests.support.ranks import fake_torchrun

TASK = "7/1/train/site-1"

# Each rank leaves its number, and rank 0 goes on only when all have: so they are there together.
TOGETHER = """
import time
import numpy as np

def meet(context, name):
    context.state_dir.joinpath(f"{name}-{context.rank}").touch()
    while len(list(context.state_dir.glob(f"{name}-*"))) < context.world_size:
        time.sleep(0.005)

def train(model, context):
    context.log_metric("rank", context.rank)
    meet(context, "train")
    if context.rank:
        return None
    return {"w": model["w"] + context.world_size}, 3, {"seed": float(context.seed)}

def validate(model, context):
    meet(context, f"validate-{model['w'][0]:g}")
    return {"total": float(model["w"].sum())}, 2
"""
STUCK = """
import os, subprocess, sys, time

def train(model, context):
    fails = context.rank == context.args.get("fails")
    if context.round == 1 and not fails:
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print(f"rank {context.rank} is at work", flush=True)
    context.state_dir.joinpath(str(os.getpid())).touch()
    if context.round == 1 and fails:
        raise ValueError("rank %d has no data" % context.rank)
    if context.round == 1:
        time.sleep(1000)
    return dict(model), 1
"""


@pytest.fixture
def torchrun_is_faked(monkeypatch):
    monkeypatch.setattr(ranks, "torchrun", fake_torchrun)
    monkeypatch.setattr(ranks, "demand_torch", lambda *_: None)


def result(task: str = TASK) -> Result:
    fields = {"examples": 1, "received_examples": 0, "local_examples": 0}
    numbers = {"metrics": {}, "received": {}, "local": {}}
    return Result(type="result", task=task, file=None, **fields, **numbers)


def done(task: str = TASK) -> Done:
    return Done(type="done", task=task)


def failure(error: str, traceback: str = "") -> Failure:
    return Failure(type="failure", task=TASK, error=error, traceback=traceback)


# ---- what several answers come to


def test_the_result_is_rank_0s_once_all_have_answered():
    answers = Answers(TASK, 3)
    for rank, said in ((1, done()), (0, result()), (2, done())):
        assert answers.reply() is None
        answers.add(rank, said)
    assert (answers.reply(), answers.complete, answers.failed) == (result(), True, False)


def test_any_ranks_failure_is_the_tasks_and_names_the_rank():
    answers = Answers(TASK, 3)
    answers.add(0, result())
    answers.add(2, failure("E: no data", "line 3"))
    assert (answers.failed, answers.complete) == (True, False)
    assert answers.reply() == failure("rank 2: E: no data", "rank 2:\nline 3")
    answers.add(1, failure("R: connection closed"))
    assert answers.reply().error == "rank 2: E: no data; rank 1: R: connection closed"


def test_a_failure_of_the_only_process_is_told_as_it_is():
    answers = Answers(TASK, 1)
    answers.add(0, failure("E", "T"))
    assert answers.reply() == failure("E", "T")


@pytest.mark.parametrize(
    ("rank", "said", "error"),
    [
        (0, done(), "rank 0 sent a done"),
        (1, result(), "rank 1 sent a result"),
        (1, done("7/2/train/site-1"), "answered '7/2/train/site-1', not"),
    ],
)
def test_an_answer_that_is_not_this_ranks_is_refused(rank, said, error):
    with pytest.raises(InvalidArgumentError, match=error):
        Answers(TASK, 2).add(rank, said)


def test_a_rank_answers_once():
    answers = Answers(TASK, 2)
    answers.add(1, done())
    with pytest.raises(InvalidArgumentError):
        answers.add(1, failure("E"))


def test_many_failures_stay_within_the_bounds_of_one():
    long = {
        rank: failure(f"{rank} {'x' * (MAX_ERROR_CHARS - 10)}", "é" * (MAX_TRACEBACK_BYTES // 2))
        for rank in range(1000)
    }
    found = failure_of(TASK, long)
    assert len(found.error) <= MAX_ERROR_CHARS
    assert len(found.traceback.encode()) <= MAX_TRACEBACK_BYTES
    assert found.error.count("rank ") == 3
    same = failure_of(None, {rank: failure("E") for rank in (3, 1)})
    assert (same.task, same.error, same.traceback) == (None, "rank 3: E", "")


# ---- how they are started


def test_torchrun_is_given_the_interpreter_and_loopback(monkeypatch):
    argv = torchrun("/opt/python", 4, ["/opt/python", "-m", "x"])
    assert argv[:4] == ["/opt/python", "-P", "-m", "torch.distributed.run"]
    assert argv[argv.index("--nproc-per-node") + 1] == "4"
    assert argv[-4:] == ["--no-python", "/opt/python", "-m", "x"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [variables(n)["OMP_NUM_THREADS"] for n in (2, 16)] == ["4", "1"]


def test_an_environment_without_torch_is_told_what_to_install(site, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o700)
    spec = site.spec(processes=2, environment=Environment(python=str(python)))

    async def run():
        process = RunProcess(spec)
        with pytest.raises(FailedPreconditionError) as caught:
            await process.start(30)
        assert left(process) == []
        return caught.value

    error = asyncio.run(run())
    assert f"need torch in environment default: {python} has none" in error.message
    assert error.hint == f"{python} -m pip install torch"
    python.write_text("#!/bin/sh\nexit 0\n")
    demand_torch(str(python), "default")


# ---- real processes


def test_ranks_do_each_task_together(site, isolation, torchrun_is_faked):
    async def run():
        phases, metrics = [], []
        spec = site.spec(TOGETHER, processes=3, watch=Watch(metric="total"), isolation=isolation)
        async with running(
            spec, on_phase=phases.append, on_metric=lambda *m: metrics.append(m)
        ) as process:
            model = site.model()
            for number in (1, 2):
                outcome = await site.do(process, "train", model, number)
                assert outcome == Outcome("result.safetensors", 3, {"seed": 5}, {"total": 0}, 2)
                assert load(site.work / "result.safetensors")["w"].tolist() == [3, 3, 3]
            # All of them validated the model that rank 0 trained.
            names = {path.name for path in (site.work / "state" / "user").iterdir()}
            assert {f"validate-3-{rank}" for rank in range(3)} <= names
            assert phases == ["validate_received", "train", "validate_trained"] * 2
            assert metrics == [("rank", 0.0, None)] * 2
            validated = await site.do(process, "validate.global", site.model("other"))
            assert validated == Outcome(None, 2, {"total": 0.0}, {}, 0)
            assert list(process._scratch.folder.glob("secret")) == []

    asyncio.run(run())
    assert "3 processes start" in site.log.read_text()


def test_a_loop_runs_on_every_rank_and_ends_by_itself(site, torchrun_is_faked):
    code = """
    from flplatform.client.api import receive, send

    while (task := receive()) is not None:
        send(None if task.context.rank else ({"w": task.model["w"]}, 1))
    print("a loop has ended")
    """

    async def run():
        process = RunProcess(site.spec(code, script=True, processes=2))
        await process.start(30)
        assert (await site.do(process, "train", site.model())).examples == 1
        await process.close(10)
        assert left(process) == []

    asyncio.run(run())
    assert site.log.read_text().count("a loop has ended") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_any_rank_fails_the_task_without_waiting_for_the_others(
    site, isolation, torchrun_is_faked, rank
):
    async def run():
        spec = site.spec(STUCK, args={"fails": rank}, processes=2, isolation=isolation)
        async with running(spec) as process:
            model = site.model()
            failed = await asyncio.wait_for(site.do(process, "train", model), 60)
            assert isinstance(failed, TaskFailure)
            assert failed.error == f"rank {rank}: ValueError: rank {rank} has no data"
            assert 'job.py", line 11' in failed.traceback
            assert process.spent
            assert left(process) == []
            with pytest.raises(RunProcessCrashed, match="a rank had failed its task"):
                await site.do(process, "train", model, 2)

    asyncio.run(run())


def test_what_rank_0_returns_is_still_checked(site, torchrun_is_faked):
    async def run():
        code = ECHO.replace("array + 1", "array[:1]")
        async with running(site.spec(code, processes=2)) as process:
            failed = await site.do(process, "train", site.model())
            assert failed.error.startswith("rank 0: ")

    asyncio.run(run())


async def at_work(site: Site, count: int) -> None:
    while site.log.read_text().count("is at work") < count:
        await asyncio.sleep(0.02)


def rank_of(process: RunProcess, rank: int) -> psutil.Process:
    return process._conversation.peers[rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_a_crash_that_leaves_nothing(site, isolation, torchrun_is_faked, rank):
    async def run():
        spec, model = site.spec(STUCK, processes=2, isolation=isolation), site.model()
        async with running(spec) as process:
            doing = asyncio.create_task(site.do(process, "train", model))
            await at_work(site, 2)
            rank_of(process, rank).send_signal(signal.SIGKILL)
            with pytest.raises(RunProcessCrashed, match=r"; rank [01] went first"):
                await asyncio.wait_for(doing, 60)
            assert left(process) == []
        async with running(spec) as process:  # as a site does after a crash
            assert (await site.do(process, "train", model, 2)).examples == 1

    asyncio.run(run())


def test_an_abort_ends_every_rank_and_what_they_started(site, isolation, torchrun_is_faked):
    async def run():
        async with running(site.spec(STUCK, processes=3, isolation=isolation)) as process:
            doing = asyncio.create_task(site.do(process, "train", site.model()))
            await at_work(site, 3)
            sessions = {os.getsid(rank_of(process, rank).pid) for rank in range(3)}
            assert len(sessions) == 3, "the fake is as torchrun is"
            # The launcher, torchrun, three ranks, three strays; bubblewrap's own process counts
            # too, and what is being executed shows its mark only when it runs.
            while len(process_tree.find(process.mark)) < 8:
                await asyncio.sleep(0.02)
            scratch = str(process._scratch.folder)
            began = time.monotonic()
            await process.abort(80)
            assert time.monotonic() - began < 80
            assert left(process) == []
            with pytest.raises(RunProcessCrashed, match="was ended"):
                await doing
            ps = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
            assert scratch not in ps.stdout

    asyncio.run(asyncio.wait_for(run(), 110))


PARENT = """
import asyncio, sys
from pathlib import Path
from flplatform.client import executors, ranks
from flplatform.client.sandbox import Level
from tests.support.jobs import Site
from tests.support.ranks import fake_torchrun
from tests.unit.client.test_ranks import STUCK, at_work

ranks.torchrun, ranks.demand_torch = fake_torchrun, lambda *_: None
folder, isolation, tool = Path(sys.argv[1]), *sys.argv[2:]
executors.available_level = lambda: Level("sandbox", tool)

async def run():
    site = Site(folder)
    process = executors.RunProcess(site.spec(STUCK, processes=2, isolation=isolation))
    await process.start(30)
    doing = asyncio.create_task(site.do(process, "train", site.model()))
    await at_work(site, 2)
    print(process.mark, flush=True)
    await doing

asyncio.run(run())
"""


def test_a_killed_parent_takes_every_rank_with_it(tmp_path, isolation):
    tool = executors.available_level().tool if isolation == "sandbox" else "none"
    argv = [sys.executable, "-c", PARENT, str(tmp_path), isolation, tool]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        mark = parent.stdout.readline().strip()
        while len(process_tree.find(mark)) < 5:  # what is being executed shows it a bit later
            time.sleep(0.02)
        parent.kill()
    deadline = time.monotonic() + 60
    while process_tree.find(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process_tree.find(mark) == []


def test_code_that_cannot_be_loaded_names_its_rank(site, torchrun_is_faked):
    code = ECHO + "\nimport os\nif os.environ['RANK'] == '1': raise OSError('no such GPU')\n"

    async def run():
        process = RunProcess(site.spec(code, processes=2))
        with pytest.raises(JobCodeError, match="rank 1: OSError: no such GPU"):
            await process.start(30)
        assert left(process) == []

    asyncio.run(run())
