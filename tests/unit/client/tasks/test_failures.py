"""Tasks that fail, and what the server is told."""

import asyncio

import numpy as np
import pytest

from flplatform.client.executors import JobCodeError, RunProcessCrashed
from flplatform.core.diagnosis import run_lost
from flplatform.core.errors import FailedPreconditionError, NotFoundError, ResourceExhaustedError
from flplatform.core.messages import TaskFailure
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.unit.client.tasks.world import TRAIN, fails, play


def test_a_task_waits_for_a_run_that_comes_back(world):
    """After a restart, as long as its data is not mounted."""

    async def go():
        run = world.runs.pop(7)
        world.waiting[7] = asyncio.Event()
        async with world.loop() as session:
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 2)
            assert list(session.asked[1].held) == [TRAIN]
            world.runs[7] = run
            world.waiting[7].set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)

    play(go())


def test_an_unknown_run(world, caplog):
    failure = fails(world, pb.Task(id="9/1/train/site-1"))
    anew = "first abort client site-1 --run 9, then start client site-1 --run 9"
    assert failure.error == f"{run_lost(9)}: if it goes on, {anew}"
    assert "run 9 is not here" in caplog.text
    assert anew in caplog.text, "who reads the site's log is told what helps"


@pytest.mark.parametrize(
    ("step", "error", "traceback"),
    [
        (RunProcessCrashed("it crashed", "last words"), "it crashed", "last words"),
        (TaskFailure("ValueError: no", "line 3"), "ValueError: no", "line 3"),
        (
            JobCodeError(TaskFailure("no module", "import x")),
            "the job's code cannot be loaded: no module",
            "import x",
        ),
        (ResourceExhaustedError("too large"), "too large", ""),
        (OSError("disk full"), "disk full", ""),
        (MemoryError("secret"), "a defect of the site's program: MemoryError", ""),
    ],
)
def test_failures_are_reported(world, step, error, traceback):
    world.runs[7].does[TRAIN] = [step]
    failure = fails(world, pb.Task(id=TRAIN))
    assert (failure.error, failure.traceback) == (error, traceback)
    assert world.runs[7].phases[-1] == "idle"


@pytest.mark.parametrize("kind", [TRAIN, TRAIN.replace("train", "submit_model")])
def test_a_run_that_was_started_for_validation_takes_nothing_else(world, kind):
    world.runs[7].plan.purpose = "validate"
    failure = fails(world, pb.Task(id=kind))
    assert "started for validation: it takes no" in failure.error
    assert "signed purpose" in failure.error
    assert not any(call.startswith(("begin", "download")) for call in world.session.calls)


def test_a_model_that_may_not_be_downloaded(world):
    blob = world.model()
    world.session.uploads[blob.digest] = [NotFoundError("no such blob")]
    assert fails(world, pb.Task(id=TRAIN, model=blob)).error == "no such blob"


def test_not_a_number(world):
    world.runs[7].does[TRAIN] = [{"w": np.array([1, np.nan, 2, np.inf], np.float32)}]
    error = fails(world, pb.Task(id=TRAIN, model=world.model())).error
    assert "2 of 4 values are NaN or infinite" in error


def test_another_shape(world):
    world.runs[7].does[TRAIN] = [{"w": np.zeros(5, np.float32)}]
    assert "'w'" in fails(world, pb.Task(id=TRAIN, model=world.model())).error


def test_a_failure_that_is_refused_ends_the_task(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [TaskFailure("no")]
            session.answers[TRAIN] = [FailedPreconditionError("not open")]
            session.offer(TRAIN)
            await session.until(lambda: f"failure {TRAIN}" in session.calls)
            await world.idle()
            assert session.submitted == []

    play(go())
