"""Blob streams: weights and job packages as raw chunks, resumable, complete only by commit.

This is the server's side; `rpc.transfers` is the other one.

A cancelled upload looks like a clean end of stream to the receiver, so nothing counts before the
commit message, and completeness is declared length and digest. All file I/O and hashing runs in
worker threads; the next chunks are on their way while the last ones are being written. Who moves
too little is cut off, in both directions (`rpc.pace`).
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from flplatform.core.errors import DataLossError, FLError, InvalidArgumentError
from flplatform.core.messages import ModelRef
from flplatform.core.model import MAX_MODEL_BYTES, Manifest, PartOf, check_digest
from flplatform.core.ports import BlobStore, BlobWriter
from flplatform.rpc.behind import Behind
from flplatform.rpc.channel import CHUNK_BYTES
from flplatform.rpc.interceptors import Caller, caller
from flplatform.rpc.pace import Pace, PaceLimits, Slots
from flplatform.rpc.v1 import federated_pb2 as pb

UPLOAD = "/flplatform.v1.Blobs/Upload"
DOWNLOAD = "/flplatform.v1.Blobs/Download"
OFFSET_KEY = "flp-offset"
"""Key of an upload's initial metadata: how many bytes the server has already."""

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
        behind = Behind(self._workers, writer)
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
