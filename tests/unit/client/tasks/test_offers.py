"""Tasks at a site: begun once, withdrawn, given back."""

import asyncio
import threading

import pytest

from flplatform.client.executors import RunProcessCrashed
from flplatform.client.spool import Spool
from flplatform.core.config import SitePolicy
from flplatform.core.errors import DeadlineExceededError
from flplatform.core.messages import ModelRef
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.unit.client.tasks.world import (
    NEXT,
    OTHER,
    SUBMIT,
    TRAIN,
    VALIDATE,
    FakeRun,
    play,
    settle,
)


def test_a_task_from_offer_to_settlement(world):
    async def go():
        async with world.loop() as session:
            model = world.model()
            session.offer(pb.Task(id=TRAIN, seed=3, model=model))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls == [
                f"download {model.digest[-4:]}",
                f"begin {TRAIN}",
                f"upload {TRAIN}",
                f"result {TRAIN}",
                f"took {TRAIN}",
            ]
            assert [list(ask.held) for ask in session.asked] == [[], [TRAIN]]
            assert list(session.asked[0].runs) == [7, 8]
            result = session.submitted[0].result
            assert (result.examples, result.received_examples) == (100, 90)
            assert (dict(result.metrics), dict(result.received)) == ({"loss": 1}, {"acc": 0.5})
            assert result.trained_from == model.digest
            assert result.blob.size > 0
        assert world.counter() == TRAIN
        assert world.entries == []
        assert world.runs[7].phases[0] == "downloading"
        assert world.runs[7].phases[-1] == "idle"
        assert list((world.folder / "work").iterdir()) == []

    play(go())


def test_validation_has_no_model_and_no_state(world):
    async def go():
        async with world.loop() as session:
            world.policy = SitePolicy(max_examples=1)
            session.offer(pb.Task(id=VALIDATE, model=world.model()))
            await session.until(lambda: session.submitted)
            await world.idle()
            result = session.submitted[0].result
            assert not result.HasField("blob")
            assert (result.examples, result.trained_from) == (100, "")
            assert not any(call.startswith("upload") for call in session.calls)
        assert world.counter() is None

    play(go())


def test_a_task_in_hand_is_not_begun_again(world):
    async def go():
        async with world.loop() as session:
            gate = asyncio.Event()
            world.runs[7].does[TRAIN] = [gate]
            for _ in range(3):
                session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 4)
            gate.set()
            await session.until(lambda: session.submitted)
            assert session.calls.count(f"begin {TRAIN}") == 1

    play(go())


def test_answered_while_the_offer_was_on_its_way(world):
    """A reply may still list what was answered since; it is not done again for that."""

    async def go():
        async with world.loop() as session:
            gate, ending = asyncio.Event(), asyncio.Event()
            world.runs[7].does[TRAIN] = [gate]
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 2)

            async def offer(_tasks, **_):
                gate.set()
                await session.until(lambda: f"took {TRAIN}" in session.calls)
                await world.idle()
                ending.set()

            world.tasks._cache.offer = offer
            session.offer(TRAIN)
            await ending.wait()
            await session.until(lambda: len(session.asked) == 3)
            await settle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            # If it is still open for the server then, it is done again.
            session.offer(TRAIN)
            await session.until(lambda: session.calls.count(f"begin {TRAIN}") == 2)

    play(go())


def test_a_withdrawn_task_is_cancelled(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [asyncio.Event()]
            world.runs[8].does[OTHER] = [gate := asyncio.Event()]
            session.offer(TRAIN, OTHER)
            await session.until(lambda: f"begin {OTHER}" in session.calls)
            session.offer(OTHER)
            await session.until(lambda: len(session.asked) == 3)
            assert list(session.asked[2].held) == [OTHER]
            async with world.runs[7].turn:
                pass
            gate.set()
            await session.until(lambda: session.submitted)
            session.offer(NEXT)
            await session.until(lambda: f"begin {NEXT}" in session.calls)
        assert not any(call.endswith(TRAIN) and "begin" not in call for call in session.calls)

    play(go())


def test_several_are_withdrawn_at_once(world):
    """One that ends by itself while another is still being cancelled is no stumbling block."""

    async def go():
        async with world.loop() as session:
            cancelled = asyncio.Event()

            async def stubborn():
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()
                    await settle()

            world.runs[7].does[TRAIN] = [stubborn]
            world.runs[8].does[OTHER] = [cancelled, RunProcessCrashed("by itself")]
            session.offer(TRAIN, OTHER)
            await session.until(lambda: f"begin {OTHER}" in session.calls)
            session.offer()
            await session.until(lambda: len(session.asked) == 3)
            assert list(session.asked[2].held) == []
            await world.idle()

    play(go())


class Stubborn:
    """Job code that takes its time to end once it is cancelled."""

    def __init__(self):
        self.cancelled, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
            await self.may_end.wait()


def test_who_takes_its_time_to_end_holds_up_only_its_own_run(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [stubborn := Stubborn()]
            session.offer(TRAIN)
            await session.until(lambda: f"begin {TRAIN}" in session.calls)
            session.offer(NEXT, OTHER)
            await stubborn.cancelled.wait()
            await session.until(lambda: f"took {OTHER}" in session.calls)
            assert [set(asked.held) for asked in session.asked[1:]] == [{TRAIN}, {NEXT, OTHER}]
            assert "downloading" not in world.runs[7].phases
            assert f"begin {NEXT}" not in session.calls
            stubborn.may_end.set()
            await session.until(lambda: f"took {NEXT}" in session.calls)
            assert world.runs[7].phases[0] == "idle", "the first is through before the next begins"

    play(go())


def test_who_is_wanted_again_while_it_ends_begins_anew_after_that(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [stubborn := Stubborn()]
            session.offer(TRAIN)
            await session.until(lambda: f"begin {TRAIN}" in session.calls)
            session.offer()
            await stubborn.cancelled.wait()
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 4)
            assert [list(asked.held) for asked in session.asked[2:]] == [[], [TRAIN]]
            world.runs[7].does[TRAIN] = []
            stubborn.may_end.set()
            # Now the server is told that nobody has it in hand; its answer is the task.
            await session.until(lambda: len(session.asked) == 5)
            assert list(session.asked[4].held) == []
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)

    play(go())


def test_a_run_that_takes_its_time_to_end_holds_up_no_other(world):
    async def go():
        world.commit(SUBMIT, state=False)
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [stubborn := Stubborn()]
            session.answers[SUBMIT] = [asyncio.Event()]
            session.offer(TRAIN, SUBMIT)
            await session.until(lambda: f"begin {TRAIN}" in session.calls)
            session.offer(OTHER, ended=[7])
            await stubborn.cancelled.wait()
            await session.until(lambda: f"took {OTHER}" in session.calls)
            (ending,) = world.ending
            assert not ending.done()
            stubborn.may_end.set()
            await ending
            assert world.entries == []
        assert f"took {SUBMIT}" not in session.calls

    play(go())


def test_a_withdrawn_task_that_is_offered_again_is_held(world):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [gate := asyncio.Event()]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 4)
            assert [list(ask.held) for ask in session.asked[2:]] == [[], [TRAIN]]
            gate.set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)

    play(go())


