"""A disabled site keeps what it has done, and tells it once it is enabled."""

import pytest

from flplatform.core.errors import PermissionDeniedError
from flplatform.core.messages import ModelRef, TaskFailure
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.unit.client.tasks.world import TRAIN, play


@pytest.mark.parametrize("where", ["uploads", "answers"])
def test_what_a_disabled_site_has_trained_is_kept_until_it_is_enabled(world, where):
    async def go():
        async with world.loop() as session:
            refused = PermissionDeniedError("site-1 is disabled", rule="disabled")
            getattr(session, where)[TRAIN] = [refused, refused]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            assert session.submitted[0].HasField("result")
        assert world.counter() == TRAIN

    play(go())


def test_a_failure_of_a_disabled_site_is_told_once_it_is_enabled(world):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [PermissionDeniedError("is disabled", rule="disabled")]
            world.runs[7].does[TRAIN] = [TaskFailure("after hours")]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            assert session.submitted[0].failure.error == "after hours"
            assert session.calls.count(f"begin {TRAIN}") == 1

    play(go())


def test_a_disabled_site_fetches_the_package_of_a_run_once_it_is_enabled(world):
    """Until then the others do not wait for its answer to the start."""

    async def go():
        async with world.loop() as session:
            model = world.model()
            refused = PermissionDeniedError("site-1 is disabled", rule="disabled")
            session.uploads[model.digest] = [refused, refused]
            path = await world.tasks.fetch(ModelRef(model.digest, model.size))
            assert path.exists()

    play(go())


def test_a_disabled_site_downloads_once_it_is_enabled(world):
    async def go():
        async with world.loop() as session:
            model = world.model()
            refused = PermissionDeniedError("site-1 is disabled", rule="disabled")
            session.uploads[model.digest] = [refused]
            session.offer(pb.Task(id=TRAIN, model=model))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            assert session.submitted[0].HasField("result")

    play(go())
