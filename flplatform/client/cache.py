"""What a site has received: fetched once, kept while it is needed, then while there is room."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

from flplatform.algorithms.codecs import PACKED
from flplatform.client.retrying import is_of_space
from flplatform.client.session import Session
from flplatform.client.wire import decode_model
from flplatform.core.errors import FLError, ModelFormatError, NotFoundError, ResourceExhaustedError
from flplatform.core.messages import ModelRef, Task
from flplatform.core.ports import BlobStore
from flplatform.files.counters import Counters
from flplatform.files.shortage import explaining_shortage
from flplatform.files.threads import in_thread
from flplatform.rpc.transfers import WORKERS, download_id, fetch_blob

log = logging.getLogger(__name__)

T = TypeVar("T")

RESTART_S = 600.0
"""So long a part stays that nobody asks for: after a restart the server asks for its run again."""


class CachedBlobs(BlobStore, Protocol):
    """The site's blobs: copies, all of which the server has, too."""

    def free_bytes(self) -> int:
        """Return how many bytes can be received now; negative if the reserve is in use."""

    def drop_parts(self, keep: Collection[str], unused_s: float) -> int:
        """Delete what transfers have left of blobs not in `keep`, unless it has grown lately."""


class BlobCache:
    """The blobs of a site, bounded by a limit and by the room on its disk: what nobody needs goes.

    Needed is what runs need, what the tasks last offered are about, and what was fetched, until
    the asyncio task that had it fetched is over. Nothing of that ever goes.

    Args:
        session: where blobs come from.
        blobs: where they lie.
        limit_bytes: most that all of them may take, as long as not all are needed.
        needed: returns the digests that the runs in hand need.
        counters: told the bytes that are received.
    """

    def __init__(
        self,
        session: Session,
        blobs: CachedBlobs,
        limit_bytes: int,
        needed: Callable[[], set[str]],
        counters: Counters,
    ) -> None:
        self._session = session
        self._blobs = blobs
        self._limit_bytes = limit_bytes
        self._needed = needed
        self._counters = counters
        self._offered: set[str] = set()
        self._held: dict[asyncio.Task[object], set[str]] = {}
        self._decoded: dict[str, str] = {}
        """Digest of a downloaded wire blob → that of the model made from it."""
        self._decoding = 0
        self._fetching: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._receiving: set[str] = set()
        self._parts: set[str] = set()
        """Digests of which a part may lie in the store: a download has begun and not ended well."""
        self._trimming = asyncio.Lock()
        """Held while blobs are deleted: nothing else becomes needed meanwhile."""

    async def fetch(self, blob: ModelRef) -> Path:
        """Return the file of a blob, downloaded, once however many ask, if it is not here.

        Raises:
            FLError: it cannot be had, or not now.
        """
        await self._hold(blob.digest)
        lock = self._fetching.setdefault(blob.digest, asyncio.Lock())
        async with lock:
            return await self.with_room(blob.size, lambda: self._download(blob))

    async def model_of(self, task: Task) -> Path | None:
        """Return the file of a task's model, if it has one, as it crosses the wire and is decoded.

        Raises:
            FLError: it cannot be had, or not now; see also `decode_model`.
        """
        model, wire = task.model, task.wire
        if model is None or wire is None:
            return await self.fetch(model) if model else None
        await self._hold(model.digest)
        if task.wire_codec == PACKED and await in_thread(self._blobs.has_whole, model.digest):
            return self._blobs.path(model.digest)
        known = self._decoded.get(wire.digest)
        if known is None or not await in_thread(self._blobs.has_whole, known):
            file = await self.fetch(wire)
            known = await self.with_room(model.size, lambda: self._decode(task, wire, file))
        await self._hold(known)
        return self._blobs.path(known)

    async def with_room(self, count: int, step: Callable[[], Awaitable[T]]) -> T:
        """Do what takes space on the disk; if it is refused for want of it, make room, once.

        Args:
            count: bytes that it may take.
            step: is done anew from its beginning.

        Raises:
            FLError: as `step` does.
        """
        try:
            with explaining_shortage():
                return await step()
        except ResourceExhaustedError as error:
            if not is_of_space(error):
                raise
            # Where the disk itself refused, a quota perhaps, what is free does not tell.
            least = 0 if error.rule == "reserve_bytes" else count
            if not await self._trim(
                self._limit_bytes, lambda: max(count - self._blobs.free_bytes(), least)
            ):
                raise
        with explaining_shortage():
            return await step()

    async def offer(self, tasks: Collection[Task], *, short_of_space: bool = False) -> None:
        """Keep what these tasks are about instead of those before; make room for what is missing.

        Args:
            tasks: all that are open.
            short_of_space: a run waits for space on the disk: all goes that nobody needs.
        """
        self._offered = {ref.digest for task in tasks for ref in (task.model, task.wire) if ref}
        self._decoded = {k: made for k, made in self._decoded.items() if k in self._offered}

        def short_bytes() -> int:
            missing = {ref.digest: ref.size for task in tasks for ref in self._missing(task)}
            return sum(missing.values()) - self._blobs.free_bytes()

        await self._trim(0 if short_of_space else self._limit_bytes, short_bytes)

    def _missing(self, task: Task) -> list[ModelRef]:
        """Return the blobs that are to be received or made for a task, and are not yet."""
        made = self._decoded.get(task.wire.digest) if task.wire else None
        if task.wire_codec == PACKED and task.model:
            made = made or task.model.digest
        if made and _has(self._blobs, made):
            return []
        wanted = [ref for ref in (task.model, task.wire) if ref]
        begun = self._receiving  # the store has set their room aside
        return [r for r in wanted if r.digest not in begun and not _has(self._blobs, r.digest)]

    async def _download(self, blob: ModelRef) -> Path:
        missing = 0 if await in_thread(self._blobs.has_whole, blob.digest) else blob.size
        self._receiving.add(blob.digest)
        self._parts.add(blob.digest)
        try:
            path = await self._session.transfer(
                lambda channel, token: fetch_blob(channel, blob, self._blobs, token=token)
            )
        finally:
            self._receiving.discard(blob.digest)
        self._parts.discard(blob.digest)
        self._counters.add("received_bytes", amount=missing)
        return path

    async def _decode(self, task: Task, wire: ModelRef, file: Path) -> str:
        async with self._trimming:
            self._decoding += 1
        try:
            made = await in_thread(decode_model, self._blobs, task, file)
            self._decoded[wire.digest] = made
            return made
        finally:
            self._decoding -= 1

    async def _hold(self, digest: str) -> None:
        async with self._trimming:
            asker = asyncio.current_task()
            assert asker is not None
            if asker not in self._held:
                self._held[asker] = set()
                asker.add_done_callback(self._over)
            self._held[asker].add(digest)

    def _over(self, asker: asyncio.Task[object]) -> None:
        """Forget what an asker has begun to download, if nobody else wants it."""
        begun = self._held.pop(asker) & self._parts
        for digest in begun - self._kept():
            self._parts.discard(digest)
            try:
                WORKERS.submit(self._forget, digest)
            except ResourceExhaustedError as error:
                log.warning("a part of %s stays for now: %s", digest, error)

    def _forget(self, digest: str) -> None:
        try:
            self._blobs.forget(download_id(digest))
        except OSError as error:
            log.warning("a part of %s stays for now: %s", digest, error)

    def _kept(self) -> set[str]:
        """Return the digests that are needed."""
        keep = self._offered | set(self._decoded.values()) | self._needed()
        return keep.union(*self._held.values())

    async def _trim(self, limit_bytes: int, short_bytes: Callable[[], int]) -> list[str]:
        """Delete what nobody needs and there is no room for; return the digests of the deleted."""
        async with self._trimming:
            if self._decoding:  # what is being made has no name yet: the next time it has
                return []
            keep = self._kept()
            try:
                return await in_thread(lambda: trim(self._blobs, keep, limit_bytes, short_bytes()))
            except (FLError, OSError) as error:  # tasks need not wait for it
                log.warning("received blobs are not looked through now: %s", error)
                return []


