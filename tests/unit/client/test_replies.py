"""What a run process may say."""

import asyncio

import pytest

from flplatform.client.frames import LENGTH, MAX_REPLY_BYTES, encode
from flplatform.client.replies import Metric, Result, read_reply
from flplatform.core.errors import InvalidArgumentError

RESULT = {
    "task": "7/1/train/site-1",
    "file": "result.safetensors",
    "examples": 3,
    "metrics": {"loss": 1},
    "received": {},
    "received_examples": 0,
    "local": {},
    "local_examples": 0,
}


def read(data: bytes):
    async def run():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_reply(reader)

    return asyncio.run(run())


def test_replies():
    assert read(encode("result", RESULT)) == Result(type="result", **RESULT)
    assert read(encode("metric", {"name": "x", "value": 1, "step": None})) == Metric(
        type="metric", name="x", value=1.0, step=None
    )


@pytest.mark.parametrize(
    "data",
    [
        LENGTH.pack(MAX_REPLY_BYTES + 1),
        LENGTH.pack(2) + b"{}",
        LENGTH.pack(1) + b"{",
        LENGTH.pack(2) + b"\xff\xff",
        LENGTH.pack(100_000) + b"[" * 100_000,
        encode("start", {}),
        encode("ready", {"more": 1}),
        encode("hello", {"secret": 5}),
        encode("phase", {"phase": "lunch"}),
        encode("metric", {"name": "", "value": 1.0, "step": None}),
        encode("metric", {"name": "x", "value": "1", "step": None}),
        encode("metric", {"name": "x", "value": 1.0, "step": -1}),
        encode("failure", {"task": None, "error": "x" * 1001, "traceback": ""}),
        encode("result", RESULT | {"file": "../client.key"}),
        encode("result", RESULT | {"examples": -1}),
        encode("result", RESULT | {"examples": True}),
        encode("result", RESULT | {"received_examples": 1 << 41}),
        encode("result", RESULT | {"local_examples": -1}),
        encode("result", RESULT | {"local": {"": 1.0}}),
        encode("phase", {"phase": "submit_model"}),
        encode("result", RESULT | {"metrics": {"a\nb": 1.0}}),
        encode("result", RESULT | {"received": {str(n): 1.0 for n in range(201)}}),
        encode("result", RESULT)[:-1].replace(b'{"loss": 1}', b'{"loss": NaN}'),
    ],
)
def test_everything_else_is_refused(data):
    with pytest.raises((InvalidArgumentError, EOFError)):
        read(data)


def test_the_end():
    for data in (b"", b"\0\0", LENGTH.pack(5) + b"123"):
        with pytest.raises(EOFError):
            read(data)
