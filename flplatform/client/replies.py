"""What a run process may say to its parent: parsed strictly and bounded, it is not trusted."""

import asyncio
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from flplatform.client.frames import (
    LENGTH,
    MAX_ERROR_CHARS,
    MAX_REPLY_BYTES,
    MAX_TRACEBACK_BYTES,
)
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.messages import check_examples, check_metrics
from flplatform.core.strict import Strict


class Hello(Strict):
    """The first frame."""

    type: Literal["hello"]
    secret: str
    rank: Annotated[int, Field(ge=0)] = 0


class Ready(Strict):
    """The job's code is loaded."""

    type: Literal["ready"]


class Phase(Strict):
    """What the process is doing now."""

    type: Literal["phase"]
    phase: Literal["validate_received", "train", "validate_trained", "validate"]


class Metric(Strict):
    """A number that the job's code logs."""

    type: Literal["metric"]
    name: str
    value: float
    step: Annotated[int, Field(ge=0, lt=1 << 63)] | None


class Result(Strict):
    """A task is done."""

    type: Literal["result"]
    task: str
    file: Literal["result.safetensors"] | None
    examples: int
    metrics: dict[str, float]
    received: dict[str, float]
    received_examples: int
    local: dict[str, float]
    local_examples: int


class Done(Strict):
    """A rank other than 0 has done its part of a task."""

    type: Literal["done"]
    task: str


class Failure(Strict):
    """A task has failed, or, if `task` is null, the code itself."""

    type: Literal["failure"]
    task: str | None
    error: str = Field(max_length=MAX_ERROR_CHARS)
    traceback: str = Field(max_length=MAX_TRACEBACK_BYTES)


Reply = Hello | Ready | Phase | Metric | Result | Done | Failure
_REPLIES: TypeAdapter[Reply] = TypeAdapter(Annotated[Reply, Field(discriminator="type")])


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Read one frame.

    Raises:
        InvalidArgumentError: it is too long, not a reply, or has numbers out of bounds.
        asyncio.IncompleteReadError: there are no more.
        ConnectionError: the connection broke.
    """
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if length > MAX_REPLY_BYTES:
        raise InvalidArgumentError(f"sent a frame of {length} bytes")
    try:
        reply = _REPLIES.validate_json(await reader.readexactly(length))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise InvalidArgumentError(f"sent what is no reply: {first['msg']:.200}") from None
    if isinstance(reply, Metric):
        check_metrics({reply.name: reply.value})
    if isinstance(reply, Result):
        check_metrics(reply.metrics)
        check_metrics(reply.received, "received")
        check_examples(reply.examples)
        check_examples(reply.received_examples, "received_examples")
        check_metrics(reply.local, "local")
        check_examples(reply.local_examples, "local_examples")
    return reply
