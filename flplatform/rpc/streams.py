"""Blob streams: weights and job packages as raw chunks, resumable, complete only by commit.

This is the server's side; `rpc.transfers` is the other one.

A cancelled upload looks like a clean end of stream to the receiver, so nothing counts before the
commit message, and completeness is declared length and digest. All file I/O and hashing runs in
worker threads; the next chunks are on their way while the last ones are being written. Who moves
too little is cut off, in both directions (`rpc.pace`).
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from flplatform.core.errors import DataLossError, FLError, InvalidArgumentError
from flplatform.core.messages import ModelRef
from flplatform.core.model import MAX_MODEL_BYTES, Manifest, PartOf, check_digest
from flplatform.core.ports import BlobStore
from flplatform.rpc.behind import Behind
from flplatform.rpc.channel import CHUNK_BYTES
from flplatform.rpc.interceptors import Caller, caller
from flplatform.rpc.pace import Pace, PaceLimits, Slots
from flplatform.rpc.v1 import federated_pb2 as pb

UPLOAD = "/flplatform.v1.Blobs/Upload"
DOWNLOAD = "/flplatform.v1.Blobs/Download"
OFFSET_KEY = "flp-offset"
"""Key of an upload's initial metadata: how many bytes the server has already."""

log = logging.getLogger(__name__)

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
        broken_off: told of each upload that is over without being whole: (transfer id).

    That an upload is over is told when nothing is at work on it any more, also if its caller left.
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
        broken_off: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._broken_off = broken_off
        self._endings: set[asyncio.Task[None]] = set()
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

    async def upload(self, stream: AsyncIterator[bytes], context: Any) -> bytes:
        """Receive one blob; tell at once from where on, and at the end whether it is whole."""
        pace = Pace(self._pace)
        header = _parse(pb.UploadHeader, await _next(stream, pace))
        blob = _blob(header.blob)
        if not 0 < len(header.transfer_id) <= 300:
            raise InvalidArgumentError("must have 1 to 300 characters", field="transfer_id")
        who, transfer_id = caller(), header.transfer_id
        try:
            self._admit(who, transfer_id, blob)  # a refusal need not wait
            async with self._slots.take(who.identity.name):
                manifest = self._admit(who, transfer_id, blob)
                opening = self._workers.submit(self._blobs.receive, transfer_id, blob, manifest)
                behind = Behind(self._workers, opening)
                whole = False
                try:
                    whole = await self._receive(stream, context, blob, behind, pace)
                    behind.finish(whole=whole)
                except BaseException as error:
                    behind.give_up(discard=isinstance(error, InvalidArgumentError))
                    raise
                finally:
                    ending = self._carry_through(self._end(who, transfer_id, blob, behind, whole))
                await asyncio.shield(behind.drain())
            await asyncio.shield(ending)
        except FLError as error:
            self._refused(who, transfer_id, error)
            raise
        return pb.UploadReply(committed=whole).SerializeToString()

    async def _receive(
        self,
        stream: AsyncIterator[bytes],
        context: Any,
        blob: ModelRef,
        behind: Behind,
        pace: Pace,
    ) -> bool:
        """Feed a writer from a stream; return whether the sender says that the blob is whole."""
        received = (await behind.opened()).offset
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
        return commit is not None

    async def _end(
        self, who: Caller, transfer_id: str, blob: ModelRef, behind: Behind, whole: bool
    ) -> None:
        """Tell what has become of an upload, once nothing is at work on it any more."""
        await behind.ended()
        if not whole or behind.work.cancelled() or behind.work.exception():
            self._broken_off(transfer_id)
        elif self._committed is not None:
            await self._committed(who, transfer_id, blob)

    def _carry_through(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Begin work that goes on also if its caller leaves; then a refusal is nobody's news."""

        def done(task: "asyncio.Task[None]") -> None:
            self._endings.discard(task)
            if not task.cancelled() and not isinstance(error := task.exception(), FLError | None):
                log.error("the end of an upload failed", exc_info=error)

        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(done)
        return task

    async def _opened(self, path: Path) -> int:
        """Open a file; if the caller is gone by then, close it again."""
        opening = self._workers.submit(os.open, path, os.O_RDONLY)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise

    async def download(self, request: bytes, context: Any) -> None:
        """Send one blob from an offset on."""
        wanted = _parse(pb.DownloadRequest, request)
        check_digest(wanted.digest)
        self._release(caller(), wanted.digest)
        async with self._slots.take(caller().identity.name):
            looking = self._workers.submit(self._blobs.checked, wanted.digest)
            path = await asyncio.wrap_future(looking)
            handle = await self._opened(path)
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


def _close_opened(opening: "Future[int]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


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
