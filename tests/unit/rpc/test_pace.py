import asyncio
from contextlib import suppress

import pytest

from flplatform.core.errors import DeadlineExceededError, ResourceExhaustedError
from flplatform.rpc.channel import CHUNK_BYTES
from flplatform.rpc.pace import Pace, PaceLimits, Slots

LIMITS = PaceLimits(min_bytes_s=64_000, window_s=30)


class Peer:
    """Moves bytes at its own speed, by a clock of its own."""

    def __init__(self, limits: PaceLimits = LIMITS) -> None:
        self.now = 0.0
        self.pace = Pace(limits, lambda: self.now)

    async def bring(self, count: int, after_s: float) -> None:
        async def some_time() -> None:
            self.now += after_s
            await asyncio.sleep(0)

        await self.pace.wait(some_time())
        self.pace.moved(count)


@pytest.mark.parametrize(
    ("count", "every_s"), [(1, 10.0), (10_000, 1.0), (100_000, 9.0), (0, 0.5), (1000, 31.0)]
)
def test_who_brings_too_little_is_ended_within_two_windows(count: int, every_s: float) -> None:
    async def scene() -> None:
        peer = Peer()

        async def go_on() -> None:
            while peer.now < 3 * LIMITS.window_s:
                await peer.bring(count, every_s)

        with pytest.raises(DeadlineExceededError, match="bytes moved in 30 s") as caught:
            await go_on()
        assert caught.value.rule == "progress"
        assert peer.now <= LIMITS.window_s + 2 * every_s

    asyncio.run(scene())


@pytest.mark.parametrize("size", [1000, 65_536, CHUNK_BYTES])
def test_who_keeps_to_the_least_rate_is_never_ended(size: int) -> None:
    async def scene() -> None:
        peer = Peer()
        while peer.now < 20 * LIMITS.window_s:
            await peer.bring(size, size / LIMITS.min_bytes_s)

    asyncio.run(scene())


def test_who_was_fast_may_not_rest_on_it() -> None:
    async def scene() -> None:
        peer = Peer()
        for _ in range(1000):
            await peer.bring(CHUNK_BYTES, 0.001)
        fast = peer.now
        with suppress(DeadlineExceededError):
            while peer.now < fast + 2 * LIMITS.window_s:
                await peer.bring(1, 1.0)
        assert peer.now < fast + LIMITS.window_s + 2

    asyncio.run(scene())


def test_our_own_work_is_not_held_against_the_peer() -> None:
    async def scene() -> None:
        peer = Peer()
        for _ in range(100):
            await peer.bring(1000, 0.01)
            peer.now += 60.0  # a slow disk here

    asyncio.run(scene())


def test_slots_are_given_in_order_and_no_caller_can_fill_the_queue() -> None:
    async def scene() -> None:
        slots, order = Slots(per_caller=2, in_all=2), list[str]()
        go_on = asyncio.Event()

        async def transfer(name: str, number: int) -> None:
            async with slots.take(name):
                order.append(f"{name}{number}")
                await go_on.wait()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(transfer("a", number))
            for number in range(2):
                group.create_task(transfer("b", number))
            while len(order) < 2:
                await asyncio.sleep(0)
            go_on.set()
        assert order[:4] == ["a0", "a1", "b0", "b1"]
        assert order[4:] == ["a2", "a3", "a4", "a5"]

    asyncio.run(scene())


def test_who_waits_too_long_is_told_and_takes_nothing() -> None:
    async def scene() -> None:
        slots = Slots(per_caller=1, in_all=1, wait_s=0.01)
        for name in ("a", "b"):  # its own slot is taken, or the last of all
            async with slots.take("a"):
                with pytest.raises(ResourceExhaustedError, match="came free in 0.01 s") as caught:
                    async with slots.take(name):
                        pass
                assert caught.value.rule == "transfer_slots"
        async with slots.take("b"):
            pass

    asyncio.run(scene())
