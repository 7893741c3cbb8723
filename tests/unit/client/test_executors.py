"""Real run processes: what they bring back, and that nothing of them is left."""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from flplatform.client import executors, process_tree
from flplatform.client.executors import JobCodeError, Outcome, RunProcess, RunProcessCrashed
from flplatform.client.sandbox import Level, sweep_scratch
from flplatform.core.config import Environment
from flplatform.core.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    ResourceExhaustedError,
)
from flplatform.core.job import Watch
from flplatform.core.messages import TaskFailure
from flplatform.files import scratch
from flplatform.files.modelfile import load
from tests.support.jobs import ECHO, Site, left, running
from tests.unit.client.test_process_tree import ends, no_descriptor

SCRIPT = """
from flplatform.client.api import receive, send

while (task := receive()) is not None:
    if task.kind == "train":
        send(({name: array + 1 for name, array in task.model.items()}, 3))
    else:
        send(({"total": float(task.model["w"].sum())}, 2))
"""
REACHES = """
import os, socket

def attempt(action):
    try:
        action()
        return 1.0
    except OSError:
        return 0.0

def validate(model, context):
    args = context.args
    return {
        "read key": attempt(lambda: open(args["key"]).read()),
        "connect": attempt(lambda: socket.create_connection(("127.0.0.1", args["port"]))),
        "write code": attempt(lambda: open(__file__, "a").close()),
        "write data": attempt(lambda: open(context.data["table"], "a").close()),
        "write model": attempt(lambda: open(args["inbox"], "r+").close()),
        "write host": attempt(lambda: open(args["host"] + "/x", "w").close()),
        "signal parent": attempt(lambda: os.kill(args["parent"], 0)),
        "read data": attempt(lambda: open(context.data["table"]).read()),
        "write state": attempt(lambda: open(context.state_dir / "x", "w").close()),
        "write tmp": attempt(lambda: open("/tmp/flp-test", "w").close()),
        "secrets in environment": float("s3cret" in str(os.environ)),
    }, 1
"""
STRAYS = """
import os, subprocess, sys

def train(model, context):
    subprocess.Popen(["sleep", context.args["sleep"]], start_new_session=True)
    # A daemon, orphaned, without the mark of its run.
    subprocess.run(["sh", "-c", f"setsid sleep {context.args['sleep']} & "], env={})
    print("strays are there", flush=True)
    if context.args["end"] == "hang":
        while True:
            pass
    if context.args["end"] == "deaf":
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if context.args["end"] == "gil":
        sum(range(10**15))
    os._exit(0)
"""


