import asyncio

import pytest

from flplatform.core.errors import NotFoundError, ResourceExhaustedError
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
        assert operations.find(operation.id, session.id) is operation
        with pytest.raises(NotFoundError):
            operations.find(operation.id, "other")
        operations.cancel(operation, "why")
        operations.cancel(operation, "again")
        await asyncio.wait([task])
        assert operation.cancelled == "why"
        assert operation.started == 5.0
        assert operations.live() == []
        with pytest.raises(NotFoundError):
            operations.find(operation.id, session.id)

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
