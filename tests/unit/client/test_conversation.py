"""Who is let in, and what is made of what they say."""

import asyncio
import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from flplatform.client import conversation as module
from flplatform.client.conversation import Conversation
from flplatform.client.frames import LENGTH, Order, Start, encode

START = Start(7, "site-1", "/code", "/box", "job", "", {}, {}, "", "", 0)


class Parent:
    """A conversation and what it tells."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        self.path, self.secret = folder / "s", folder / "secret"
        self.secret.write_text("the secret")
        self.start = replace(START, world_size=processes)
        self.phases, self.metrics, self.notes = [], [], []

    async def __aenter__(self):
        self.conversation = Conversation(
            self.start,
            "the secret",
            self.phases.append,
            lambda *metric: self.metrics.append(metric),
            self.notes.append,
        )
        await self.conversation.listen(self.path, self.secret)
        return self

    async def __aexit__(self, *_):
        self.conversation.close()
        await asyncio.sleep(0)

    async def connect(self, secret: str = "the secret", rank: int = 0):
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(encode("hello", {"secret": secret, "rank": rank}))
        return reader, writer


async def read(reader) -> dict:
    (length,) = LENGTH.unpack(await reader.readexactly(4))
    return json.loads(await reader.readexactly(length))


def converse(tmp_path, body, processes: int = 1):
    async def run():
        async with Parent(tmp_path, processes) as parent:
            await body(parent)

    asyncio.run(run())


def test_the_process_is_let_in_and_told_what_to_run(tmp_path):
    async def body(parent):
        reader, writer = await parent.connect()
        assert (await read(reader))["type"] == "start"
        assert not parent.secret.exists()
        assert parent.conversation.peers[0].pid == os.getpid()
        assert parent.conversation.begun
        writer.write(encode("ready", {}))
        assert await parent.conversation.ready is None
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            await parent.connect()
        writer.close()
        await parent.conversation.over
        assert parent.conversation.fault == ""

    converse(tmp_path, body)


@pytest.mark.parametrize("first", [b"", b"\0\0\0\1x", encode("ready", {}), LENGTH.pack(1 << 31)])
def test_nobody_else_is(tmp_path, first):
    async def body(parent):
        reader, writer = await asyncio.open_unix_connection(parent.path)
        writer.write(first)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        reader, writer = await parent.connect("a wrong secret")
        assert await reader.read() == b""
        writer.close()
        assert parent.notes == ["a connection was refused: not this run's process"] * 2
        assert parent.conversation.peers == {}
        _, writer = await parent.connect()  # a refused one has not taken the place
        writer.write(encode("ready", {}))
        await parent.conversation.ready
        writer.close()

    converse(tmp_path, body)


def test_another_user_is_not(tmp_path, monkeypatch):
    async def body(parent):
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        reader, writer = await parent.connect()
        with contextlib.suppress(ConnectionError):  # what it sent was not even read
            assert await reader.read() == b""
        writer.close()
        assert parent.notes

    converse(tmp_path, body)


def test_a_silent_one_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELLO_TIMEOUT_S", 0.05)

    async def body(parent):
        reader, writer = await asyncio.open_unix_connection(parent.path)
        assert await reader.read() == b""
        writer.close()

    converse(tmp_path, body)


def test_what_is_said_is_passed_on(tmp_path):
    async def body(parent):
        _, writer = await parent.connect()
        failure = {"error": "E", "traceback": "T"}
        writer.write(encode("failure", {"task": None, **failure}))
        assert (await parent.conversation.ready).error == "E"
        first = parent.conversation.order(Order("7/1/train/site-1", 5, None))
        writer.write(encode("phase", {"phase": "train"}))
        writer.write(encode("metric", {"name": "loss", "value": 0.5, "step": 3}))
        writer.write(encode("failure", {"task": "7/1/train/site-1", **failure}))
        assert (await first).traceback == "T"
        assert parent.phases == ["train"]
        assert parent.metrics == [("loss", 0.5, 3)]
        parent.conversation.stop()
        writer.close()

    converse(tmp_path, body)


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        (encode("hello", {"secret": "the secret"}), "said hello twice"),
        (encode("failure", {"task": "x", "error": "", "traceback": ""}), "answered 'x', not ''"),
        (LENGTH.pack(1) + b"x", "sent what is no reply"),
        (LENGTH.pack(1 << 31), "sent a frame of"),
    ],
)
def test_a_broken_protocol_is_the_end(tmp_path, frame, fault):
    async def body(parent):
        reader, writer = await parent.connect()
        writer.write(frame)
        await parent.conversation.over
        assert fault in parent.conversation.fault
        await reader.read()
        writer.close()

    converse(tmp_path, body)


# ---- several processes


async def two_ranks(parent):
    """Let in rank 1, then rank 0; return their readers and writers, rank 0's first."""
    other = await parent.connect(rank=1)
    leader = await parent.connect(rank=0)
    for rank, (reader, writer) in enumerate((leader, other)):
        start = await read(reader)
        assert (start["type"], start["rank"], start["world_size"]) == ("start", rank, 2)
        writer.write(encode("ready", {}))
    assert await parent.conversation.ready is None
    return leader, other


