"""A site's share of `logs`: who may read, what is pushed, and that all of it is bounded."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest

from flplatform.client import logs as module
from flplatform.client.logs import MAX_QUEUE_BYTES, MAX_SUBSCRIPTIONS, SiteLogs
from flplatform.client.run_log import RunLog
from flplatform.client.verbs import Asked
from flplatform.core.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from flplatform.security.signing import CommandOrder

DEADLINE_S = 60.0
KEY = "5" * 32


class Site:
    """A site with the log of run 3, and a server that takes what is pushed."""

    def __init__(self, folder, **options):
        self.batches = []
        self.refusal = None
        self.ended = set()
        self.sent = asyncio.Event()
        self.logs = SiteLogs(
            folder,
            self._send,
            over=lambda run: run in self.ended,
            submitter={3: ("amy", "hub")}.get,
            **options,
        )
        self.log = RunLog(
            folder / "run-3.log",
            on_lines=lambda time, who, texts: self.logs.publish(3, time, who, texts),
        )

    async def _send(self, batch):
        if self.refusal:
            raise self.refusal
        self.batches.append(json.loads(batch))
        self.sent.set()

    @property
    def pushed(self):
        return [text for batch in self.batches for _, _, text in batch["lines"]]

    async def ask(self, words, **body):
        now = datetime.now(UTC)
        order = CommandOrder(
            project="test",
            issued_at=now,
            not_after=now + timedelta(seconds=60),
            id="0" * 32,
            argv=("logs", *words.split()),
        )
        asked = Asked("r", None, order, json.dumps(body).encode())
        answer = await self.logs.verb().act(asked)
        assert len(json.dumps(answer)) <= (1 << 20)
        return answer

    async def until(self, true):
        async with asyncio.timeout(DEADLINE_S):
            while not true():
                self.sent.clear()
                if not true():
                    await self.sent.wait()


@pytest.fixture
def play(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COALESCE_S", 0.001)

    def run(scene, **options):
        async def whole():
            site = Site(tmp_path, **options)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await scene(site)
            finally:
                await site.logs.close()
                site.log.close()

        asyncio.run(whole())

    return run


def texts(answer):
    return [text for _, _, text in answer["lines"]]


# ---- once


def test_the_last_lines(play):
    async def scene(site):
        site.log.feed(b"".join(b"line %d\n" % number for number in range(10)))
        assert texts(await site.ask("3 --lines 2")) == ["line 8", "line 9"]
        answer = await site.ask("3 --grep 5")
        assert (texts(answer), answer["following"], answer["cut"]) == (["line 5"], False, False)
        assert texts(await site.ask("3 --since 1h")) == [f"line {n}" for n in range(10)]
        assert texts(await site.ask("3", after="2999-01-01T00:00:00.000Z")) == []

    play(scene)


def test_an_answer_is_bounded(play):
    async def scene(site):
        site.log.feed(("\u00e9\u4e2d" * 500 + "\n").encode() * 3000)
        answer = await site.ask("3 --lines 100000")
        assert answer["cut"]
        assert len(json.dumps(answer["lines"])) <= module.MAX_TAIL_BYTES + 2

    play(scene)


def test_without_a_log(play):
    async def scene(site):
        with pytest.raises(NotFoundError, match="no log of run 4 here"):
            await site.ask("4")
        assert await site.ask("-f 4", subscription=KEY) == {"lines": [], "following": True}

    play(scene)


@pytest.mark.parametrize("words", ["", "x", "3 --lines x"])
def test_words_that_are_none(play, words):
    async def scene(site):
        with pytest.raises(InvalidArgumentError):
            await site.ask(words)

    play(scene)


@pytest.mark.parametrize("body", [{"subscription": "x"}, {"after": 5}])
def test_a_server_that_adds_something_else(play, body):
    async def scene(site):
        with pytest.raises(InvalidArgumentError):
            await site.ask("-f 3", **body)

    play(scene)


def test_the_verb(play):
    async def scene(site):
        verb = site.logs.verb()
        assert (verb.name, verb.permission, verb.mutating) == ("logs", "view", False)
        assert verb.reaches(["logs", "3"], "site-1")
        assert verb.reaches(["logs", "-f", "3", "site-1"], "site-1")
        assert not verb.reaches(["logs", "3", "site-2"], "site-1")
        assert not verb.reaches(["logs", "3", "--server"], "site-1")
        assert verb.submitter(None, ["logs", "3"]) == ("amy", "hub")

    play(scene)


# ---- following


def test_nothing_is_lost_or_told_twice(play):
    async def scene(site):
        site.log.feed(b"before\n")
        answer = await site.ask("-f 3", subscription=KEY)
        assert (texts(answer), answer["following"]) == (["before"], True)
        for number in range(50):
            site.log.feed(b"line %d\n" % number)
        await site.until(lambda: len(site.pushed) == 50)
        assert site.pushed == [f"line {number}" for number in range(50)]
        assert {batch["subscription"] for batch in site.batches} == {KEY}
        numbers = [batch["number"] for batch in site.batches]
        assert numbers == sorted(set(numbers))

    play(scene)


def test_lines_written_while_the_end_is_read_are_pushed(play, monkeypatch):
    async def scene(site):
        site.log.feed(b"before\n")
        read = module.tail

        def slow(*args, **options):
            loop.call_soon_threadsafe(site.log.feed, b"meanwhile\n")
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
            return read(*args, **options)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(module, "tail", slow)
        assert texts(await site.ask("-f 3", subscription=KEY)) == ["before"]
        await site.until(lambda: site.pushed == ["meanwhile"])

    play(scene)


def test_only_what_matches_is_pushed(play):
    async def scene(site):
        await site.ask("-f 3 --grep loss", subscription=KEY)
        site.log.feed(b"noise\nloss 1\n")
        site.log.note("task begins")
        site.log.feed(b"loss 2\n")
        await site.until(lambda: site.pushed == ["loss 1", "loss 2"])

    play(scene)


def test_it_ends_with_the_run(play):
    async def scene(site):
        await site.ask("-f 3", subscription=KEY)
        site.log.feed(b"last\n")
        site.ended.add(3)
        site.logs.ended(3)
        await site.until(lambda: site.batches and site.batches[-1]["ended"])
        assert site.pushed == ["last"]
        assert site.batches[-1]["ended"] == "run"
        answer = await site.ask("-f 3", subscription="6" * 32)
        assert (texts(answer), answer["following"]) == (["last"], False)

    play(scene)


def test_it_ends_when_nobody_listens(play):
    async def scene(site):
        await site.ask("-f 3", subscription=KEY)
        (subscription,) = site.logs._subscriptions.values()
        site.refusal = NotFoundError("nobody follows")
        site.log.feed(b"x\n")
        await asyncio.wait([subscription.task])
        assert not site.logs._subscriptions

    play(scene)


def test_it_learns_that_nobody_listens_without_a_line(play):
    async def scene(site):
        await site.ask("-f 3", subscription=KEY)
        (subscription,) = site.logs._subscriptions.values()
        await site.until(lambda: site.batches)
        assert site.batches[0]["lines"] == []
        site.refusal = PermissionDeniedError("no")
        await asyncio.wait([subscription.task])
        assert not site.logs._subscriptions

    play(scene, keep_alive_s=0.01)


def test_it_ends_after_its_time(play):
    async def scene(site):
        await site.ask("-f 3", subscription=KEY)
        await site.until(lambda: site.batches and site.batches[-1]["ended"])
        assert site.batches[-1]["ended"] == "0.05 s are over"

    play(scene, follow_s=0.05)


def test_the_same_subscription_is_opened_once(play):
    async def scene(site):
        site.log.feed(b"before\n")
        await site.ask("-f 3", subscription=KEY)
        assert await site.ask("-f 3", subscription=KEY) == {"lines": [], "following": True}
        site.log.feed(b"after\n")
        await site.until(lambda: site.pushed)
        assert site.pushed == ["after"]

    play(scene)


def test_subscriptions_are_bounded(play):
    async def scene(site):
        for number in range(MAX_SUBSCRIPTIONS):
            await site.ask("-f 3", subscription=f"{number:032x}")
        with pytest.raises(ResourceExhaustedError, match="16 logs"):
            await site.ask("-f 3", subscription=KEY)

    play(scene)


def test_a_flood_is_dropped_and_counted(play):
    async def scene(site):
        gate = asyncio.Event()
        sent = site.logs._send

        async def slow(batch):
            await gate.wait()
            await sent(batch)

        site.logs._send = slow
        await site.ask("-f 3", subscription=KEY)
        for number in range(2000):
            site.log.feed(b"%04d %s\n" % (number, b"x" * 1000))
        (subscription,) = site.logs._subscriptions.values()
        assert sum(size for _, size in subscription._queue) <= MAX_QUEUE_BYTES
        gate.set()
        await site.until(lambda: any("dropped" in text for text in site.pushed))
        kept = [text for text in site.pushed if "dropped" not in text]
        (note,) = [text for text in site.pushed if "dropped" in text]
        assert note == f"… {2000 - len(kept)} lines dropped"
        assert [int(text[:4]) for text in kept] == list(range(len(kept)))
        assert all(len(json.dumps(b)) <= module.MAX_BATCH_BYTES * 1.1 for b in site.batches)
        site.log.feed(b"quiet again\n")
        await site.until(lambda: site.pushed[-1] == "quiet again")

    play(scene)


def test_nothing_is_queued_when_nobody_follows(play):
    async def scene(site):
        site.log.feed(b"x\n" * 1000)
        assert site.logs._subscriptions == {}
        assert site.batches == []

    play(scene)