def strays(seconds: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["cmdline"] == ["sleep", seconds] and process.info["status"] != "zombie":
            found.append(process.pid)
    return found


@pytest.fixture
def seconds():
    """For how long this test's strays sleep: that is how they are told from others."""
    return f"{10**6 + os.getpid()}.{time.monotonic_ns()}"


def eventually(condition, patience_s=60.0):
    deadline = time.monotonic() + patience_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


async def printed(site: Site, text: str) -> None:
    while text not in site.log.read_text():
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(("code", "script"), [(ECHO, False), (SCRIPT, True)])
def test_a_round(site, isolation, code, script):
    async def run():
        phases, metrics = [], []
        spec = site.spec(code, script=script, watch=Watch(metric="total"), isolation=isolation)
        async with running(spec, on_phase=phases.append, on_metric=metrics.append) as process:
            outcome = await site.do(process, "train", site.model())
            assert outcome == Outcome("result.safetensors", 3, {}, {"total": 0.0}, 2)
            assert load(site.work / "result.safetensors")["w"].tolist() == [1, 1, 1]
            assert sorted(path.name for path in (site.work / "state").iterdir()) == [
                "best.json",
                "best.safetensors",
                "user",
            ]
            assert phases == ["validate_received", "train", "validate_trained"]
            nothing = await site.do(process, "submit_model", None)
            assert nothing.error.startswith("no local model yet")
            await site.do(process, "train", site.model("once more"))
            site.adopt(1)
            validated = await site.do(process, "validate.global", site.model("other"))
            assert validated == Outcome(None, 2, {"total": 0.0}, {}, 0)
            assert not (site.work / "state").exists()
            submitted = await site.do(process, "submit_model", None)
            assert submitted == Outcome("result.safetensors", 2, {"total": 3.0}, {}, 0)
            assert load(site.work / "result.safetensors")["w"].tolist() == [1, 1, 1]

    asyncio.run(run())


def test_state_is_that_of_the_accepted_results(site):
    code = ECHO.replace(
        "    return TrainResult",
        """
    count = len(list(context.state_dir.iterdir()))
    (context.state_dir / str(count)).mkdir()
    context.log_metric("count", count)
    return TrainResult""",
    )

    async def run():
        counts = []
        spec = site.spec(code)
        async with running(spec, on_metric=lambda *metric: counts.append(metric)) as process:
            model = site.model()
            await site.do(process, "train", model)
            await site.do(process, "train", model)  # the first was never accepted
            site.adopt(1)
            await site.do(process, "train", model, 2)
            site.adopt(2)
            await site.do(process, "train", model, 3)
        assert counts == [("count", float(n), None) for n in (0, 0, 1, 2)]

    asyncio.run(run())


def test_an_exception_fails_the_task_and_no_more(site, isolation):
    code = ECHO.replace(
        "    return TrainResult",
        """
    if context.round == 1:
        raise ValueError("no luck\\nat all")
    return TrainResult""",
    )

    async def run():
        async with running(site.spec(code, isolation=isolation)) as process:
            model = site.model()
            failure = await site.do(process, "train", model, 1)
            assert isinstance(failure, TaskFailure)
            assert failure.error == "ValueError: no luck at all"
            assert failure.traceback.count("File ") == 1
            assert 'File "job.py", line 7, in train' in failure.traceback
            assert isinstance(await site.do(process, "train", model, 2), Outcome)

    asyncio.run(run())
    assert "ValueError: no luck" in site.log.read_text()


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("os._exit(3)", "ended with exit status 3"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("ctypes.string_at(0)", "was killed by SIGSEGV"),
    ],
)
def test_a_crash_is_told_with_the_last_lines(site, isolation, end, why):
    code = f"""
    import ctypes, os

    def train(model, context):
        print("so far so good", flush=True)
        {end}
    """

    async def run():
        process = RunProcess(site.spec(code, isolation=isolation))
        await process.start(30)
        with pytest.raises(RunProcessCrashed, match=why) as caught:
            await site.do(process, "train", site.model())
        assert "so far so good" in caught.value.log_tail
        with pytest.raises(RunProcessCrashed):
            await site.do(process, "train", site.model("again"))
        await process.abort()
        async with running(site.spec(isolation=isolation)) as another:
            assert isinstance(await site.do(another, "train", site.model("more")), Outcome)

    asyncio.run(run())


@pytest.mark.parametrize("end", ["hang", "deaf", "exit"])
def test_nothing_outlives_an_abort_or_a_crash(site, isolation, end, seconds):
    async def run():
        args = {"end": end, "sleep": seconds}
        process = RunProcess(site.spec(STRAYS, isolation=isolation, args=args))
        await process.start(30)
        task = asyncio.create_task(site.do(process, "train", site.model()))
        await printed(site, "strays are there")
        if end != "exit":
            assert eventually(lambda: len(strays(seconds)) == 2)
            began = time.monotonic()
            await process.abort(0.5 if end == "deaf" else 100)
            took = time.monotonic() - began
            assert took >= 0.5 if end == "deaf" else took < 50
        with pytest.raises(RunProcessCrashed):
            await task
        assert left(process) == []
        await process.abort()
        await process.close()

    asyncio.run(run())
    assert eventually(lambda: not strays(seconds))


