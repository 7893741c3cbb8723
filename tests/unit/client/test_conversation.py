"""Who is let in, and what is made of what they say."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from flplatform.client import conversation as module
from flplatform.client.conversation import Conversation
from flplatform.client.frames import LENGTH, Order, Start, encode

START = Start(7, "site-1", "/code", "/box", "job", "", {}, {}, "", "", 0)


class Parent:
    """A conversation and what it tells."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "s"
        self.phases, self.metrics, self.notes = [], [], []

    async def __aenter__(self):
        self.conversation = Conversation(
            START,
            "the secret",
            self.phases.append,
            lambda *metric: self.metrics.append(metric),
            self.notes.append,
        )
        await self.conversation.listen(self.path)
        return self

    async def __aexit__(self, *_):
        self.conversation.close()
        await asyncio.sleep(0)

    async def connect(self, secret: str = "the secret"):
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(encode("hello", {"secret": secret}))
        return reader, writer


def converse(tmp_path, body):
    async def run():
        async with Parent(tmp_path) as parent:
            await body(parent)

    asyncio.run(run())


def test_the_process_is_let_in_and_told_what_to_run(tmp_path):
    async def body(parent):
        reader, writer = await parent.connect()
        (length,) = LENGTH.unpack(await reader.readexactly(4))
        assert b'"type": "start"' in await reader.readexactly(length)
        assert parent.conversation.leader.pid == os.getpid()
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
        assert parent.conversation.leader is None
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
