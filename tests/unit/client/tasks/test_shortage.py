"""No space, no threads: tasks wait, and what nobody needs gives way."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from flplatform.client import task_loop as module
from flplatform.client.spool import Spool
from flplatform.client.state import current_state
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.unit.client.tasks.world import NEXT, TRAIN, World, play


def test_a_start_on_a_full_disk_still_asks_for_tasks(world, monkeypatch):
    """No folder can be made: tasks fail one by one, and the site goes on asking."""

    async def go():
        (world.folder / "work" / "rest").mkdir(parents=True)
        async with world.loop() as session:

            def full(*_args, **_kwargs):
                raise OSError(errno.ENOSPC, "no space left on device")

            monkeypatch.setattr(Path, "mkdir", full)
            await session.until(lambda: len(session.asked) == 1)
        assert not (world.folder / "work" / "rest").exists()

    play(go())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_state_that_cannot_be_settled_is_settled_before_the_next_task(world, monkeypatch, number):
    """Else the next task would be trained from the state before, without a word."""
    real, refusals = Spool.settle, [OSError(number, os.strerror(number))] * 2

    def settle(self, task_id, state):
        assert str(task_id) == NEXT or f"begin {NEXT}" not in world.session.calls
        if refusals:
            raise refusals.pop()
        real(self, task_id, state)

    async def go():
        monkeypatch.setattr(Spool, "settle", settle)
        async with world.loop() as session:
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            session.offer(NEXT)
            await session.until(lambda: f"took {NEXT}" in session.calls)
            await world.idle()
        assert not refusals
        assert (current_state(world.runs[7].state) / "counter").read_text() == NEXT

    play(go())


@pytest.mark.parametrize("step", ["prepare", "commit"])
def test_a_result_that_cannot_be_spooled_now_is_spooled_later(world, monkeypatch, step):
    """What was trained is not trained again, and its filters do not run on their own output."""

    def refuse(*args):
        if refusals:
            raise refusals.pop()
        return real(*args)

    where = module if step == "prepare" else Spool
    real, refusals = getattr(where, step), [OSError(errno.ENOSPC, "full")] * 2

    async def go():
        monkeypatch.setattr(where, step, refuse)
        async with world.loop() as session:
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            assert session.submitted[0].HasField("result")
        assert not refusals

    play(go())


class ShortOfThreads:
    """`asyncio.to_thread` that starts no thread for its k-th call, and for no other.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, monkeypatch, refused):
        self.calls, self._refused, self._real = 0, refused, asyncio.to_thread
        monkeypatch.setattr(asyncio, "to_thread", self)

    async def __call__(self, work, *args, **kwargs):
        self.calls += 1
        if self.calls == self._refused:
            raise RuntimeError("can't start new thread")
        return await self._real(work, *args, **kwargs)


def test_no_thread_at_whichever_step_changes_nothing(tmp_path, world, monkeypatch):
    """What is spooled is sent, whatever comes after it; and no task fails before it was tried."""

    async def go(each, threads):
        async with each.loop() as session:
            session.offer(pb.Task(id=TRAIN, seed=3, model=each.model()))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await each.idle()
            assert session.submitted[0].HasField("result"), session.submitted
            assert session.calls.count(f"begin {TRAIN}") == 1
        assert each.counter() == TRAIN
        assert each.entries == []
        return threads.calls

    for refused in range(1, 100):
        (tmp_path / str(refused)).mkdir()
        with monkeypatch.context() as patch:
            threads = ShortOfThreads(patch, refused)
            if play(go(World(tmp_path / str(refused)), threads)) < refused:
                break
    assert refused > 8


def test_a_run_that_waits_for_space_has_what_nobody_needs(world):
    """Its task is in hand, and again and again the disk has no room for it."""

    async def go():
        old = world.blobs.create(lambda path: path.write_bytes(b"of a round before") and None)
        async with world.loop() as session:
            gate = asyncio.Event()
            world.runs[7].does[TRAIN] = [gate]
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 2)
            assert world.blobs.has(old.digest)
            world.runs[7].troubles.short_of_space = True
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 3)
            assert not world.blobs.has(old.digest)
            gate.set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert not world.runs[7].troubles.short_of_space

    play(go())


def test_a_result_that_finds_no_space_has_that_of_what_nobody_needs(world, monkeypatch):
    refusals, real = [OSError(errno.ENOSPC, "full")], module.prepare

    def refuse(*args):
        if refusals:
            raise refusals.pop()
        assert not world.blobs.has(old.digest)
        return real(*args)

    async def go():
        monkeypatch.setattr(module, "prepare", refuse)
        async with world.loop() as session:
            session.offer(pb.Task(id=TRAIN, model=world.model()))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            assert session.submitted[0].HasField("result")

    old = world.blobs.create(lambda path: path.write_bytes(b"of a round before") and None)
    play(go())
    assert not refusals