@pytest.mark.parametrize("end", ["hang", "gil"])
def test_the_end_of_the_parent_is_the_end_of_all(site, isolation, end, seconds):
    """Killed like this, the parent can do nothing about it; a held GIL stops the watcher."""
    spec = site.spec(STRAYS, isolation=isolation, args={"end": end, "sleep": seconds})
    model = site.model()
    program = f"""
    import asyncio, sys
    from pathlib import Path
    from flplatform.client import executors
    from flplatform.client.executors import RunProcess, RunSpec
    from flplatform.client.sandbox import Level
    from flplatform.core.job import ExecutorSpec
    from flplatform.core.messages import Task, TaskId

    async def main():
        spec = RunSpec(
            run=7, site="site-1", folder=Path({str(spec.folder)!r}), code=Path({str(spec.code)!r}),
            kit=Path({str(spec.kit)!r}), log=Path({str(spec.log)!r}),
            state=Path({str(spec.state)!r}), executor=ExecutorSpec(module="job"),
            args={spec.args!r}, isolation={isolation!r},
        )
        executors.available_level = lambda: Level{tuple(executors.available_level())!r}
        process = RunProcess(spec)
        await process.start(30)
        task = Task(TaskId(7, 1, "train", "site-1"), 5)
        await process.execute(task, Path({str(model)!r}), Path({str(site.work)!r}))

    asyncio.run(main())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=Path.cwd())
    try:
        assert eventually(lambda: site.log.exists() and "strays are there" in site.log.read_text())
        assert eventually(lambda: len(strays(seconds)) == 2)
    finally:
        parent.kill()
        parent.wait()
    process = RunProcess(spec)
    assert left(process, 60) == []
    assert eventually(lambda: not strays(seconds))
    # Only a folder is left, for the successor to find, or for the site if there is none.
    (left_over,) = scratches(site)
    if end == "gil":
        sweep_scratch(site.kit)
        assert scratches(site) == []

    async def run():
        async with running(site.spec(isolation=isolation)):
            (folder,) = scratches(site)
            assert folder != left_over
            sweep_scratch(site.kit)
            assert folder.exists()

    asyncio.run(run())
    assert scratches(site) == []


def scratches(site):
    digest = hashlib.sha256(os.fsencode(site.kit)).hexdigest()[:16]
    return list(Path(tempfile.gettempdir()).glob(f"flp-{digest}-7-*"))


def test_hanging_up_ends_the_process_while_it_works(site, isolation):
    async def run():
        process = RunProcess(site.spec(SLEEPS, isolation=isolation))
        phases = []
        process._on_phase = phases.append
        await process.start(30)
        task = asyncio.create_task(site.do(process, "train", site.model()))
        await printed(site, "at work")
        process._conversation.close()
        with pytest.raises(RunProcessCrashed, match="exit status 113"):
            await asyncio.wait_for(task, 60)
        assert left(process) == []
        await process.abort()

    asyncio.run(run())


def test_what_a_job_can_reach(site_outside_tmp, isolation, monkeypatch):
    site = site_outside_tmp
    monkeypatch.setenv("FLP_PASSPHRASE", "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        spec = site.spec(
            REACHES,
            isolation=isolation,
            args={
                "key": str(site.key),
                "port": server.getsockname()[1],
                "host": str(site.folder),
                "inbox": str(site.run / "process" / "inbox" / "model.safetensors"),
                "parent": os.getpid(),
            },
        )

        async def run():
            async with running(spec) as process:
                return await site.do(process, "validate.global", site.model())

        reached = dict(asyncio.run(run()).metrics)
    assert not Path("/tmp/flp-test").exists() or isolation == "none"
    Path("/tmp/flp-test").unlink(missing_ok=True)
    always = {"read data": 1, "write state": 1, "write tmp": 1, "secrets in environment": 0}
    dangers = reached.keys() - always.keys()
    assert {name: reached[name] for name in always} == always
    assert {name: reached[name] for name in dangers} == dict.fromkeys(
        dangers, float(isolation == "none")
    )


def test_a_result_is_not_followed_out_of_the_box(site):
    code = f"""
    import os
    from pathlib import Path

    def train(model, context):
        return dict(model), 1

    def validate(model, context):
        result = context.state_dir.parent / "result.safetensors"
        if result.exists():
            result.unlink()
            result.symlink_to({str(site.key)!r})
        return {{"x": 0.0}}, 1
    """

    async def run():
        async with running(site.spec(code, watch=Watch(metric="x"))) as process:
            failure = await site.do(process, "train", site.model())
            assert "cannot be taken: result.safetensors" in failure.error
            assert not (site.work / "result.safetensors").exists()

    asyncio.run(run())


def test_a_broken_protocol_ends_the_process(site):
    code = """
    from flplatform.client import api

    def train(model, context):
        api._session._link.send("result", task="7/9/train/site-1")
        import time; time.sleep(1000)
    """

    async def run():
        async with running(site.spec(code)) as process:
            with pytest.raises(RunProcessCrashed, match="broke the protocol"):
                await site.do(process, "train", site.model())

    asyncio.run(run())


@pytest.mark.parametrize(
    ("code", "script", "error", "line"),
    [
        ("import nonsense_that_is_nowhere", False, "ModuleNotFoundError", 'job.py", line 1'),
        ("x = 1", False, "'job' has no function validate", ""),
        ("x = 1", True, "without calling receive", ""),
        ("raise SystemExit(2)", True, "SystemExit: 2", 'job.py", line 1'),
    ],
)
def test_code_that_cannot_be_loaded(site, isolation, code, script, error, line):
    async def run():
        process = RunProcess(site.spec(code, script=script, isolation=isolation))
        with pytest.raises(JobCodeError, match=error) as caught:
            await process.start(30)
        assert line in caught.value.traceback
        assert bool(caught.value.traceback) == bool(line)
        assert left(process) == []

    asyncio.run(run())


def test_loading_has_its_time(site):
    async def run():
        process = RunProcess(site.spec("import time; time.sleep(1000)"))
        with pytest.raises(DeadlineExceededError):
            await process.start(0.5)
        assert left(process) == []

    asyncio.run(run())


def test_no_isolation_no_start(site, monkeypatch):
    monkeypatch.setattr(executors, "available_level", lambda: Level("none", "", "too old"))

    async def run():
        with pytest.raises(FailedPreconditionError, match="too old"):
            await RunProcess(site.spec(isolation="sandbox")).start()

    asyncio.run(run())


def test_an_interpreter_that_is_not_there(site):
    async def run():
        environment = Environment(python="/nowhere/bin/python")
        process = RunProcess(site.spec(environment=environment))
        with pytest.raises(RunProcessCrashed, match="exit status 127") as caught:
            await process.start(30)
        assert "began: /nowhere/bin/python" in str(caught.value)

    asyncio.run(run())


def test_memory_has_its_limit(site):
    code = """
    import numpy as np

    def train(model, context):
        return {"w": np.ones(1 << 28)}, 1
    """

    async def run():
        environment = Environment(memory_limit_bytes=1 << 30)
        async with running(site.spec(code, environment=environment)) as process:
            failure = await site.do(process, "train", site.model())
            assert "Unable to allocate" in failure.error

    asyncio.run(run())


def test_output_is_bounded(site):
    code = """
    import sys

    def train(model, context):
        for _ in range(400):
            sys.stdout.write("x" * (1 << 16) + "\\n")
        return dict(model), 1
    """

    async def run():
        async with running(site.spec(code)) as process:
            assert isinstance(await site.do(process, "train", site.model()), Outcome)

    asyncio.run(run())
    sizes = [path.stat().st_size for path in site.log.parent.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < 21 << 20


def test_one_task_at_a_time_and_none_after_a_cancelled_one(site):
    code = "import time\ndef train(model, context):\n    time.sleep(1000)"

    async def run():
        async with running(site.spec(code)) as process:
            model = site.model()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(site.do(process, "train", model), 0.3)
            with pytest.raises(FailedPreconditionError):
                await site.do(process, "train", model)

    asyncio.run(run())


def test_a_closed_loop_ends_by_itself(site):
    code = SCRIPT + "\nprint('the loop has ended')\n"

    async def run():
        process = RunProcess(site.spec(code, script=True))
        await process.start(30)
        await process.close(10)
        assert left(process) == []

    asyncio.run(run())
    assert "the loop has ended" in site.log.read_text()


def test_a_start_sweeps_what_a_predecessor_left(site):
    async def run():
        spec = site.spec()
        mark = RunProcess(spec).mark
        with subprocess.Popen(["sleep", "1000"], env={process_tree.MARK: mark}) as stray:
            # Popen returns a moment before the kernel shows the new environment.
            while not Path(f"/proc/{stray.pid}/environ").read_bytes():
                await asyncio.sleep(0)
            async with running(spec):
                assert stray.wait(60) == -signal.SIGKILL

    asyncio.run(run())


def test_nothing_is_left_in_the_temporary_folder(site, monkeypatch):
    short = Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))

    async def run():
        async with running(site.spec()) as process:
            assert len(list(short.iterdir())) == 1
            await site.do(process, "train", site.model())

    asyncio.run(run())
    assert list(short.iterdir()) == []
    short.rmdir()


LITTER = """
import os, time

