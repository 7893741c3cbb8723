"""Results at a site: sent until answered, settled by the answer."""

import asyncio
import errno
import logging
import os
import threading
from pathlib import Path

import pytest

from flplatform.client import answering
from flplatform.client import spool as spool_module
from flplatform.client.spool import Spool
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.core.messages import TaskId
from tests.unit.client.tasks.world import NEXT, TRAIN, play, settle


def test_a_withdrawn_task_that_is_being_answered_goes_on(world):
    async def go():
        async with world.loop() as session:
            gate = asyncio.Event()
            session.answers[TRAIN] = [gate]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            session.offer()
            await session.until(lambda: len(session.asked) == 3)
            # The server is not asked about it any more, but its answer counts.
            assert list(session.asked[2].held) == []
            session.offer()
            await session.until(lambda: len(session.asked) == 4)
            gate.set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
        assert world.counter() == TRAIN

    play(go())


class SlowCommit:
    """A `Spool.commit` that waits before it comes to what its script says, then to the real one."""

    def __init__(self, monkeypatch, *script):
        self._loop, self._real, self._script = asyncio.get_running_loop(), Spool.commit, [*script]
        self.begun, self.may_go_on = asyncio.Event(), threading.Event()
        commits = self
        monkeypatch.setattr(Spool, "commit", lambda spool, *args: commits(spool, *args))

    def __call__(self, *args):
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.may_go_on.wait(60)
        if self._script:
            raise self._script.pop(0)
        self._real(*args)


def test_a_result_that_comes_into_the_spool_while_its_task_is_withdrawn_is_sent(world, monkeypatch):
    """Else nobody would ever send or drop it."""

    async def go():
        commit = SlowCommit(monkeypatch)
        async with world.loop() as session:
            session.answers[TRAIN] = [FailedPreconditionError("the round is closed")]
            session.offer(TRAIN)
            await commit.begun.wait()
            session.offer()
            await session.until(lambda: len(session.asked) == 3)
            commit.may_go_on.set()
            await world.idle()
            assert f"result {TRAIN}" in session.calls
            assert world.entries == []
            assert not world.tasks._answers.begun

    play(go())


def test_a_withdrawn_task_whose_result_cannot_be_spooled_is_cancelled(world, monkeypatch):
    async def go():
        commit = SlowCommit(monkeypatch, OSError(errno.EIO, "broken"))
        async with world.loop() as session:
            real, gate = session.persist, asyncio.Event()

            async def persist(what, step):
                try:
                    return await real(what, step)
                except OSError:
                    await gate.wait()  # the pause before the next try

            session.persist = persist
            session.offer(TRAIN)
            await commit.begun.wait()
            commit.may_go_on.set()
            await session.until(lambda: len(session.asked) == 2)
            while world.tasks._answers.begun:
                await asyncio.sleep(0.001)
            session.offer()
            await world.idle()
            assert f"result {TRAIN}" not in session.calls
            assert list((world.folder / "work").iterdir()) == []

    play(go())


def test_a_broken_wire_trains_nothing_again(world):
    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [UnavailableError("cut"), UnavailableError("cut")]
            session.answers[TRAIN] = [
                UnavailableError("cut"),
                FailedPreconditionError("bytes?", rule="upload_first"),
            ]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            assert session.calls.count(f"upload {TRAIN}") == 5
            assert session.calls.count(f"result {TRAIN}") == 3
        assert world.counter() == TRAIN

    play(go())


def test_a_lost_acknowledgement(world):
    """The upload is refused since its task is settled; the result itself is asked about."""

    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [FailedPreconditionError("the task is not open")]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
        assert world.counter() == TRAIN

    play(go())


def test_what_is_spooled_comes_first_after_a_restart(world):
    async def go():
        world.commit(TRAIN)
        (world.folder / "work" / "rest").mkdir(parents=True)
        async with world.loop() as session:
            gate = asyncio.Event()
            session.answers[TRAIN] = [gate]
            session.offer(TRAIN, NEXT)
            await session.until(lambda: len(session.asked) == 2)
            assert [list(ask.held) for ask in session.asked] == [[TRAIN], [TRAIN, NEXT]]
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            await settle()
            assert session.calls == [f"upload {TRAIN}", f"result {TRAIN}"]
            gate.set()
            await session.until(lambda: f"begin {NEXT}" in session.calls)
            assert world.counter() == "left"
            assert f"begin {TRAIN}" not in session.calls
            await session.until(lambda: f"took {NEXT}" in session.calls)
            await world.idle()
        assert world.counter() == NEXT
        assert not (world.folder / "work" / "rest").exists()

    play(go())


def test_a_spooled_result_of_an_unknown_run(world):
    async def go():
        world.commit("9/1/train/site-1")
        async with world.loop() as session:
            await session.until(lambda: session.submitted)
            await world.idle()
        assert world.entries == []

    play(go())


def test_a_result_waits_for_the_next_start_if_the_server_is_away(world):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [asyncio.Event()]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
        assert world.entries == [TRAIN]
        assert world.counter() is None
        session.answers.clear()
        async with world.loop():
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
        assert session.calls.count(f"begin {TRAIN}") == 1
        assert world.counter() == TRAIN

    play(go())