def test_the_secret_stays_until_the_last_rank_is_in(tmp_path):
    async def body(parent):
        _, first = await parent.connect(rank=1)
        for rank in (1, 2):  # it is there already; it is none of these
            reader, writer = await parent.connect(rank=rank)
            assert await reader.read() == b""
            writer.close()
        assert (parent.secret.exists(), parent.conversation.begun) == (True, False)
        reader, second = await parent.connect(rank=0)
        await read(reader)
        assert (parent.secret.exists(), parent.conversation.begun) == (False, True)
        assert len(parent.notes) == 2
        first.close()
        second.close()

    converse(tmp_path, body, 2)


def test_every_rank_gets_the_order_and_the_news_of_the_trained_model(tmp_path):
    async def body(parent):
        (leader, to_leader), (other, to_other) = await two_ranks(parent)
        reply = parent.conversation.order(Order("7/1/train/site-1", 5, None))
        for reader in (leader, other):
            assert (await read(reader))["task"] == "7/1/train/site-1"
        to_leader.write(encode("phase", {"phase": "validate_trained"}))
        assert await read(other) == {"type": "trained"}
        to_other.write(encode("done", {"task": "7/1/train/site-1"}))
        numbers = {"examples": 1, "received_examples": 0, "local_examples": 0, "file": None}
        fields = {"task": "7/1/train/site-1", "metrics": {}, "received": {}, "local": {}}
        to_leader.write(encode("result", fields | numbers))
        assert (await reply).examples == 1
        parent.conversation.stop()
        assert [await read(reader) for reader in (leader, other)] == [{"type": "stop"}] * 2
        to_other.close()
        await asyncio.sleep(0.05)
        assert not parent.conversation.over.done(), "the others may still be ending"
        to_leader.close()
        await parent.conversation.over
        assert (parent.conversation.fault, parent.conversation.lost) == ("", "")

    converse(tmp_path, body, 2)


def test_a_failure_waits_a_moment_for_those_of_other_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FAILURE_GRACE_S", 0.1)

    async def body(parent):
        (_, leader), (_, other) = await two_ranks(parent)
        reply = parent.conversation.order(Order("7/1/train/site-1", 5, None))
        failed = {"task": "7/1/train/site-1", "traceback": ""}
        leader.write(encode("failure", {**failed, "error": "R: closed by peer"}))
        assert (await reply).error == "rank 0: R: closed by peer"
        monkeypatch.setattr(module, "FAILURE_GRACE_S", 60.0)
        reply = parent.conversation.order(Order("7/1/train/site-1", 5, None))
        leader.write(encode("failure", {**failed, "error": "R: closed by peer"}))
        other.write(encode("failure", {**failed, "error": "E: no data"}))
        assert sorted((await reply).error.split("; ")) == [
            "rank 0: R: closed by peer",
            "rank 1: E: no data",
        ]
        leader.close()
        other.close()

    converse(tmp_path, body, 2)


def test_what_follows_from_the_end_of_a_rank_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FAILURE_GRACE_S", 0.5)

    async def body(parent):
        (_, leader), (_, other) = await two_ranks(parent)
        reply = parent.conversation.order(Order("7/1/train/site-1", 5, None))
        failed = {"task": "7/1/train/site-1", "error": "R: closed by peer", "traceback": ""}
        leader.write(encode("failure", failed))
        other.close()
        await parent.conversation.over
        assert parent.conversation.lost == "rank 1"
        await asyncio.sleep(0.6)
        assert not reply.done()
        leader.close()

    converse(tmp_path, body, 2)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("phase", {"phase": "train"}), ("metric", {"name": "a", "value": 1, "step": None})],
)
def test_only_rank_0_reports(tmp_path, kind, fields):
    async def body(parent):
        (_, leader), (_, other) = await two_ranks(parent)
        other.write(encode(kind, fields))
        await parent.conversation.over
        assert f"rank 1 sent a {kind}" in parent.conversation.fault
        assert (parent.phases, parent.metrics) == ([], [])
        leader.close()
        other.close()

    converse(tmp_path, body, 2)


def test_listening_that_is_cancelled_leaves_no_socket(tmp_path):
    async def run():
        parent = Parent(tmp_path)
        entering = asyncio.create_task(parent.__aenter__())
        await asyncio.sleep(0)
        entering.cancel()
        await asyncio.wait([entering])
        assert entering.cancelled()
        await parent.__aexit__()
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            await parent.connect()

    asyncio.run(run())