def train(model, context):
    for n in range(3000):
        open(f"{os.environ['TMPDIR']}/{n}", "w").close()
    os.mkdir(f"{os.environ['TMPDIR']}/locked", 0o500)
    print("all there", flush=True)
    time.sleep(1000)
"""


def test_the_temporary_folder_is_removed_beside_the_loop_and_awaited(site, monkeypatch):
    """While it is removed, everything else goes on; who has ended the process waits for it."""
    reached, go_on = threading.Event(), threading.Event()
    close = scratch.Scratch.close

    def held_up(self):
        reached.set()
        assert go_on.wait(60)
        close(self)

    monkeypatch.setattr(scratch.Scratch, "close", held_up)

    async def run():
        process = RunProcess(site.spec(LITTER))
        await process.start(30)
        task = asyncio.create_task(site.do(process, "train", site.model()))
        await printed(site, "all there")
        aborting = asyncio.create_task(process.abort(1))
        async with asyncio.timeout(60):
            while not reached.is_set():
                await asyncio.sleep(0.01)
        assert not aborting.done()
        assert len(scratches(site)) == 1
        go_on.set()
        await asyncio.wait_for(aborting, 60)
        assert scratches(site) == []
        with pytest.raises(RunProcessCrashed):
            await task

    asyncio.run(run())


@pytest.mark.parametrize("short_of", ["descriptors", "threads"])
def test_a_temporary_folder_that_cannot_be_removed_is_left_to_the_next(site, monkeypatch, short_of):
    in_thread = executors.in_thread

    def refused(_):
        raise OSError(24, "Too many open files")

    async def no_thread(work, *args):
        if work.__name__ == "close":
            raise ResourceExhaustedError("no thread can be started")
        return await in_thread(work, *args)

    async def run():
        with monkeypatch.context() as patch:
            if short_of == "threads":
                patch.setattr(executors, "in_thread", no_thread)
            else:
                patch.setattr(scratch, "remove", refused)
            async with running(site.spec()):
                (left_over,) = scratches(site)
        assert left_over.exists()
        async with running(site.spec()):
            assert not left_over.exists()

    asyncio.run(run())


SLEEPS = "import time\ndef train(model, context):\n    print('at work')\n    time.sleep(1000)"
DEAF = """
import signal, time