def test_the_end_of_a_run(world):
    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            session.answers[TRAIN] = [asyncio.Event()]
            world.runs[8].does[OTHER] = [asyncio.Event()]
            session.offer(TRAIN, NEXT, OTHER)
            await session.until(lambda: f"begin {OTHER}" in session.calls)
            session.offer(OTHER, ended=[7])
            await session.until(lambda: len(session.asked) == 3)
            assert world.ended == [(7, "finished")]
            assert list(session.asked[2].held) == [OTHER]
            assert list(session.asked[2].runs) == [8]
        assert world.entries == []
        assert f"begin {NEXT}" not in session.calls

    play(go())


@pytest.mark.parametrize("name", ["get", "entries"])
def test_the_loop_goes_on_while_the_spool_is_asked(world, monkeypatch, name):
    """It may have to wait: for the disk, or for another run's result to be renamed."""
    going_on, real = threading.Event(), getattr(Spool, name)

    def slowly(*args):
        assert going_on.wait(60), "the event loop stands still"
        return real(*args)

    async def go():
        loop, asked = asyncio.get_running_loop(), asyncio.Event()

        def ask(*args):
            loop.call_soon_threadsafe(asked.set)
            return slowly(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Spool, name, ask)
            async with world.loop() as session:
                session.offer(TRAIN)
                await asked.wait()
                going_on.set()
                await session.until(lambda: f"took {TRAIN}" in session.calls)
                assert session.submitted[0].HasField("result")

    play(go())


def test_a_run_that_is_taken_on_is_asked_about_at_once(world):
    """It may have been ended while the site took it on: the call that waits does not name it."""

    async def go():
        async with world.loop() as session:
            await session.until(lambda: len(session.asked) == 1)
            world.runs[9] = FakeRun(session, world.folder / "new", 9)
            world.news.set()
            await session.until(lambda: len(session.asked) == 2)
            assert list(session.asked[1].runs) == [7, 8, 9]

    play(go())


@pytest.mark.parametrize("error", [RuntimeError("odd"), DeadlineExceededError("odd")])
def test_a_task_that_ends_unanswered_is_given_back_at_once(world, error):
    """The server believes that it is in hand: the call that waits would do so for a minute."""

    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [error]
            session.offer(TRAIN)
            await session.until(lambda: [list(ask.held) for ask in session.asked[1:]][1:] == [[]])
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1

    play(go())


def test_one_download_however_many_ask(world):
    async def go():
        async with world.loop() as session:
            blob = world.model()
            ref = ModelRef(blob.digest, blob.size)
            found = await asyncio.gather(*(world.tasks.fetch(ref) for _ in range(5)))
            assert len(set(found)) == 1
            assert session.calls == [f"download {ref.digest[-4:]}"]
            assert len(world.tasks._cache._fetching) == 0

    play(go())


def test_downloads_of_one_blob_never_overlap(world):
    """Also if the first is given up while others wait, and more come."""

    async def go():
        async with world.loop() as session:
            blob = world.model()
            ref = ModelRef(blob.digest, blob.size)
            first_gate, second_gate = asyncio.Event(), asyncio.Event()
            session.uploads[blob.digest] = [first_gate, second_gate]
            first, second = (asyncio.create_task(world.tasks.fetch(ref)) for _ in range(2))
            await session.until(lambda: len(session.calls) == 1)
            await settle()
            first.cancel()
            third = asyncio.create_task(world.tasks.fetch(ref))
            await session.until(lambda: len(session.calls) == 2)
            await settle()
            second_gate.set()
            assert await second == await third
            assert len(session.calls) == 2

    play(go())


def test_a_run_that_was_started_anew_meanwhile_goes_on(world):
    """The server ended it for this site, and then had the site join again by another order."""

    async def go():
        async with world.loop() as session:
            await session.until(lambda: len(session.asked) == 1)
            world.runs[7] = FakeRun(session, world.folder / "anew", 7)
            session.offer(ended=[7, 8])
            await session.until(lambda: len(session.asked) == 2)
            assert world.ended == [(8, "finished")]
            session.offer(ended=[7])
            await session.until(lambda: len(session.asked) == 3)
            assert [run for run, _ in world.ended] == [8, 7]

    play(go())
