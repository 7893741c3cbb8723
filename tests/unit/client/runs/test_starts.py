"""Starts on their way in, one of each run at a time."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta

from flplatform.client import cache
from flplatform.core.errors import FailedPreconditionError
from tests.unit.client.runs.world import at_work, play, refused, settle, until_deleted


def trimmed(runs, world) -> list[str]:
    return cache.trim(world.blobs, runs.needed_blobs(), 0)


def test_the_package_of_a_start_is_needed_from_the_beginning(world, monkeypatch):
    stages = []

    async def go():
        offer = world.offer()
        runs = world.runs()
        real = runs._folders.unpack

        async def fetch(blob):
            stages.append(trimmed(runs, world))
            return world.blobs.path(blob.digest)

        def unpack(*args):
            found = real(*args)
            stages.append(trimmed(runs, world))
            return found

        runs._fetch = fetch
        monkeypatch.setattr(runs._folders, "unpack", unpack)
        await runs.accept(*offer)
        assert [*stages, trimmed(runs, world)] == [[], [], []]
        await runs.close()
        assert resumed_in(world) == [1]

    def resumed_in(world):
        return [run.run for run in world.runs().all()]

    play(go())


def test_a_package_that_made_room_before_it_was_needed_is_fetched_once_more(world):
    async def go():
        offer = world.offer()
        path = world.blobs.path(offer[3].digest)
        data = path.read_bytes()
        runs = world.runs()

        async def fetch(blob):
            world.fetched.append(blob.digest)
            if len(world.fetched) == 1:
                path.unlink()  # the trim that had begun before
            else:
                path.write_bytes(data)
            return path

        runs._fetch = fetch
        assert await runs.accept(*offer)
        assert len(world.fetched) == 2
        await runs.close()

    play(go())


def test_a_start_that_waits_holds_up_no_other(world):
    async def go():
        runs = world.runs()
        big, small = world.offer(1, 1, data=world.packed(code="x = 'big'")), world.offer(2, 2)
        fetch, gate = world.fetch, asyncio.Event()

        async def full(blob):
            if blob.digest == big[3].digest:
                await gate.wait()
            return await fetch(blob)

        runs._fetch = full
        one = asyncio.create_task(runs.accept(*big))
        await settle()
        assert runs.numbers() == [1]
        assert (runs.held(1), runs.reports(), runs.over(1)) == (None, [], False)
        assert await runs.accept(*small)
        # What comes again, by another number, is refused at once: it is on its way in.
        again = world.offer(3, 1, data=world.packed(code="x = 'big'"))
        await refused(runs.accept(*again), "single start")
        gate.set()
        assert await one
        assert runs.numbers() == [1, 2]
        await runs.close()

    play(go())


def test_a_start_is_given_up_when_its_run_ends(world):
    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        one = asyncio.create_task(runs.accept(*world.offer()))
        await settle()
        assert runs.news.is_set()  # so that the server is asked about it
        runs.end(1, "aborted")
        runs.end(1, "aborted")
        text = await refused(one, "run_ended", error=FailedPreconditionError)
        assert "given up before it began here: aborted" in text
        assert runs.numbers() == []
        world.gate.set()
        assert await runs.accept(*world.offer())  # nothing was used up
        await runs.close()

    play(go())


def test_a_start_that_is_given_up_while_it_is_unpacked_leaves_nothing(world, monkeypatch):
    unpacked, go_on = asyncio.Event(), threading.Event()

    async def go():
        loop = asyncio.get_running_loop()
        runs = world.runs()
        real = runs._folders.unpack

        def unpack(*args):
            found = real(*args)
            loop.call_soon_threadsafe(unpacked.set)
            assert go_on.wait(60)
            return found

        monkeypatch.setattr(runs._folders, "unpack", unpack)
        one = asyncio.create_task(runs.accept(*world.offer()))
        await unpacked.wait()
        runs.end(1, "aborted")
        go_on.set()
        await refused(one, "run_ended", error=FailedPreconditionError)
        await runs.until_ended(1)
        await until_deleted(runs)
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        await runs.close()

    play(go())


def test_a_start_is_given_up_when_its_time_is_over(world):
    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        soon = datetime.now(UTC) + timedelta(seconds=0.1 - world.kit.site.clock_skew_s)
        before = soon - timedelta(hours=1)
        await refused(
            runs.accept(*world.offer(issued_at=before, not_after=soon)),
            "signed not_after",
            error=FailedPreconditionError,
        )
        assert (runs.numbers(), list(world.home.iterdir())) == ([], [])
        await runs.close()

    play(go())


def test_a_start_by_another_order_takes_the_place_of_one_that_waits(world):
    """The server has withdrawn the first, and does not say so any more."""
    data = world.packed()

    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        tokens = [runs.token(1)]
        one = asyncio.create_task(runs.accept(*world.offer(1, 1, data=data)))
        await settle()
        tokens.append(runs.token(1))
        same = asyncio.create_task(runs.accept(*world.offer(1, 1, data=data)))
        await settle()
        assert runs.token(1) is tokens[-1]
        two = asyncio.create_task(runs.accept(*world.offer(1, 2, data=data)))
        for given_up in (one, same):
            text = await refused(given_up, "run_ended", error=FailedPreconditionError)
            assert "it was started anew" in text
        await settle()
        tokens.append(runs.token(1))
        world.gate.set()
        assert await two == {"isolation": "sandbox"}
        assert at_work(runs, 1).record.submission_id == f"{2:032x}"
        tokens.append(runs.token(1))
        assert tokens[0] is None
        assert len(set(map(id, tokens))) == len(tokens)
        await runs.close()

    play(go())


def test_who_gives_a_start_up_ends_it(world):
    async def go():
        runs = world.runs()
        world.gate = asyncio.Event()
        one = asyncio.create_task(runs.accept(*world.offer()))
        await settle()
        one.cancel()
        await asyncio.wait([one])
        assert (one.cancelled(), runs.numbers()) == (True, [])
        other = asyncio.create_task(runs.accept(*world.offer()))
        await settle()
        await runs.close()
        assert other.cancelled()

    play(go())


def test_a_place_is_reserved_while_a_run_is_unpacked(world, monkeypatch):
    world.local(max_runs=1)

    async def go():
        runs = world.runs()
        loop, real, others = asyncio.get_running_loop(), runs._folders.unpack, []

        def unpack(*args):
            if not others:
                others.append(
                    asyncio.run_coroutine_threadsafe(
                        runs.accept(*world.offer(2, 2, data=world.packed(code="x = 2"))), loop
                    )
                )
                assert "max_runs = 1" in str(others[0].exception(10))
            return real(*args)

        monkeypatch.setattr(runs._folders, "unpack", unpack)
        assert await runs.accept(*world.offer())
        assert runs.numbers() == [1]
        await runs.close()

    play(go())