@pytest.mark.parametrize(
    "answer",
    [AlreadyExistsError("settled"), FailedPreconditionError("closed"), NotFoundError("no run")],
)
def test_a_result_that_nobody_wants_is_dropped_with_its_state(world, answer):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [answer]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            await world.idle()
            assert session.submitted == []
        assert world.counter() is None
        assert world.entries == []

    play(go())


@pytest.mark.parametrize("where", ["answers", "uploads"])
@pytest.mark.parametrize("error", [InvalidArgumentError("odd"), PermissionDeniedError("no")])
def test_a_refused_result_is_a_failure(world, where, error):
    async def go():
        async with world.loop() as session:
            getattr(session, where)[TRAIN] = [error]
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
            assert session.submitted[0].failure.error == f"the server refused it: {error}"
        assert world.counter() is None
        assert world.entries == []

    play(go())


@pytest.mark.parametrize("cut", ["gone", "short"])
def test_a_result_whose_bytes_are_gone_is_made_again(world, cut):
    """What the wire raises then is no answer of the server's."""

    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            file = world.spool.file(TaskId.parse(TRAIN))

            def lose():
                if cut == "gone":
                    file.unlink()
                    raise FileNotFoundError(file)
                os.truncate(file, 5)
                raise DataLossError("ends at 5")

            session.uploads[TRAIN] = [lose]
            await session.until(lambda: f"upload {TRAIN}" in session.calls)
            await world.idle()
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
        assert world.counter() == TRAIN

    play(go())


def bad_sector(*_args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_result_that_can_never_be_read_is_made_again(world, monkeypatch):
    """The spool would offer the same sector for ever, and the task would never be answered."""

    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            with monkeypatch.context() as patch:
                patch.setattr(spool_module, "digest_of_file", bad_sector)
                session.uploads[TRAIN] = [bad_sector]
                await session.until(lambda: f"upload {TRAIN}" in session.calls)
                await world.idle()
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
            assert session.submitted[0].HasField("result")
        assert world.counter() == TRAIN

    play(go())


@pytest.mark.parametrize("refusals", [0, 3])
def test_a_result_that_can_be_read_later_is_not_made_again(world, monkeypatch, refusals):
    real, left = spool_module.digest_of_file, [bad_sector] * refusals

    async def go():
        world.commit(TRAIN)
        monkeypatch.setattr(
            spool_module, "digest_of_file", lambda path: left.pop()() if left else real(path)
        )
        world.session.uploads[TRAIN] = [bad_sector]
        async with world.loop() as session:
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"upload {TRAIN}") == 2
            assert not left
        assert world.counter() == "left"

    play(go())


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_result_of_which_nobody_can_tell_what_it_is_is_made_again(world, monkeypatch, number):
    """But not for a shortage of this machine's: that passes."""
    real = Path.read_bytes

    def read_bytes(self):
        if self.name == "result.json" and refusals and refusals.pop():
            raise OSError(number, os.strerror(number))
        return real(self)

    refusals = [True] * (answering.READ_TRIES if number == errno.EIO else 2)

    async def go():
        async with world.loop() as session:
            await session.until(lambda: session.asked)
            world.commit(TRAIN)
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
        assert world.counter() == (TRAIN if number == errno.EIO else "left")
        assert not refusals

    play(go())


def test_an_error_that_answers_nothing_keeps_the_result(world, caplog):
    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            session.answers[TRAIN] = [UnauthenticatedError("revoked")]
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            await world.idle()
            assert world.entries == [TRAIN]
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
            assert f"begin {TRAIN}" not in session.calls
        assert world.counter() == "left"

    with caplog.at_level(logging.WARNING):
        play(go())
    assert "not answered: revoked" in caplog.text


def test_cancelled_while_it_is_spooled(world, monkeypatch):
    """The thread that spools cannot be stopped: it is waited for, and its entry is whole."""

    async def go():
        loop, commits = asyncio.get_running_loop(), asyncio.Event()
        gate = threading.Event()

        def commit(self, entry, work):
            loop.call_soon_threadsafe(commits.set)
            assert gate.wait(60)
            real(self, entry, work)

        real = Spool.commit
        monkeypatch.setattr(Spool, "commit", commit)
        async with world.loop() as session:
            session.offer(TRAIN)
            await commits.wait()
            worker = world.tasks._workers[TRAIN]
            worker.cancel()
            await settle()
            assert not worker.done()
            gate.set()
            await asyncio.wait([worker])
            assert worker.cancelled()
        assert world.entries == [TRAIN]
        assert list((world.folder / "work").iterdir()) == []

    play(go())


def test_a_task_whose_result_was_lost_is_given_back_at_once(world):
    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [lambda: world.spool.file(TaskId.parse(TRAIN)).unlink()]
            session.answers[TRAIN] = [DataLossError("its bytes are not what they were")]
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 3)
            assert [list(ask.held) for ask in session.asked] == [[], [TRAIN], []]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 2

    play(go())


def test_what_the_server_has_lost_is_told_and_not_trained_again(world):
    """Its base is damaged there: the same result would come to the same end, for ever."""

    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [DataLossError("blob x is damaged")]
            session.offer(TRAIN)
            await session.until(lambda: len(session.submitted) == 1)
            await world.idle()
            assert "blob x is damaged" in session.submitted[0].failure.error
            assert world.entries == []

    play(go())
