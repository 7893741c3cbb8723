"""Which runs a site takes on, and what it checks first."""

import asyncio
import errno
import json

import pytest

from flplatform.client import run_folders
from flplatform.client.executors import RunProcessCrashed
from flplatform.client.spool import Spool, SpooledResult
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
)
from flplatform.core.messages import TaskId
from tests.unit.client.runs.world import TASK, at_work, end, play, refused, settle


def test_a_run_is_taken_on(world, processes):
    async def go():
        runs, offer = world.runs(), world.offer()
        assert runs.recorded(offer[0], offer[3]) is None
        assert await runs.accept(*offer) == {"isolation": "sandbox"}
        await settle()
        assert runs.numbers() == [1]
        (run,) = runs.all()
        assert run is at_work(runs, 1)
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
        first, (process,) = at_work(runs, 1), processes.made
        (world.home / "run-1" / "state").mkdir(exist_ok=True)
        again = world.offer(run=1, number=2, data=data)
        await runs.accept(*again)
        await settle()
        assert (process.state, at_work(runs, 1) is first) == ("aborted", False)
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
        await at_work(runs, 1).warm_up()
        assert processes.made[-1].spec.processes == 3
        await refused(runs.accept(*world.offer(2, 2, gpus={"site-1": 9})), "max_processes = 8")
        await runs.accept(*world.offer(2, 2, gpus={"site-2": 9}))
        assert at_work(runs, 2).plan.processes == 1
        await runs.close()
        again = world.runs()
        assert at_work(again, 1).plan.processes == 3
        await again.close()

    play(go())


def test_a_crash_is_noted_with_the_last_line_that_says_something(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(gpus={"site-1": 2}))
        tail = "Root cause\n  exitcode: -9 (SIGKILL)\n====="
        processes.script.append(RunProcessCrashed("rank 1 went first", tail))
        await at_work(runs, 1).execute(TASK, None, world.folder / "work")
        assert [line["text"] for line in at_work(runs, 1).troubles.lines] == [
            "rank 1 went first: exitcode: -9 (SIGKILL)"
        ]
        await runs.close()

    play(go())


def test_processes_that_a_failure_has_ended_are_started_anew_without_a_crash(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(gpus={"site-1": 2}))
        run = at_work(runs, 1)
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
