"""How a run ends at its site, whatever gets in the way."""

import asyncio
import errno
import os
import threading

import pytest

from flplatform.client import ending, retrying, run_folders
from flplatform.client import site_runs as module
from flplatform.client.policy import Policy
from flplatform.client.site_runs import SiteRuns
from flplatform.files.threads import in_thread
from tests.unit.client.runs.world import at_work, end, play, settle, short, until_deleted


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
        assert (runs.numbers(), at_work(runs, 1)) == ([], None)
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
        assert at_work(runs, 2).report()[2] == "deployed, a run before it ends"
        assert not task.done()
        slow_end.set()
        assert await task is at_work(runs, 2)
        await settle()
        assert [(each.spec.run, each.state) for each in processes.made] == [
            (1, "aborted"),
            (3, "running"),
            (2, "running"),
        ]
        assert at_work(runs, 2).report()[2] == "deployed"
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
        assert processes.made.pop().state == "aborted"  # made for what a kill may have left
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


def test_what_a_kill_has_left_ends_with_its_run(world, accepted, processes):
    """Also if the run ends before its process has been started again."""

    async def go():
        runs = world.runs()
        await end(runs, 1, "aborted")
        (process,) = processes.made
        assert (process.spec.run, process.state) == (1, "aborted")
        assert process.spec.folder == world.home / "run-1" / "process"
        await runs.close()

    play(go())


def test_one_leftover_is_deleted_after_the_other(world, monkeypatch):
    """The threads are there for everything else as well; one that stays holds up no other."""
    names = [f".tmp-gone-{number}" for number in range(20)]
    world.home.mkdir(parents=True)
    for name in names:
        (world.home / name).mkdir()
    real, begun, go_on = ending.remove, [], threading.Event()

    def slowly(path):
        begun.append(path.name)
        assert go_on.wait(60)
        if begun.count(names[0]) == 1 and path.name == names[0]:
            raise short(errno.EIO)
        real(path)

    monkeypatch.setattr(ending, "remove", slowly)

    async def go():
        runs = world.runs()
        while not begun:
            await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(30):
                await in_thread(lambda: None)
            assert len(begun) == 1
        finally:
            go_on.set()
        await until_deleted(runs)
        assert sorted(begun) == sorted([*names, names[0]])
        assert not list(world.home.iterdir())
        await runs.close()

    play(go())
