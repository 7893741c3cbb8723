import asyncio

import pytest

from flplatform.core.errors import NotFoundError, ResourceExhaustedError
from flplatform.hci import operations as module
from flplatform.hci.operations import Operations


async def forever() -> None:
    await asyncio.Event().wait()


def test_an_operation_is_listed_until_its_task_ends(session):
    async def main() -> None:
        operations = Operations(clock=lambda: 5.0)
        operation = operations.open(session, "look")
        assert operations.live() == []
        task = asyncio.create_task(forever())
        operations.start(operation, task)
        assert operations.live() == operations.of(session.id) == [operation]
        assert operations.of("other") == []
        assert operations.find(operation.id, session.user) is operation
        with pytest.raises(NotFoundError):
            operations.find(operation.id, "other")
        operations.cancel(operation, "why")
        operations.cancel(operation, "again")
        await asyncio.wait([task])
        assert operation.cancelled == "why"
        assert operation.started == 5.0
        assert operations.live() == []
        with pytest.raises(NotFoundError):
            operations.find(operation.id, session.user)

    asyncio.run(main())


def test_limit_end_of_session_and_close(session):
    async def main() -> None:
        operations = Operations(max_per_session=2)
        started = []
        for _ in range(3):
            operation = operations.open(session, "look")
            operations.start(operation, asyncio.create_task(forever()))
            started.append(operation)
        with pytest.raises(ResourceExhaustedError, match="2 commands"):
            operations.check_limit(session.id)
        operations.check_limit("other")
        started[0].detachable = True
        operations.end_session(session)
        await asyncio.wait([started[1].task, started[2].task])
        assert operations.live() == [started[0]]
        await operations.close()
        assert started[0].cancelled == "the server is stopping"
        assert operations.live() == []
        await operations.close()

    asyncio.run(main())


def test_a_long_operation_is_kept_for_its_user_with_the_end_of_its_reply(session):
    now = 0.0

    async def main() -> None:
        nonlocal now
        operations = Operations(clock=lambda: now)
        for number in range(module.MAX_KEPT + 2):
            now = float(number)
            operation = operations.open(session, "look")
            operation.long = number > 0
            task = asyncio.create_task(asyncio.sleep(0))
            operations.start(operation, task)
            await task
            await asyncio.sleep(0)
        listed = operations.listed(session.user)
        assert len(listed) == module.MAX_KEPT
        assert (listed[0].started, listed[-1].started) == (2.0, now)
        assert operations.listed("somebody else") == []
        assert operations.find(operation.id).state == "ended"
        now = 50.0 + module.KEEP_S
        assert operations.listed()[0].ended == 50.0
        now = 1e9
        assert operations.listed() == []

    asyncio.run(main())


def test_a_kept_reply_is_bounded(session):
    operation = Operations().open(session, "look")
    for number in range(10):
        operation.keep({"type": "text", "text": f"{number}" * (module.MAX_KEPT_BYTES // 4)})
    operation.keep({"type": "progress", "label": "up", "done": 1, "total": 2, "unit": "B"})
    operation.keep({"type": "done", "exit_code": 3})
    assert [item["text"][0] for item in operation.items] == ["7", "8", "9"]
    assert (operation.dropped, operation.exit_code) == (7, 3)
    assert operation.progress["done"] == 1
