"""Blob streams: weights and job packages as raw chunks, resumable, complete only by commit.

A cancelled upload looks like a clean end of stream to the receiver, so nothing counts before the
commit message, and completeness is declared length and digest. All file I/O and hashing runs in
worker threads; the next chunks are on their way while the last ones are being written. Who moves
too little is cut off, in both directions (`rpc.pace`).
"""

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from flplatform.core.errors import (
    DataLossError,
    FLError,
    InvalidArgumentError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import MAX_MODEL_BYTES, Manifest, PartOf, check_digest
from flplatform.core.ports import BlobStore, BlobWriter
from flplatform.rpc.channel import CHUNK_BYTES, TOKEN_KEY
from flplatform.rpc.errors import from_rpc, has_error
from flplatform.rpc.interceptors import Caller, caller
from flplatform.rpc.pace import Pace, PaceLimits, Slots
from flplatform.rpc.v1 import federated_pb2 as pb

UPLOAD = "/flplatform.v1.Blobs/Upload"
DOWNLOAD = "/flplatform.v1.Blobs/Download"
OFFSET_KEY = "flp-offset"
"""Key of an upload's initial metadata: how many bytes the server has already."""

WAITING_CHUNKS = 4
"""Chunks of one upload that may wait for those before them to be written."""

WORKERS = ThreadPoolExecutor(4, thread_name_prefix="transfer")
"""Reads, writes and hashes for senders and fetchers."""

ANSWER_S = 900.0
"""A server may queue, check or sync for so long before it answers a sender or a fetcher."""

PEER = PaceLimits(min_bytes_s=0.0, window_s=60.0)
"""What a sender or fetcher expects of a server: anything at all within so long."""

BROKEN_WRITE = "Internal error from Core"
"""What grpc says of a write into a connection that has broken."""

BROKEN = asyncio.InvalidStateError, aio.InternalError, aio.AioRpcError
"""What grpc raises when something is written to a call whose connection breaks just then."""

T = TypeVar("T")

Admit = Callable[[Caller, str, ModelRef], Manifest | PartOf | None]
"""(caller, transfer id, blob) → the tensors it must hold, or None; raises to refuse."""

Committed = Callable[[Caller, str, ModelRef], Awaitable[None]]
"""(caller, transfer id, blob) → None once that is taken in; raises to refuse it after all."""

Release = Callable[[Caller, str], None]
"""(caller, digest) → None; raises to refuse a download."""


class BlobService:
    """Server side of both streams, on one port.

    Args:
        blobs: where blobs are.
        admit: decides about an upload.
        release: decides about a download.
        slots: bound the transfers at work.
        workers: threads for file I/O and digests.
        pace: what a caller owes to a stream.
        committed: told of each upload that is whole and, if it had to be, a model as admitted;
            the sender is answered after that.
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
        committed: Committed | None = None,
        refused: Callable[[Caller, str, FLError], None] = lambda *_: None,
        moved: Callable[[str, str, int], None] = lambda *_: None,
        pace: PaceLimits = PaceLimits(),  # noqa: B008 - frozen
    ) -> None:
        self._pace = pace
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
        pace = Pace(self._pace)
        header = _parse(pb.UploadHeader, await _next(stream, pace))
        blob = _blob(header.blob)
        if not 0 < len(header.transfer_id) <= 300:
            raise InvalidArgumentError("must have 1 to 300 characters", field="transfer_id")
        try:
            self._admit(caller(), header.transfer_id, blob)  # a refusal need not wait
            async with self._slots.take(caller().identity.name):
                manifest = self._admit(caller(), header.transfer_id, blob)
                writer: BlobWriter = await self._open(
                    lambda writer: writer.suspend(),
                    self._blobs.receive,
                    header.transfer_id,
                    blob,
                    manifest,
                )
                committed = await self._receive(stream, context, blob, writer, pace)
            if committed and self._committed is not None:
                await self._committed(caller(), header.transfer_id, blob)
        except FLError as error:
            self._refused(caller(), header.transfer_id, error)
            raise
        return pb.UploadReply(committed=committed).SerializeToString()

    async def _receive(
        self,
        stream: AsyncIterator[bytes],
        context: Any,
        blob: ModelRef,
        writer: BlobWriter,
        pace: Pace,
    ) -> bool:
        """Feed a writer from a stream; return whether the blob is whole."""
        received = writer.offset
        behind = _Behind(self._workers, writer)
        try:
            await context.send_initial_metadata(((OFFSET_KEY, str(received)),))
            while received < blob.size:
                chunk = await _next(stream, pace, optional=True)
                if chunk is None:
                    break
                received += len(chunk)
                pace.moved(len(chunk))
                self._moved("received_bytes", caller().identity.name, len(chunk))
                await behind.write(chunk)
            await behind.drain()
            commit = await _next(stream, pace, optional=True)
            if commit is not None and _blob(_parse(pb.UploadCommit, commit).blob) != blob:
                raise InvalidArgumentError("the commit names another blob", field="blob")
            # If the sender died there is no commit: what came can be resumed.
            whole = commit is not None
            await behind.finish(writer.commit if whole else writer.suspend)
        except BaseException as error:
            refused = isinstance(error, InvalidArgumentError)
            behind.give_up(writer.discard if refused else writer.suspend)
            raise
        return whole

    async def download(self, request: bytes, context: Any) -> None:
        """Send one blob from an offset on."""
        wanted = _parse(pb.DownloadRequest, request)
        check_digest(wanted.digest)
        self._release(caller(), wanted.digest)
        async with self._slots.take(caller().identity.name):
            looking = self._workers.submit(self._blobs.checked, wanted.digest)
            path = await asyncio.wrap_future(looking)
            handle = await self._open(os.close, os.open, path, os.O_RDONLY)
            ahead: Future[bytes] | None = None
            try:
                size = os.fstat(handle).st_size
                if wanted.offset > size:
                    raise InvalidArgumentError(
                        f"{wanted.offset} lies beyond the blob's {size} bytes", field="offset"
                    )
                offset = wanted.offset
                pace = Pace(self._pace)
                ahead = self._workers.submit(os.pread, handle, CHUNK_BYTES, offset)
                while offset < size:
                    chunk = await asyncio.wrap_future(ahead)
                    if not chunk:
                        raise DataLossError(f"{wanted.digest} ends at byte {offset} of {size}")
                    offset += len(chunk)
                    ahead = self._workers.submit(os.pread, handle, CHUNK_BYTES, offset)
                    await pace.wait(context.write(chunk))
                    pace.moved(len(chunk))
                    self._moved("sent_bytes", caller().identity.name, len(chunk))
            finally:
                if ahead is None or ahead.done():
                    os.close(handle)
                else:
                    ahead.add_done_callback(lambda _: os.close(handle))


class _Behind:
    """Writes what has come behind the stream's back, in order, without a thread hop per chunk.

    A writer belongs to one thread at a time: whatever is next is done after the work in flight,
    never beside it.
    """

    def __init__(self, workers: Executor, writer: BlobWriter) -> None:
        self._workers = workers
        self._writer = writer
        self._lock = threading.Lock()
        self._chunks: deque[bytes] = deque()
        self._writing = False
        self.work: Future[None] | None = None

    async def write(self, chunk: bytes) -> None:
        """Write a chunk soon; wait while too many are not written yet.

        Raises:
            InvalidArgumentError: the chunk is empty.
            FLError: an earlier chunk was refused.
        """
        if not chunk:
            raise InvalidArgumentError("is empty", field="chunk")
        if len(self._chunks) >= WAITING_CHUNKS:
            await self.drain()
        with self._lock:
            begin = not self._writing
            if begin and self.work is not None:
                self.work.result()
            self._chunks.append(chunk)
            self._writing = True
        if begin:
            self.work = self._workers.submit(self._write)

    async def drain(self) -> None:
        """Wait until everything is written."""
        if self.work is not None:
            await asyncio.wrap_future(self.work)

    async def finish(self, end: Callable[[], None]) -> None:
        """Let the writer end, and wait for it."""
        self.work = self._workers.submit(end)
        await self.drain()

    def give_up(self, end: Callable[[], None]) -> None:
        """Let the writer end as soon as nothing is at work on it; nobody waits for it."""
        if self.work is None or self.work.done():
            self._workers.submit(end)
        else:
            self.work.add_done_callback(lambda _: end())

    def _write(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._chunks:
                        self._writing = False
                        return
                    chunk = self._chunks.popleft()
                self._writer.write(chunk)
        except BaseException:
            with self._lock:
                self._writing = False
            raise


def _close_opened(close: Callable[[T], object], opening: "Future[T]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        close(opening.result())


async def _next(stream: AsyncIterator[bytes], pace: Pace, optional: bool = False) -> bytes | None:
    try:
        return await pace.wait(anext(stream))
    except StopAsyncIteration:
        if optional:
            return None
        raise InvalidArgumentError("the stream is empty", field="header") from None


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
            await asyncio.shield(asyncio.wait([asyncio.wrap_future(ahead)]))


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
    opening = WORKERS.submit(blobs.receive, f"download {blob.digest}", blob, None)
    behind: _Behind | None = None
    # From here on whatever is at work in a thread is waited for before the writer is let go.
    try:
        writer = await asyncio.shield(asyncio.wrap_future(opening))
        behind = _Behind(WORKERS, writer)
        received = writer.offset
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
        await behind.finish(writer.commit)
    except BaseException as error:
        await asyncio.shield(asyncio.ensure_future(_let_go(opening, behind)))
        if isinstance(error, aio.AioRpcError):
            raise from_rpc(error) from None
        raise
    return blobs.path(blob.digest)


async def _let_go(opening: "Future[BlobWriter]", behind: _Behind | None) -> None:
    """Suspend a writer once nothing is at work on it."""
    await asyncio.wait([asyncio.wrap_future(behind.work if behind and behind.work else opening)])
    if not opening.cancelled() and opening.exception() is None:
        await asyncio.wrap_future(WORKERS.submit(opening.result().suspend))