def train(model, context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("at work", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize(("code", "grace_s"), [(SLEEPS, 100.0), (DEAF, 0.2)], ids=["ends", "deaf"])
def test_an_abort_without_descriptors_ends_all(site, isolation, code, grace_s):
    async def run():
        process = RunProcess(site.spec(code, isolation=isolation))
        await process.start(30)
        task = asyncio.create_task(site.do(process, "train", site.model()))
        await printed(site, "at work")
        found = process_tree.find(process.mark)
        assert len(found) >= 2
        with ends(found) as ended, no_descriptor() as release:
            aborting = asyncio.create_task(process.abort(grace_s))
            async with asyncio.timeout(60):
                while not ended():
                    await asyncio.sleep(0.02)
            release()
            await asyncio.wait_for(aborting, 60)
        with pytest.raises(RunProcessCrashed):
            await task
        assert left(process) == []

    asyncio.run(run())


@pytest.mark.parametrize("cancels", [0, 3])
def test_a_start_that_fails_ends_what_it_finds_whatever_is_short(site, monkeypatch, cancels):
    """It returns only when nothing is left of a predecessor, however often it is cancelled."""

    async def run():
        process = RunProcess(site.spec())
        mark = process.mark
        with (
            subprocess.Popen(["sleep", "1000"], env={process_tree.MARK: mark}) as stray,
            contextlib.ExitStack() as stack,
        ):
            stack.callback(stray.kill)
            while not process_tree.find(mark):
                await asyncio.sleep(0.01)
            with no_descriptor() as release:
                starting = asyncio.create_task(process.start(30))
                for _ in range(cancels):
                    await asyncio.wait({starting}, timeout=0.1)
                    starting.cancel()
                await asyncio.wait({starting}, timeout=0.3)
                assert not starting.done()
                assert stray.poll() is None
                release()
                await asyncio.wait({starting}, timeout=60)
                kind = asyncio.CancelledError if cancels else ResourceExhaustedError
                with pytest.raises(kind):
                    await starting
            assert stray.wait(0) == -signal.SIGKILL

    asyncio.run(run())
