"""A run at its site: how its tasks end when they are withdrawn, and what they leave."""

import asyncio
import errno
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from flplatform.client.executors import RunProcessCrashed
from flplatform.client.site_run import RunRecord, SiteRun
from flplatform.core.messages import Task, TaskId

ROOT = Path(__file__).parents[3]
TASK = Task(TaskId(1, 4, "validate.global", "site-1"), 5)


class Process:
    """A run process that never answers, or crashes, and whose end fails."""

    spent = False

    def __init__(self, abort, crashes=False) -> None:
        self.at_work = asyncio.Event()
        self.abort = abort
        self.crashes = crashes

    async def execute(self, task, model, work):
        self.at_work.set()
        if self.crashes:
            raise RunProcessCrashed("crashed")
        await asyncio.Event().wait()


def run_in(folder: Path) -> SiteRun:
    record = RunRecord(
        run=1, submission_id="1", digest="", size=0, order="", accepted=datetime.now(UTC)
    )
    kit = SimpleNamespace(site=SimpleNamespace(backoff_max_s=0.1), folder=folder)
    plan = SimpleNamespace(isolation="none")
    return SiteRun(kit, folder, record, SimpleNamespace(), plan, lambda *_: None)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")],
    ids=["descriptors", "threads"],
)
def test_a_withdrawn_task_has_not_failed_whatever_becomes_of_its_process(tmp_path, error, caplog):
    async def abort():
        raise error

    async def scene():
        run = run_in(tmp_path)
        run._process = process = Process(abort)
        doing = asyncio.create_task(run.execute(TASK, None, tmp_path / "work"))
        await asyncio.wait_for(process.at_work.wait(), 60)
        doing.cancel()
        await asyncio.wait([doing], timeout=60)
        assert doing.cancelled()
        assert run._process is process  # the next end of the run tries again

    asyncio.run(scene())
    assert str(error) in caplog.text


def test_a_task_that_is_withdrawn_while_its_crashed_process_ends(tmp_path):
    """The end is begun again and gone through with."""

    async def scene():
        ending, calls = asyncio.Event(), []

        async def abort():
            calls.append("begun")
            ending.set()
            if len(calls) == 1:
                await asyncio.Event().wait()
            calls.append("through")

        run = run_in(tmp_path)
        run._process = Process(abort, crashes=True)
        doing = asyncio.create_task(run.execute(TASK, None, tmp_path / "work"))
        await asyncio.wait_for(ending.wait(), 60)
        doing.cancel()
        await asyncio.wait([doing], timeout=60)
        assert doing.cancelled()
        assert calls == ["begun", "begun", "through"]
        assert run._process is None

    asyncio.run(scene())


AS_OWNER = """
import os, sys
from pathlib import Path
from tests.unit.client.test_site_run import run_in

if os.geteuid() == 0:  # who may look at everything
    os.setgid(65534)
    os.setuid(65534)
folder = Path(sys.argv[1])
state = folder / "process" / "box" / "state"
state.mkdir(parents=True)
(state / "cache").symlink_to(Path(sys.argv[2]) / "x")
(state / "file").write_text("12345")
(folder / "work").mkdir()
run = run_in(folder)
assert run._clear(folder / "work") == 5
assert not (folder / "work").exists()
assert not state.exists()
"""


def test_leftovers_are_counted_and_removed_whatever_their_links_name():
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place, locked = Path(name) / "place", Path(name) / "locked"
        place.mkdir()
        locked.mkdir(0)
        Path(name).chmod(0o755)
        if os.geteuid() == 0:
            os.chown(place, 65534, 65534)
        command = [sys.executable, "-c", AS_OWNER, str(place), str(locked)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=60)
        locked.chmod(0o700)
