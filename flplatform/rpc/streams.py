"""Blob streams: weights and job packages as raw chunks, resumable, complete only by commit.

A cancelled upload looks like a clean end of stream to the receiver, so nothing counts before the
commit message, and completeness is declared length and digest. All file I/O and hashing runs in
worker threads; the next chunk is on its way while the last one is being written.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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
from flplatform.rpc.errors import from_rpc, has_error
from flplatform.rpc.interceptors import Caller, caller
from flplatform.rpc.v1 import federated_pb2 as pb

UPLOAD = "/flplatform.v1.Blobs/Upload"
DOWNLOAD = "/flplatform.v1.Blobs/Download"
OFFSET_KEY = "flp-offset"
"""Key of an upload's initial metadata: how many bytes the server has already."""

STALL_S = 60.0
"""A stream that brings nothing for so long is ended; what came stays and can be resumed."""

BROKEN_WRITE = "Internal error from Core"
"""What grpc says of a write into a connection that has broken."""

T = TypeVar("T")

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

    @contextlib.asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        """Hold one slot of `name` and one of all."""
        mine = self._callers.setdefault(name, asyncio.Semaphore(self._per_caller))
        async with mine, self._all:
            yield


class BlobService:
    """Server side of both streams, on one port.

    Args:
        blobs: where blobs are.
        admit: decides about an upload.
        release: decides about a download.
        slots: bound the transfers at work.
        workers: threads for file I/O and digests.
        committed: told of each upload that is whole and, if it had to be, a model as admitted.
        refused: told of each upload that is refused: (caller, transfer id, error).
        moved: told of bytes: (`received_bytes` or `sent_bytes`, whose, how many).
    """

    def __init__(
        self,
        blobs: BlobStore,
        admit: Admit,
        release: Release,
        slots: Slots,
        workers: Executor,
        committed: Callable[[Caller, str, ModelRef], None] = lambda *_: None,
        refused: Callable[[Caller, str, FLError], None] = lambda *_: None,
        moved: Callable[[str, str, int], None] = lambda *_: None,
    ) -> None:
        self._moved = moved
        self._blobs = blobs
        self._admit = admit
        self._release = release
        self._slots = slots
        self._workers = workers
        self._committed = committed
        self._refused = refused

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to add to an aio server: bytes in, bytes out, no protobuf between."""
        return grpc.method_handlers_generic_handler(
            "flplatform.v1.Blobs",
            {
                "Upload": grpc.stream_unary_rpc_method_handler(self.upload),
                "Download": grpc.unary_stream_rpc_method_handler(self.download),
            },
        )

    async def _open(
        self, close: Callable[[T], object], function: Callable[..., T], *args: Any
    ) -> T:
        """Open something in a worker; if the caller is gone by then, close it again."""
        opening = self._workers.submit(function, *args)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(partial(_close_opened, close))
            raise

    async def upload(self, stream: AsyncIterator[bytes], context: Any) -> bytes:
        """Receive one blob; tell at once from where on, and at the end whether it is whole."""
        header = _parse(pb.UploadHeader, await _next(stream))
        blob = _blob(header.blob)
        if not 0 < len(header.transfer_id) <= 300:
            raise InvalidArgumentError("must have 1 to 300 characters", field="transfer_id")
        try:
            manifest = self._admit(caller(), header.transfer_id, blob)
            async with self._slots.take(caller().identity.name):
                writer: BlobWriter = await self._open(
                    lambda writer: writer.suspend(),
                    self._blobs.receive,
                    header.transfer_id,
                    blob,
                    manifest,
                )
                committed = await self._receive(stream, context, blob, writer)
        except FLError as error:
            self._refused(caller(), header.transfer_id, error)
            raise
        if committed:
            self._committed(caller(), header.transfer_id, blob)
        return pb.UploadReply(committed=committed).SerializeToString()

    async def _receive(
        self, stream: AsyncIterator[bytes], context: Any, blob: ModelRef, writer: BlobWriter
    ) -> bool:
        """Feed a writer from a stream; return whether the blob is whole."""
        received = writer.offset
        work: Future[None] | None = None
        try:
            await context.send_initial_metadata(((OFFSET_KEY, str(received)),))
            while received < blob.size:
                chunk = await _next(stream, optional=True)
                if work is not None:
                    await asyncio.wrap_future(work)
                if chunk is None:
                    break
                received += len(chunk)
                self._moved("received_bytes", caller().identity.name, len(chunk))
                work = self._workers.submit(writer.write, chunk)
            if work is not None:
                await asyncio.wrap_future(work)
            commit = await _next(stream, optional=True)
            if commit is not None and _blob(_parse(pb.UploadCommit, commit).blob) != blob:
                raise InvalidArgumentError("the commit names another blob", field="blob")
            # If the sender died there is no commit: what came can be resumed.
            whole = commit is not None
            work = self._workers.submit(writer.commit if whole else writer.suspend)
            await asyncio.wrap_future(work)
        except BaseException as error:
            refused = isinstance(error, InvalidArgumentError)
            finish = writer.discard if refused else writer.suspend
            # The writer belongs to one thread at a time: after the work in flight, not beside it.
            if work is None or work.done():
                self._workers.submit(finish)
            else:
                work.add_done_callback(lambda _: finish())
            raise
        return whole

    async def download(self, request: bytes, _context: Any) -> AsyncGenerator[bytes, None]:
        """Send one blob from an offset on."""
        wanted = _parse(pb.DownloadRequest, request)
        check_digest(wanted.digest)
        self._release(caller(), wanted.digest)
        path = self._blobs.path(wanted.digest)
        async with self._slots.take(caller().identity.name):
            handle = await self._open(os.close, os.open, path, os.O_RDONLY)
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
                    if not chunk:
                        raise DataLossError(f"{wanted.digest} ends at byte {offset} of {size}")
                    offset += len(chunk)
                    ahead = self._workers.submit(os.pread, handle, CHUNK_BYTES, offset)
                    self._moved("sent_bytes", caller().identity.name, len(chunk))
                    yield chunk
            finally:
                if ahead is None or ahead.done():
                    os.close(handle)
                else:
                    ahead.add_done_callback(lambda _: os.close(handle))


def _close_opened(close: Callable[[T], object], opening: "Future[T]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        close(opening.result())


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
    named = pb.Blob(digest=blob.digest, size=blob.size)
    call: Any = channel.stream_unary(UPLOAD)(metadata=((TOKEN_KEY, token),))
    answers: list[aio.AioRpcError] = []
    call.add_done_callback(lambda call: answers.append(_status_now(call)))
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(asyncio.InvalidStateError, aio.AioRpcError):  # the reply says why
            header = pb.UploadHeader(transfer_id=transfer_id, blob=named)
            await call.write(header.SerializeToString())
            told = dict(await call.initial_metadata() or ())
            if OFFSET_KEY in told:
                await _send_from(call, handle, _offset(told, blob.size), blob.size, progress)
                await call.write(pb.UploadCommit(blob=named).SerializeToString())
                await call.done_writing()
        reply = pb.UploadReply.FromString(await call)
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
    while offset < size:
        chunk = await asyncio.to_thread(os.pread, handle, CHUNK_BYTES, offset)
        if not chunk:
            raise DataLossError(f"the file ends at byte {offset} of {size}")
        await call.write(chunk)
        offset += len(chunk)
        progress(offset)


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
    opening = asyncio.ensure_future(
        asyncio.to_thread(blobs.receive, f"download {blob.digest}", blob, None)
    )
    # From here on whatever is at work in a thread is waited for before the writer is let go.
    work: asyncio.Future[Any] = opening
    try:
        writer = await asyncio.shield(opening)
        received = writer.offset
        request = pb.DownloadRequest(digest=blob.digest, offset=received)
        stream: Any = channel.unary_stream(DOWNLOAD)
        call = stream(request.SerializeToString(), metadata=((TOKEN_KEY, token),))
        try:
            async for chunk in call:
                work = asyncio.ensure_future(asyncio.to_thread(writer.write, chunk))
                await asyncio.shield(work)
                received += len(chunk)
                progress(received)
        finally:
            call.cancel()
        if received != blob.size:
            raise UnavailableError(f"the download stopped at byte {received} of {blob.size}")
        work = asyncio.ensure_future(asyncio.to_thread(writer.commit))
        await asyncio.shield(work)
    except BaseException as error:
        await asyncio.shield(asyncio.ensure_future(_suspend(opening, work)))
        if isinstance(error, aio.AioRpcError):
            raise from_rpc(error) from None
        raise
    return blobs.path(blob.digest)


async def _suspend(opening: "asyncio.Future[BlobWriter]", work: "asyncio.Future[Any]") -> None:
    """Let go of a writer once nothing is at work on it."""
    await asyncio.wait([opening, work])
    if not opening.cancelled() and opening.exception() is None:
        await asyncio.to_thread(opening.result().suspend)
