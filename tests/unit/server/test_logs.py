"""The server's share of `logs`: events in words, and what sites push, however hostile."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from flplatform.core.logs import MAX_TEXT
from flplatform.server import logs as module
from flplatform.server.logs import RunLogs
from tests.unit.server.scene import play

TIME = "2026-05-01T12:00:00.000Z"
LATER = "2026-05-01T12:00:01.000Z"
TRACE = "Traceback (most recent call last):\n  File x\nValueError: \x1b[31mno\n"
FAILED = ev.TaskFailed(task_id="3/1/train/a", site="a", error="ValueError: no", traceback=TRACE)


class Run:
    """A run as far as its log goes."""

    def __init__(self):
        self.events = []
        self.times = []
        self.state = SimpleNamespace(ended=None)

    def append(self, event, time=TIME):
        self.events.append(event)
        self.times.append(time)
        if isinstance(event, ev.RunEnded):
            self.state.ended = event


@pytest.fixture
def run():
    run = Run()
    run.append(ev.StepStarted(index=0, step="scatter_gather"))
    return run


@pytest.fixture
def logs(run):
    def view(number):
        if number != 3:
            raise NotFoundError(f"there is no run {number}")
        return run

    return RunLogs(view)


def batch(feed, lines=(), number=1, life="1", ended="", **changes):
    entries = [line if isinstance(line, list) else [TIME, "job", line] for line in lines]
    body = {
        "subscription": feed.id, "life": life, "number": number, "lines": entries, "ended": ended,
    }  # fmt: skip
    return json.dumps(body | changes).encode()


def said(news):
    return [(line.source, line.text) for line in news.lines]


# ---- events


def test_events_in_words(logs, run):
    run.append(FAILED, LATER)
    first, failed = logs.of_run(3)
    assert (str(first)) == f"{TIME} server event | scatter_gather started"
    assert failed.text.splitlines() == [
        "3/1/train/a failed: ValueError: no",
        "Traceback (most recent call last):",
        "  File x",
        "ValueError: ?[31mno",
    ]
    with pytest.raises(NotFoundError):
        logs.of_run(4)


def test_a_traceback_is_bounded(logs, run):
    trace = "x" * 20_000 + "\n" + "\n".join(f"line {n}" for n in range(5000))
    run.append(FAILED.model_copy(update={"traceback": trace, "error": "e" * 99_999}))
    found = logs.of_run(3)[-1].text.splitlines()
    assert len(found) == module.MAX_TRACEBACK_LINES + 1
    assert found[-1] == "line 4999"
    assert max(map(len, found)) <= MAX_TEXT


def test_what_failed_a_run(logs, run):
    run.append(FAILED)
    later = FAILED.model_copy(update={"site": "b", "traceback": "", "error": "shot"})
    run.append(later)
    assert logs.failure(3) is None
    run.append(ev.RunEnded(status="failed", reason="too few sites"))
    failure = logs.failure(3)
    assert (failure.site, failure.task_id, failure.error) == (
        "a",
        "3/1/train/a",
        "ValueError: no",
    )
    assert failure.traceback.endswith("ValueError: ?[31mno")


@pytest.mark.parametrize("status", ["finished", "aborted", "failed"])
def test_no_task_failed_it(logs, run, status):
    if status != "failed":
        run.append(FAILED)
    run.append(ev.RunEnded(status=status, reason=""))
    assert logs.failure(3) is None


# ---- following


def test_lines_and_events_as_they_come(logs, run):
    async def it():
        feed = logs.follow(3, ["a", "b"])
        logs.process("a", batch(feed, ["one", "two"]))
        logs.process("b", batch(feed, ["three"]))
        assert said(await feed.news(0)) == [("a", "one"), ("a", "two"), ("b", "three")]
        waiting = asyncio.create_task(feed.news(10))
        await asyncio.sleep(0)
        run.append(ev.DeployWaitOver())
        logs.changed()
        news = await waiting
        assert [line.source for line in news.lines] == ["server"]
        assert not news.run_over
        run.append(ev.RunEnded(status="finished", reason="all steps done"))
        logs.changed()
        assert (await feed.news(10)).run_over
        assert said(await feed.news(0)) == []

    play(it())


def test_who_is_heard_and_who_has_returned(logs):
    async def it():
        feed = logs.follow(3, ["a", "b"])
        logs.process("a", batch(feed))
        logs.returned("b")
        logs.returned("stranger")
        news = await feed.news(10)
        assert (news.heard, news.returned, news.lines) == ({"a"}, {"b"}, ())
        logs.process("b", batch(feed, ["last"], ended="run"))
        news = await feed.news(10)
        assert (news.heard, news.ended) == ({"b"}, {"b"})
        logs.process("a", batch(feed, number=2))
        logs.returned("a")  # what came before says nothing of the new process
        assert (await feed.news(10)).heard == frozenset()

    play(it())


def test_a_batch_that_comes_again_counts_once(logs):
    async def it():
        feed = logs.follow(3, ["a"])
        for number in (1, 1, 2, 1, 2):
            logs.process("a", batch(feed, [f"{number}"], number=number))
        logs.process("a", batch(feed, ["of a new process"], life="2"))
        assert [text for _, text in said(await feed.news(0))] == ["1", "2", "of a new process"]

    play(it())


def test_lives_without_end_are_bounded(logs):
    async def it():
        feed = logs.follow(3, ["a"])
        for number in range(1000):
            logs.process("a", batch(feed, ["x"], life=str(number)))
        assert len((await feed.news(0)).lines) == module.MAX_LIVES

    play(it())


# ---- who may send


def test_only_the_sites_that_were_asked(logs):
    async def it():
        feed = logs.follow(3, ["a"])
        other = logs.follow(3, ["b"])
        for site, target in (("b", feed), ("stranger", feed), ("a", other)):
            with pytest.raises(NotFoundError, match=f"nobody follows logs of {site}"):
                logs.process(site, batch(target, ["x"]))
        assert (await feed.news(0)).lines == ()

    play(it())


def test_when_nobody_listens_any_more(logs):
    async def it():
        feed = logs.follow(3, ["a"])
        feed.close()
        with pytest.raises(NotFoundError):
            logs.process("a", batch(feed, ["x"]))
        feed.close()

    play(it())


def test_feeds_are_bounded(logs):
    async def it():
        for _ in range(module.MAX_FEEDS):
            logs.follow(3, ["a"])
        with pytest.raises(ResourceExhaustedError):
            logs.follow(3, ["a"])

    play(it())


# ---- a hostile site


@pytest.mark.parametrize(
    "changes",
    [
        {"lines": {}}, {"lines": "x"}, {"number": "1"}, {"number": 1.5}, {"number": True},
        {"number": None}, {"life": 5}, {"subscription": []}, {"ended": True}, {"ended": None},
    ],
)  # fmt: skip
def test_wrong_types(logs, changes):
    async def it():
        feed = logs.follow(3, ["a"])
        with pytest.raises(InvalidArgumentError):
            logs.process("a", json.dumps(json.loads(batch(feed)) | changes).encode())
        assert await feed.news(0) == await feed.news(0)

    play(it())


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"5", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"lines": 1e999}'],
)
def test_bodies_that_are_none(logs, body):
    async def it():
        logs.follow(3, ["a"])
        with pytest.raises(InvalidArgumentError):
            logs.process("a", body)

    play(it())


def test_a_batch_of_ten_megabytes(logs):
    async def it():
        feed = logs.follow(3, ["a"])
        with pytest.raises(InvalidArgumentError, match="bytes"):
            logs.process("a", batch(feed, ["x" * 10_000_000]))
        logs.process("a", batch(feed, ["x" * 400_000]))
        assert len((await feed.news(0)).lines[0].text) == MAX_TEXT

    play(it())


def test_lines_that_are_none_are_counted(logs):
    async def it():
        feed = logs.follow(3, ["a"])
        forged = f"x\r\n{TIME} server event | finished\x1b[2J"
        entries = [[TIME, "job", forged], [5], [TIME, "JOB", "x"], ["now", "job", "x"], []]
        logs.process("a", batch(feed, entries))
        first, note = (await feed.news(0)).lines
        assert "\n" not in first.text
        assert "\x1b" not in first.text
        assert (note.who, note.text) == ("log", "… 4 unreadable lines dropped")

    play(it())


def test_a_flood_waits_for_the_reader(logs):
    """What is held is bounded, and other sites are not held up."""

    async def it():
        feed = logs.follow(3, ["a", "b"])
        taken = 0
        while not feed.full("a"):
            taken += 1
            logs.process("a", batch(feed, ["x" * 8000] * 50, number=taken))
        assert taken <= 3
        with pytest.raises(ResourceExhaustedError):
            logs.process("a", batch(feed, ["one more"], number=taken + 1))
        logs.process("b", batch(feed, ["still heard"]))
        assert ("b", "still heard") in said(await feed.news(0))
        logs.process("a", batch(feed, ["and again"], number=taken + 1))
        assert said(await feed.news(0)) == [("a", "and again")]

    play(it())
