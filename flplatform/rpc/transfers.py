"""Blobs sent and fetched: the caller's side of `rpc.streams`.

What a break leaves is gone on from by the next call. Whatever gRPC raises when a connection breaks,
at whatever instant, comes out as an `FLError`.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from grpc import aio

from flplatform.core.errors import DataLossError, UnavailableError
from flplatform.core.messages import ModelRef
from flplatform.core.ports import BlobStore
from flplatform.files.threads import Workers
from flplatform.rpc.behind import Behind
from flplatform.rpc.channel import CHUNK_BYTES, TOKEN_KEY
from flplatform.rpc.errors import from_rpc, has_error
from flplatform.rpc.pace import Pace, PaceLimits
from flplatform.rpc.streams import DOWNLOAD, OFFSET_KEY, UPLOAD
from flplatform.rpc.v1 import federated_pb2 as pb

WORKERS = Workers(4, thread_name_prefix="transfer")
"""Reads, writes and hashes."""

ANSWER_S = 900.0
"""A server may queue, check or sync for so long before it answers."""

PEER = PaceLimits(min_bytes_s=0.0, window_s=60.0)
"""What is expected of a server: anything at all within so long."""

BROKEN_WRITE = "Internal error from Core"
"""What grpc says of a write into a connection that has broken."""

BROKEN = asyncio.InvalidStateError, aio.InternalError, aio.AioRpcError
"""What grpc raises when something is written to a call whose connection breaks just then."""

T = TypeVar("T")


async def send_blob(
    channel: aio.Channel,
    path: Path,
    blob: ModelRef,
    transfer_id: str,
    *,
    token: str,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Upload a file; an interrupted transfer of the same id goes on where it stopped.

    Args:
        channel: an open channel to either port.
        path: the file, which must not change.
        blob: its digest and size.
        transfer_id: task id or submission id; the server checks what it may hold.
        token: of the registration or session.
        progress: told the number of bytes sent so far.

    Raises:
        FLError: the server refused, or the connection broke (UnavailableError: try again).
    """
    named = pb.Blob(digest=blob.digest, size=blob.size)
    call: Any = channel.stream_unary(UPLOAD)(metadata=((TOKEN_KEY, token),))
    answers: list[aio.AioRpcError] = []
    call.add_done_callback(lambda call: answers.append(_status_now(call)))
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(*BROKEN):  # the reply says why
            header = pb.UploadHeader(transfer_id=transfer_id, blob=named)
            await call.write(header.SerializeToString())
            told = dict(await _answer(call.initial_metadata()) or ())
            if OFFSET_KEY in told:
                await _send_from(call, handle, _offset(told, blob.size), blob.size, progress)
                await call.write(pb.UploadCommit(blob=named).SerializeToString())
                await call.done_writing()
        reply = pb.UploadReply.FromString(await _answer(call))
    except aio.AioRpcError as error:
        # A write that fails puts a status of its own over the one that the server has sent.
        said = next((each for each in answers if has_error(each)), None)
        if said is None and error.details() == BROKEN_WRITE:
            raise UnavailableError("the connection broke") from None
        raise from_rpc(said or error) from None
    finally:
        call.cancel()
        os.close(handle)
    if not reply.committed:
        raise UnavailableError("the upload was cut before its end")


def _offset(told: Mapping[str, Any], size: int) -> int:
    offset = str(told[OFFSET_KEY])
    if not (offset.isdecimal() and len(offset) < 20 and int(offset) <= size):
        raise UnavailableError(f"the server says that it has {offset[:50]!r} of {size} bytes")
    return int(offset)


async def _send_from(
    call: Any, handle: int, offset: int, size: int, progress: Callable[[int], None]
) -> None:
    pace = Pace(PEER)
    ahead = WORKERS.submit(os.pread, handle, CHUNK_BYTES, offset)
    try:
        while offset < size:
            chunk = await asyncio.wrap_future(ahead)
            if not chunk:
                raise DataLossError(f"the file ends at byte {offset} of {size}")
            offset += len(chunk)
            ahead = WORKERS.submit(os.pread, handle, CHUNK_BYTES, offset)
            await pace.wait(call.write(chunk))
            pace.moved(len(chunk))
            progress(offset)
    finally:
        if not ahead.cancel():  # the file is closed next
            rest = asyncio.wrap_future(ahead)
            rest.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at
            await asyncio.shield(asyncio.wait([rest]))


async def _answer(peer: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(ANSWER_S):
            return await peer
    except TimeoutError:
        raise UnavailableError(f"the server has not answered within {ANSWER_S:g} s") from None


def _status_now(call: Any) -> aio.AioRpcError:
    """Return how a call has ended, as known at this moment: nothing here has to wait."""

    def known(coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            coroutine.send(None)
        except StopIteration as ready:
            return ready.value
        coroutine.close()
        return None

    return aio.AioRpcError(
        known(call.code()),
        known(call.initial_metadata()),
        known(call.trailing_metadata()),
        known(call.details()),
    )


def download_id(digest: str) -> str:
    """Return the transfer id by which `fetch_blob` receives a blob."""
    return f"download {digest}"


async def fetch_blob(
    channel: aio.Channel,
    blob: ModelRef,
    blobs: BlobStore,
    *,
    token: str,
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Download a blob into `blobs`, resuming an interrupted download; return its file.

    Raises:
        FLError: the server refused, the connection broke (UnavailableError: try again), or the
            bytes are not what their digest says.
    """
    if blobs.has(blob.digest):
        return blobs.path(blob.digest)
    opening = WORKERS.submit(blobs.receive, download_id(blob.digest), blob, None)
    behind = Behind(WORKERS, opening)
    # From here on whatever is at work in a thread is waited for before the writer is let go.
    try:
        received = (await behind.opened()).offset
        request = pb.DownloadRequest(digest=blob.digest, offset=received)
        stream: Any = channel.unary_stream(DOWNLOAD)
        call = stream(request.SerializeToString(), metadata=((TOKEN_KEY, token),))
        pace = Pace(PEER)
        try:
            chunks = aiter(call)
            chunk = await _answer(anext(chunks, None))
            while chunk is not None:
                await behind.write(chunk)
                received += len(chunk)
                pace.moved(len(chunk))
                progress(received)
                chunk = await pace.wait(anext(chunks, None))
            await behind.drain()
        finally:
            call.cancel()
        if received != blob.size:
            raise UnavailableError(f"the download stopped at byte {received} of {blob.size}")
        behind.finish(whole=True)
        await behind.drain()
    except BaseException as error:
        behind.give_up()
        await asyncio.shield(behind.ended())
        if isinstance(error, aio.AioRpcError):
            raise from_rpc(error) from None
        raise
    return blobs.path(blob.digest)
