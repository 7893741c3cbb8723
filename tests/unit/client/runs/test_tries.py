"""What a run does when its process crashes, or this machine is short of something."""

import asyncio
import errno
import logging

import pytest

from flplatform.client import run_folders, site_run
from flplatform.client.box import Box
from flplatform.client.executors import RunProcessCrashed
from flplatform.core.errors import ResourceExhaustedError
from flplatform.core.messages import TaskFailure
from tests.unit.client.runs.world import TASK, at_work, end, play, settle, short


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
        assert processes.made[0].state == "cancelled"
        assert all(process.state == "aborted" for process in processes.made[1:])

    play(go())


def test_a_crash_is_tried_again(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        run = at_work(runs, 1)
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
            await at_work(runs, 1).execute(TASK, None, world.folder / "work")
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
        assert await at_work(runs, 1).execute(TASK, None, world.folder / "work") == "done"
        assert not kills
        await runs.close()

    play(go())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_a_shortage_is_waited_for_with_a_new_process_and_is_no_crash(world, processes, number):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        run = at_work(runs, 1)
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
        assert await at_work(runs, 1).execute(TASK, model, world.folder / "work") == "done"
        assert set(looks) == {3000 + site_run.SMALL_BYTES}
        await runs.close()

    play(go())


def test_a_task_does_not_begin_without_room_for_its_result(world, processes, monkeypatch):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        run = at_work(runs, 1)
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
        if (box_of(at_work(runs, 1)) / "state.bin").exists():
            raise ResourceExhaustedError("no room")

    async def leave(self, task, model, work):
        (box_of(at_work(runs, 1)) / "state.bin").write_bytes(bytes(1000))
        return TaskFailure("ValueError: a plain defect")

    runs = world.runs()

    async def go():
        await runs.accept(*world.offer())
        monkeypatch.setattr(site_run, "demand_room", look)
        monkeypatch.setattr(processes, "execute", leave)
        found = await at_work(runs, 1).execute(TASK, None, world.folder / "work")
        assert found.error == "ValueError: a plain defect"
        assert not any(box_of(at_work(runs, 1)).iterdir())
        await runs.close()

    play(go())


def test_the_results_of_tasks_before_take_no_room_from_the_next(world, monkeypatch):
    def look(folder, count):
        assert not any(box_of(at_work(runs, 1)).iterdir())

    runs = world.runs()

    async def go():
        await runs.accept(*world.offer())
        (box_of(at_work(runs, 1)) / "result.safetensors").write_bytes(bytes(1000))
        monkeypatch.setattr(site_run, "demand_room", look)
        assert await at_work(runs, 1).execute(TASK, None, world.folder / "work") == "done"
        await runs.close()

    play(go())


def test_what_did_not_fit_is_demanded_before_the_next_try(world, processes, monkeypatch):
    async def full(self, task, model, work):
        monkeypatch.setattr(processes, "execute", done)
        (box_of(at_work(runs, 1)) / "state.bin").write_bytes(bytes(5_000_000))
        raise short(errno.ENOSPC)

    async def done(self, task, model, work):
        return "done"

    demanded: list[int] = []
    runs = world.runs()

    async def go():
        await runs.accept(*world.offer())
        monkeypatch.setattr(site_run, "demand_room", lambda _, count: demanded.append(count))
        monkeypatch.setattr(processes, "execute", full)
        assert await at_work(runs, 1).execute(TASK, None, world.folder / "work") == "done"
        assert demanded == [site_run.SMALL_BYTES, 10_000_000 + site_run.SMALL_BYTES]
        assert await at_work(runs, 1).execute(TASK, None, world.folder / "work") == "done"
        assert demanded[2:] == [site_run.SMALL_BYTES]  # it fitted: that is over
        await runs.close()

    play(go())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_what_a_try_leaves_is_demanded_only_if_it_came_for_want_of_space(
    world, processes, monkeypatch, number
):
    async def fail(self, task, model, work):
        monkeypatch.setattr(processes, "execute", done)
        (box_of(at_work(runs, 1)) / "state.bin").write_bytes(bytes(5_000_000))
        raise short(number)

    async def done(self, task, model, work):
        return "done"

    demanded: list[int] = []
    runs = world.runs()

    async def go():
        await runs.accept(*world.offer())
        monkeypatch.setattr(site_run, "demand_room", lambda _, count: demanded.append(count))
        monkeypatch.setattr(processes, "execute", fail)
        assert await at_work(runs, 1).execute(TASK, None, world.folder / "work") == "done"
        assert demanded == [site_run.SMALL_BYTES] * 2
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
        task = asyncio.create_task(at_work(runs, 1).execute(TASK, None, world.folder / "work"))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [each.state for each in ends] == ["aborted", "aborted"]
        await runs.close()

    play(go())
