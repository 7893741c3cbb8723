"""Blob streams: weights and job packages as raw chunks, resumable, complete only by commit.

A cancelled upload looks like a clean end of stream to the receiver, so nothing counts before the
commit message, and completeness is declared length and digest. All file I/O and hashing runs in
worker threads; the next chunk is on its way while the last one is being written.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from flplatform.core.errors import (
    DataLossError,
    DeadlineExceededError,
    FLError,
    InvalidArgumentError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import MAX_MODEL_BYTES, Manifest, check_digest
from flplatform.core.ports import BlobStore, BlobWriter
from flplatform.rpc.channel import CHUNK_BYTES, TOKEN_KEY
from flplatform.rpc.errors import from_rpc
from flplatform.rpc.interceptors import Caller, caller
from flplatform.rpc.v1 import federated_pb2 as pb

UPLOAD = "/flplatform.v1.Blobs/Upload"
DOWNLOAD = "/flplatform.v1.Blobs/Download"
STALL_S = 60.0
"""A stream that brings nothing for so long is ended; what came stays and can be resumed."""

Admit = Callable[[Caller, str, ModelRef], Manifest | None]
"""(caller, transfer id, blob) → the tensors it must hold, or None; raises to refuse."""

Release = Callable[[Caller, str], None]
"""(caller, digest) → None; raises to refuse a download."""


class Slots:
    """Transfers at work, per caller and in all; the others wait here, not on the disk."""

    def __init__(self, per_caller: int, in_all: int) -> None:
        self._per_caller = per_caller
        self._all = asyncio.Semaphore(in_all)
        self._callers: dict[str, asyncio.Semaphore] = {}

    @asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        """Hold one slot of `name` and one of all."""
        mine = self._callers.setdefault(name, asyncio.Semaphore(self._per_caller))
        async with mine, self._all:
            yield


class BlobService:
    """Server side of both streams, on one port."""

    def __init__(
        self, blobs: BlobStore, admit: Admit, release: Release, slots: Slots, workers: Executor
    ) -> None:
        self._blobs = blobs
        self._admit = admit
        self._release = release
        self._slots = slots
        self._workers = workers

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to add to an aio server: bytes in, bytes out, no protobuf between."""
        return grpc.method_handlers_generic_handler(
            "flplatform.v1.Blobs",
            {
                "Upload": grpc.stream_unary_rpc_method_handler(self.upload),
                "Download": grpc.unary_stream_rpc_method_handler(self.download),
            },
        )

    def _start(self, function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        return asyncio.wrap_future(self._workers.submit(function, *args))

    async def upload(self, stream: AsyncIterator[bytes], _context: Any) -> bytes:
        """Receive one blob; answer that it is whole, or from where to go on."""
        header = _parse(pb.UploadHeader, await _next(stream))
        blob = _blob(header.blob)
        if not 0 < len(header.transfer_id) <= 300:
            raise InvalidArgumentError("must have 1 to 300 characters", field="transfer_id")
        manifest = self._admit(caller(), header.transfer_id, blob)
        async with self._slots.take(caller().identity.name):
            writer: BlobWriter = await self._start(
                self._blobs.receive, header.transfer_id, blob, manifest
            )
            if header.offset != writer.offset:
                await self._start(writer.suspend)
                return _reply(False, writer.offset)
            return await self._receive(stream, blob, writer)

    async def _receive(
        self, stream: AsyncIterator[bytes], blob: ModelRef, writer: BlobWriter
    ) -> bytes:
        received = writer.offset
        writing: Future[None] | None = None
        try:
            while received < blob.size:
                chunk = await _next(stream, optional=True)
                if writing is not None:
                    await asyncio.wrap_future(writing)
                    writing = None
                if chunk is None:
                    break
                received += len(chunk)
                writing = self._workers.submit(writer.write, chunk)
            if writing is not None:
                await asyncio.wrap_future(writing)
            commit = await _next(stream, optional=True)
            if commit is None:  # the sender died: what came can be resumed
                await self._start(writer.suspend)
                return _reply(False, received)
            if _blob(_parse(pb.UploadCommit, commit).blob) != blob:
                raise InvalidArgumentError("the commit names another blob", field="blob")
            await self._start(writer.commit)
        except BaseException as error:
            refused = isinstance(error, FLError) and not isinstance(error, DeadlineExceededError)
            finish = writer.discard if refused else writer.suspend
            # The writer belongs to one thread at a time: after the write in flight, not beside it.
            if writing is None or writing.done():
                self._workers.submit(finish)
            else:
                writing.add_done_callback(lambda _: finish())
            raise
        return _reply(True, blob.size)

    async def download(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        """Send one blob from an offset on."""
        wanted = _parse(pb.DownloadRequest, request)
        check_digest(wanted.digest)
        self._release(caller(), wanted.digest)
        path = self._blobs.path(wanted.digest)
        async with self._slots.take(caller().identity.name):
            handle: int = await self._start(os.open, path, os.O_RDONLY)
            ahead: Future[bytes] | None = None
            try:
                size = os.fstat(handle).st_size
                if wanted.offset > size:
                    raise InvalidArgumentError(
                        f"{wanted.offset} lies beyond the blob's {size} bytes", field="offset"
                    )
                offset = wanted.offset
                ahead = self._workers.submit(os.pread, handle, CHUNK_BYTES, offset)
                while offset < size:
                    chunk = await asyncio.wrap_future(ahead)
                    offset += len(chunk)
                    ahead = self._workers.submit(os.pread, handle, CHUNK_BYTES, offset)
                    yield chunk
            finally:
                if ahead is None or ahead.done():
                    os.close(handle)
                else:
                    ahead.add_done_callback(lambda _: os.close(handle))


def _reply(committed: bool, offset: int) -> bytes:
    return pb.UploadReply(committed=committed, offset=offset).SerializeToString()


async def _next(stream: AsyncIterator[bytes], optional: bool = False) -> bytes | None:
    try:
        async with asyncio.timeout(STALL_S):
            return await anext(stream)
    except StopAsyncIteration:
        if optional:
            return None
        raise InvalidArgumentError("the stream is empty", field="header") from None
    except TimeoutError:
        raise DeadlineExceededError(f"nothing came for {STALL_S:g} s", rule="stall") from None


def _parse(kind: Any, data: bytes | None) -> Any:
    try:
        return kind.FromString(data)
    except (DecodeError, TypeError):
        raise InvalidArgumentError(f"is not a {kind.DESCRIPTOR.name}", field="message") from None


def _blob(blob: pb.Blob) -> ModelRef:
    check_digest(blob.digest, "blob.digest")
    if not 0 < blob.size <= MAX_MODEL_BYTES:
        raise InvalidArgumentError(f"{blob.size} is not a size in bytes", field="blob.size")
    return ModelRef(blob.digest, blob.size)


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
    offset = -1
    following = 0
    while following > offset:
        offset = following
        try:
            reply = await _send_from(channel, path, blob, transfer_id, offset, token, progress)
        except aio.AioRpcError as error:
            raise from_rpc(error) from None
        if reply.committed:
            return
        following = reply.offset
        if following == offset:
            break
    raise UnavailableError(f"the upload stopped at byte {following} of {blob.size}")


async def _send_from(
    channel: aio.Channel,
    path: Path,
    blob: ModelRef,
    transfer_id: str,
    offset: int,
    token: str,
    progress: Callable[[int], None],
) -> pb.UploadReply:
    named = pb.Blob(digest=blob.digest, size=blob.size)
    header = pb.UploadHeader(transfer_id=transfer_id, blob=named, offset=offset)
    call: Any = channel.stream_unary(UPLOAD)(metadata=((TOKEN_KEY, token),))
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            await call.write(header.SerializeToString())
            while offset < blob.size:
                chunk = await asyncio.to_thread(os.pread, handle, CHUNK_BYTES, offset)
                if not chunk:
                    raise DataLossError(f"{path} ends at byte {offset} of {blob.size}")
                await call.write(chunk)
                offset += len(chunk)
                progress(offset)
            await call.write(pb.UploadCommit(blob=named).SerializeToString())
            await call.done_writing()
        except asyncio.InvalidStateError:
            pass  # the server has answered already: the reply says why
        return pb.UploadReply.FromString(await call)
    finally:
        call.cancel()
        os.close(handle)


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
    writer = await asyncio.to_thread(blobs.receive, f"download {blob.digest}", blob, None)
    request = pb.DownloadRequest(digest=blob.digest, offset=writer.offset)
    stream: Any = channel.unary_stream(DOWNLOAD)
    call = stream(request.SerializeToString(), metadata=((TOKEN_KEY, token),))
    received = writer.offset
    try:
        async for chunk in call:
            await asyncio.shield(asyncio.to_thread(writer.write, chunk))
            received += len(chunk)
            progress(received)
        if received != blob.size:
            raise UnavailableError(f"the download stopped at byte {received} of {blob.size}")
    except BaseException as error:
        await asyncio.shield(asyncio.to_thread(writer.suspend))
        if isinstance(error, aio.AioRpcError):
            raise from_rpc(error) from None
        raise
    finally:
        call.cancel()
    await asyncio.to_thread(writer.commit)
    return blobs.path(blob.digest)