def trim(
    blobs: CachedBlobs, keep: Collection[str], limit_bytes: int, short_bytes: int = 0
) -> list[str]:
    """Delete the oldest blobs until the rest fits; return the digests of the deleted.

    What is left of downloads that were given up goes too: at once where space is short, else when
    it is old. A file that is mapped or linked elsewhere lives on there. What cannot be deleted
    stays.

    Args:
        blobs: the site's blobs.
        keep: digests that are needed; they count, but stay.
        limit_bytes: most that all blobs together may take.
        short_bytes: so much space is to become free, whatever all take together.
    """
    at_once = short_bytes > 0 or limit_bytes == 0
    short_bytes -= blobs.drop_parts(keep, 0 if at_once else RESTART_S)
    found = []
    for digest in blobs.digests():
        try:
            status = blobs.path(digest).stat()
        except (NotFoundError, OSError):
            continue
        found.append((status.st_mtime_ns, digest, status.st_size))
    excess = max(sum(size for _, _, size in found) - limit_bytes, short_bytes)
    deleted = []
    for _, digest, size in sorted(found):
        if excess <= 0:
            break
        if digest in keep:
            continue
        try:
            blobs.delete(digest)
        except OSError as error:
            log.warning("a blob that nobody needs stays: %s", error)
            continue
        deleted.append(digest)
        excess -= size
    return deleted


def _has(blobs: BlobStore, digest: str) -> bool:
    try:
        return blobs.has(digest)
    except ModelFormatError:  # the task will fail for it, by itself
        return True
