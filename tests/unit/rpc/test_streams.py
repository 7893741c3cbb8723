import asyncio
import errno
import gc
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from grpc import aio
from grpc.aio import _call

from flplatform.core.errors import (
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import Array, Manifest
from flplatform.core.ports import BlobWriter
from flplatform.files.digest import digest_of
from flplatform.rpc import transfers
from flplatform.rpc.channel import CHUNK_BYTES, LOOKAHEAD_BYTES
from flplatform.rpc.errors import from_rpc
from flplatform.rpc.interceptors import MAX_TRANSFERS, Caller, Rule
from flplatform.rpc.pace import PaceLimits, Slots
from flplatform.rpc.streams import DOWNLOAD, OFFSET_KEY, UPLOAD, BlobService
from flplatform.rpc.transfers import fetch_blob, send_blob
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.store import part_file
from flplatform.store.blobs import FileBlobStore
from tests.support.federation import Federation
from tests.support.models import model_bytes, small_model
from tests.unit.rpc.loopback import TOKEN, Port, file_of, metadata, serving

RULES = {UPLOAD: Rule(), DOWNLOAD: Rule()}
OTHER = "blake3:" + "0" * 64
Chunks = list[bytes]


class CountingStore(FileBlobStore):
    """Notes the transfers it begins and every chunk that reaches a writer."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.empty()

    def empty(self) -> None:
        """Begin anew: making a store's folders takes longer than most tests here."""
        for path in (*self._incoming.iterdir(), *map(self.path, self.digests())):
            path.unlink()
        self.begun: list[tuple[str, int]] = []
        self.written: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.opening = threading.Event()

    def receive(self, transfer_id: str, blob: ModelRef, manifest: Any = None) -> Any:
        self.opening.set()
        assert self.gate.wait(60)
        writer = super().receive(transfer_id, blob, manifest)
        self.begun.append((transfer_id, writer.offset))
        write = writer.write

        def counting(chunk: bytes) -> None:
            write(chunk)
            self.written.append(len(chunk))

        writer.write = counting
        return writer

    @property
    def active(self) -> list[str]:
        return sorted(self._active)

    def parts(self) -> list[int]:
        return [path.stat().st_size for path in self._incoming.iterdir()]


@dataclass
class Scene:
    """A server's blob service, and a site's connection to it.

    Attributes:
        manifest: what uploads must hold.
        refuse: raised by the next decision about a transfer.
        committed: transfer and digest of each upload that was whole.
        broken_off: each transfer that was over without being whole.
        moved: direction, site and bytes of each chunk.
    """

    store: CountingStore
    local: CountingStore
    folder: Path
    port: Port
    channel: aio.Channel
    federation: Federation
    slots: Slots
    service: BlobService
    manifest: Manifest | None = None
    refuse: FLError | None = None
    committed: list[tuple[str, str]] = field(default_factory=list)
    broken_off: list[str] = field(default_factory=list)
    moved: list[tuple[str, str, int]] = field(default_factory=list)

    def admit(self, _caller: Caller, _transfer_id: str, _blob: ModelRef) -> Manifest | None:
        if self.refuse:
            raise self.refuse
        return self.manifest

    def release(self, _caller: Caller, _digest: str) -> None:
        if self.refuse:
            raise self.refuse

    async def note(self, _caller: Caller, transfer_id: str, blob: ModelRef) -> None:
        self.committed.append((transfer_id, blob.digest))

    async def send(self, data: bytes, transfer_id: str = "t", **more: Any) -> ModelRef:
        blob = more.pop("blob", None) or ref(data)
        path = file_of(self.folder, data)
        await send_blob(self.channel, path, blob, transfer_id, token=TOKEN, **more)
        return blob

    async def fetch(self, blob: ModelRef, **more: Any) -> bytes:
        path = await fetch_blob(self.channel, blob, self.local, token=TOKEN, **more)
        return path.read_bytes()

    def upload(self) -> Any:
        return self.channel.stream_unary(UPLOAD)(metadata=metadata())

    async def speak(self, *messages: bytes, end: bool = True) -> pb.UploadReply:
        """Upload exactly these messages."""
        call = self.upload()
        try:
            for message in messages:
                await call.write(message)
            if end:
                await call.done_writing()
        except (asyncio.InvalidStateError, aio.AioRpcError):
            pass
        try:
            return pb.UploadReply.FromString(await call)
        except aio.AioRpcError as error:
            raise from_rpc(error) from None

    async def settled(self) -> None:
        """Wait until no transfer is at work at the server."""
        while self.store.active:
            await asyncio.sleep(0.001)

    def take_time(self) -> None:
        """Hold the transfers that begin from now on to the product's own limits of pace."""
        self.service._pace = PaceLimits()

    async def idle(self) -> None:
        """Wait until all slots are free."""
        while self.slots._all._value < 4:
            await asyncio.sleep(0.001)


Stores = tuple[CountingStore, CountingStore]


@pytest.fixture(scope="module")
def made_stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    folder = tmp_path_factory.mktemp("stores")
    return CountingStore(folder / "server"), CountingStore(folder / "site")


@pytest.fixture
def stores(made_stores: Stores) -> Stores:
    for store in made_stores:
        store.empty()
    return made_stores


@asynccontextmanager
async def streaming(
    federation: Federation,
    folder: Path,
    stores: Stores,
    per_caller: int = 2,
    pace: PaceLimits = PaceLimits(),  # noqa: B008 - frozen
) -> AsyncIterator[Scene]:
    slots = Slots(per_caller, 4)
    scene = Scene.__new__(Scene)
    store, local = stores
    with ThreadPoolExecutor(4) as workers:
        service = BlobService(
            store,
            lambda *args: scene.admit(*args),
            lambda *args: scene.release(*args),
            slots,
            workers,
            lambda *args: scene.note(*args),
            moved=lambda *args: scene.moved.append(args),
            pace=pace,
            broken_off=lambda transfer_id: scene.broken_off.append(transfer_id),
        )

        def add(server: aio.Server) -> None:
            server.add_generic_rpc_handlers((service.handler(),))

        async with (
            serving(federation, {}, RULES, add) as port,
            port.channel(federation.open("site-1")) as channel,
        ):
            scene.__init__(store, local, folder, port, channel, federation, slots, service)
            yield scene
            await scene.settled()


@pytest.fixture
def play(federation: Federation, tmp_path: Path, stores: Stores) -> Callable[..., None]:
    async def whole(scene: Callable[[Scene], Awaitable[None]], **more: Any) -> None:
        async with streaming(federation, tmp_path, stores, **more) as it:
            await scene(it)

    return lambda scene, **more: asyncio.run(whole(scene, **more))


def ref(data: bytes) -> ModelRef:
    return ModelRef(digest_of(data), len(data))


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def header(blob: ModelRef, transfer_id: str = "t") -> bytes:
    named = pb.Blob(digest=blob.digest, size=blob.size)
    return pb.UploadHeader(transfer_id=transfer_id, blob=named).SerializeToString()


def commit(blob: ModelRef) -> bytes:
    named = pb.Blob(digest=blob.digest, size=blob.size)
    return pb.UploadCommit(blob=named).SerializeToString()


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


# ---- whole transfers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [1, 1000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5_000_001]
)
def test_there_and_back(play: Any, size: int) -> None:
    data = random_bytes(size)

    async def scene(it: Scene) -> None:
        sent: list[int] = []
        got: list[int] = []
        blob = await it.send(data, progress=sent.append)
        assert it.store.path(blob.digest).read_bytes() == data
        assert it.committed == [("t", blob.digest)]
        assert await it.fetch(blob, progress=got.append) == data
        assert sent[-1] == got[-1] == size
        assert sent == sorted(sent)
        assert it.store.parts() == []

    play(scene)


def test_bytes_are_counted_by_site_and_direction(play: Any) -> None:
    data = random_bytes(CHUNK_BYTES + 10)

    async def it(scene: Scene) -> None:
        blob = await scene.send(data)
        scene.local.delete(blob.digest)
        await scene.fetch(blob)
        for direction in ("received_bytes", "sent_bytes"):
            mine = [each[2] for each in scene.moved if each[:2] == (direction, "site-1")]
            assert sum(mine) == len(data)

    play(it)


@pytest.mark.parametrize("size", [1, 7, 999, 65_537, 3_000_000])
def test_chunks_may_be_of_any_size(play: Any, size: int) -> None:
    data = random_bytes(3 * size + 1 if size < 1_000_000 else size + 1)

    async def scene(it: Scene) -> None:
        blob = ref(data)
        reply = await it.speak(header(blob), *chunks(data, size), commit(blob))
        assert reply.committed
        assert it.store.path(blob.digest).read_bytes() == data

    play(scene)


def test_a_model_is_admitted_as_its_manifest_says(play: Any, tmp_path: Path) -> None:
    data = model_bytes(small_model(), tmp_path)

    async def scene(it: Scene) -> None:
        it.manifest = Manifest.of(small_model())
        for size in (1, 5, len(data)):
            other = model_bytes(small_model(size), tmp_path)
            blob = ref(other)
            assert (await it.speak(header(blob), *chunks(other, size), commit(blob))).committed

    play(scene)
    assert len(data) < 1000


def test_what_is_here_is_not_sent_again(play: Any) -> None:
    data = random_bytes(3_000_000)

    async def scene(it: Scene) -> None:
        await it.send(data)
        it.store.written.clear()
        await it.send(data, "another")
        assert it.store.written == []
        assert it.committed == [("t", ref(data).digest), ("another", ref(data).digest)]
        got: list[int] = []
        await it.fetch(ref(data))
        await it.fetch(ref(data), progress=got.append)
        assert got == []

    play(scene)


def test_what_is_here_must_fit_all_the_same(play: Any, tmp_path: Path) -> None:
    """A digest that the server has for another reason is not an update."""
    model = model_bytes(small_model(), tmp_path)
    code = random_bytes(len(model))

    async def scene(it: Scene) -> None:
        await it.send(code, "the package")
        it.manifest = Manifest.of(small_model())
        it.committed.clear()
        with pytest.raises(ModelFormatError):
            await it.send(code, "1/1/train/site-1")
        assert it.committed == []
        assert it.store.has(ref(code).digest)

    play(scene)


def test_what_is_here_in_another_size_is_refused(play: Any) -> None:
    data = random_bytes(1000)

    async def scene(it: Scene) -> None:
        await it.send(data)
        with pytest.raises(InvalidArgumentError, match="has 1000 bytes"):
            await it.speak(header(ModelRef(ref(data).digest, 999)))

    play(scene)


# ---- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 1, 12_345, CHUNK_BYTES, 2_500_000, 2_999_999, 3_000_000])
def test_an_upload_goes_on_where_it_was_cut(play: Any, sent: int) -> None:
    data = random_bytes(3_000_000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        call = it.upload()
        await call.write(header(blob))
        for chunk in chunks(data[:sent], 500_000):
            await call.write(chunk)
        while sum(it.store.written) < sent or not it.store.active:
            await asyncio.sleep(0.001)
        call.cancel()
        await it.settled()
        assert it.store.parts() == [sent]
        it.store.written.clear()
        progress: list[int] = []
        await it.send(data, progress=progress.append)
        assert sum(it.store.written) == 3_000_000 - sent, "only the rest is sent"
        assert (progress[0] > sent) if progress else (sent == 3_000_000)
        assert it.store.path(blob.digest).read_bytes() == data
        assert it.store.begun[-1] == ("t", sent)

    play(scene)


def test_the_server_says_where_to_go_on_before_anything_is_sent(play: Any) -> None:
    data = random_bytes(2000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        for had, sent in ((0, data[:700]), (700, data[700:900]), (900, b"")):
            call = it.upload()
            await call.write(header(blob))
            assert dict(await call.initial_metadata())[OFFSET_KEY] == str(had)
            if sent:
                await call.write(sent)
            await call.done_writing()
            assert not pb.UploadReply.FromString(await call).committed
        assert (await it.speak(header(blob), data[900:], commit(blob))).committed

    play(scene)


def test_a_stream_that_ends_without_commit_counts_for_nothing(play: Any) -> None:
    """A killed sender looks like a clean end of stream: also after the last byte."""
    data = random_bytes(2000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        assert not (await it.speak(header(blob), data)).committed
        assert it.store.parts() == [2000]
        assert not it.store.has(blob.digest)
        assert it.committed == []
        assert (await it.speak(header(blob), commit(blob))).committed
        assert it.store.has(blob.digest)

    play(scene)


@pytest.mark.parametrize("offset", ["-1", "11", "x", "", "1" * 30])
def test_a_server_that_has_more_than_there_is_sends_nobody_astray(
    play: Any, monkeypatch: pytest.MonkeyPatch, offset: str
) -> None:
    class Lying:
        def __init__(self, context: Any) -> None:
            self._context = context

        async def send_initial_metadata(self, _metadata: Any) -> None:
            await self._context.send_initial_metadata(((OFFSET_KEY, offset),))

    upload = BlobService.upload

    async def lying(self: BlobService, stream: Any, context: Any) -> bytes:
        return await upload(self, stream, Lying(context))

    monkeypatch.setattr(BlobService, "upload", lying)

    async def scene(it: Scene) -> None:
        with pytest.raises(UnavailableError):
            await it.send(random_bytes(10))
        await it.settled()

    play(scene)


def test_another_blob_under_the_same_id_starts_anew(play: Any) -> None:
    old, new = random_bytes(2000), random_bytes(1999)

    async def scene(it: Scene) -> None:
        await it.speak(header(ref(old)), old[:1000])
        await it.send(new)
        assert it.store.has(ref(new).digest)
        assert it.store.parts() == []

    play(scene)


@pytest.mark.parametrize("cut", [0, 1, CHUNK_BYTES + 5, 2_999_999])
def test_a_download_goes_on_where_it_was_cut(play: Any, cut: int) -> None:
    data = random_bytes(3_000_000)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        writer = it.local.receive(f"download {blob.digest}", blob)
        if cut:
            writer.write(data[:cut])
        writer.suspend()
        got: list[int] = []
        assert await it.fetch(blob, progress=got.append) == data
        assert got[0] > cut
        assert got[0] <= cut + CHUNK_BYTES

    play(scene)


def test_a_cancelled_download_leaves_a_part_to_go_on_from(play: Any) -> None:
    data = random_bytes(4_000_000)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        begun = asyncio.Event()
        fetching = asyncio.create_task(it.fetch(blob, progress=lambda _: begun.set()))
        await begun.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        got: list[int] = []
        assert await it.fetch(blob, progress=got.append) == data
        assert got[0] > CHUNK_BYTES, "the first chunk is not fetched again"

    play(scene)


def test_a_download_cancelled_while_it_begins_can_begin_again(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking a part again takes long; what it opens must not stay open for ever."""
    data = random_bytes(1000)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        slow = CountingStore(it.folder / "slow")
        slow.gate.clear()
        fetching = asyncio.create_task(fetch_blob(it.channel, blob, slow, token=TOKEN))
        while not slow.opening.is_set():
            await asyncio.sleep(0.001)
        fetching.cancel()
        await asyncio.sleep(0)
        slow.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        while slow.active:
            await asyncio.sleep(0.001)
        await fetch_blob(it.channel, blob, slow, token=TOKEN)
        assert slow.has(blob.digest)

    play(scene)


def test_a_download_that_is_cancelled_waits_for_the_write_in_flight(play: Any) -> None:
    """A writer belongs to one thread at a time."""
    data = random_bytes(1000)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        inside, go_on = threading.Event(), threading.Event()
        steps: list[str] = []

        class Slow(FileBlobStore):
            def receive(self, *args: Any) -> BlobWriter:
                writer = super().receive(*args)
                write, suspend = writer.write, writer.suspend

                def slowly(chunk: bytes) -> None:
                    inside.set()
                    assert go_on.wait(60)
                    write(chunk)
                    steps.append("written")

                def note() -> None:
                    steps.append("suspended")
                    suspend()

                writer.write, writer.suspend = slowly, note
                return writer

        slow = Slow(it.folder / "slow")
        fetching = asyncio.create_task(fetch_blob(it.channel, blob, slow, token=TOKEN))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        fetching.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert steps == []
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        assert steps == ["written", "suspended"]

    play(scene)


def test_an_upload_cancelled_while_it_begins_can_begin_again(play: Any) -> None:
    data = random_bytes(1000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        it.store.gate.clear()
        call = it.upload()
        await call.write(header(blob))
        while not it.store.opening.is_set():
            await asyncio.sleep(0.001)
        call.cancel()
        await it.idle()  # the server has noticed
        it.store.gate.set()
        while not it.store.begun:
            await asyncio.sleep(0.001)
        await it.settled()
        await it.send(data)
        assert it.store.has(blob.digest)

    play(scene)


def test_an_upload_whose_sender_leaves_while_it_is_made_durable_is_taken_in(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would know of it, and free it."""
    data = random_bytes(1000)
    blob = ref(data)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*_: object, **__: object) -> None:
        begun.set()
        assert go_on.wait(60)

    async def scene(it: Scene) -> None:
        monkeypatch.setattr(part_file, "sync", slowly)
        call = it.upload()
        for message in (header(blob), data, commit(blob)):
            await call.write(message)
        await asyncio.to_thread(begun.wait, 60)
        call.cancel()
        await it.idle()  # the server has noticed
        assert it.committed == []
        go_on.set()
        while not it.committed:
            await asyncio.sleep(0.001)
        assert it.committed == [("t", blob.digest)]
        assert it.broken_off == []

    play(scene)


@pytest.mark.parametrize("how", ["cut while it begins", "cut", "refused", "damaged", "full"])
def test_an_upload_that_breaks_off_is_told_when_it_is_over(
    play: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    data = random_bytes(1000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        match how:
            case "cut while it begins":
                it.store.gate.clear()
                call = it.upload()
                await call.write(header(blob))
                await asyncio.to_thread(it.store.opening.wait, 60)
                call.cancel()
                await it.idle()  # the server has noticed
                assert it.broken_off == []
                it.store.gate.set()
            case "cut":
                assert not (await it.speak(header(blob), data[:100])).committed
            case "refused":
                with pytest.raises(InvalidArgumentError):
                    await it.speak(header(blob), data, data)
            case "damaged":
                with pytest.raises(InvalidArgumentError):
                    await it.speak(header(blob), bytes(1000), commit(blob))
            case "full":
                monkeypatch.setattr(part_file, "sync", _no_space)
                with pytest.raises(ResourceExhaustedError):
                    await it.speak(header(blob), data, commit(blob))
        while not it.broken_off:
            await asyncio.sleep(0.001)
        assert it.broken_off == ["t"]
        assert it.committed == []
        assert it.store.active == []

    play(scene)


def _no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 5_000_000])
@pytest.mark.parametrize(
    "error",
    [
        FailedPreconditionError("task is not open", rule="task_closed"),
        PermissionDeniedError("not yours", rule="own_tasks_only"),
        InvalidArgumentError("is 5 bytes; a model has 7", field="blob.size"),
    ],
    ids=lambda error: error.code,
)
def test_an_upload_refused_early_says_why(play: Any, error: FLError, size: int) -> None:
    """Also while the sender is still writing: a refusal that got lost would be tried again."""
    data = random_bytes(size)

    async def scene(it: Scene) -> None:
        it.refuse = error
        for _ in range(10):
            with pytest.raises(type(error)) as caught:
                await it.send(data)
            assert str(caught.value) == str(error)
        assert it.store.begun == []

    play(scene)


def test_a_dead_token_is_noticed_by_the_sender_and_the_fetcher(play: Any) -> None:
    data = random_bytes(3_000_000)

    async def scene(it: Scene) -> None:
        blob = await it.send(random_bytes(10))
        it.port.tokens.clear()
        for _ in range(5):
            with pytest.raises(UnauthenticatedError):
                await it.send(data)
        with pytest.raises(UnauthenticatedError):
            await it.fetch(blob)
        assert not any(it.local._active.values())

    play(scene)


def test_a_wrong_header_is_refused_before_more_is_written(play: Any, tmp_path: Path) -> None:
    wanted = {"w": np.zeros(400_000, "f4")}
    other = {"v": np.zeros(400_000, "f4")}
    data = model_bytes(other, tmp_path)

    async def scene(it: Scene) -> None:
        it.manifest = Manifest.of(wanted)
        assert it.manifest.file_bytes() == len(data)
        for _ in range(5):
            with pytest.raises(ModelFormatError, match="other tensors"):
                await it.send(data)
        assert it.store.written == []
        assert it.store.parts() == []
        assert it.committed == []

    play(scene)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_wherever_they_are(
    play: Any, tmp_path: Path, value: float
) -> None:
    arrays = {"w": np.zeros(600_000, "f4")}

    async def scene(it: Scene) -> None:
        it.manifest = Manifest.of(arrays)
        for place in (0, 300_000, 599_999):
            bad: dict[str, Array] = {"w": arrays["w"].copy()}
            bad["w"][place] = value
            with pytest.raises(ModelFormatError, match="NaN or infinity"):
                await it.send(model_bytes(bad, tmp_path))
            assert it.store.parts() == []
        await it.send(model_bytes(arrays, tmp_path))

    play(scene)


def _lies(data: bytes) -> dict[str, tuple[list[bytes], type[FLError]]]:
    blob = ref(data)
    longer = ModelRef(blob.digest, blob.size + 1)
    shorter = ModelRef(blob.digest, blob.size - 1)
    another = ModelRef(OTHER, blob.size)
    odd = pb.UploadHeader(transfer_id="t", blob=pb.Blob(digest="sha1:00", size=5))
    nameless = pb.UploadHeader(blob=pb.Blob(digest=blob.digest, size=5))
    empty = pb.UploadHeader(transfer_id="t", blob=pb.Blob(digest=blob.digest))
    huge = pb.UploadHeader(transfer_id="t", blob=pb.Blob(digest=blob.digest, size=1 << 62))
    return {
        "nothing at all": ([], InvalidArgumentError),
        "no header": ([b"\xff\xff\xff"], InvalidArgumentError),
        "an empty header": ([b""], InvalidArgumentError),
        "no digest": ([odd.SerializeToString()], ModelFormatError),
        "no transfer id": ([nameless.SerializeToString()], InvalidArgumentError),
        "a long transfer id": ([header(blob, "t" * 301)], InvalidArgumentError),
        "no size": ([empty.SerializeToString()], InvalidArgumentError),
        "a huge size": ([huge.SerializeToString()], InvalidArgumentError),
        "too many bytes": ([header(shorter), data, commit(shorter)], InvalidArgumentError),
        "wrong bytes": ([header(blob), data[::-1], commit(blob)], InvalidArgumentError),
        "a lying digest": ([header(another), data, commit(another)], InvalidArgumentError),
        "commit of another": ([header(blob), data, commit(another)], InvalidArgumentError),
        "commit of another size": ([header(blob), data, commit(longer)], InvalidArgumentError),
        "no commit": ([header(blob), data, b"\xff\xff"], InvalidArgumentError),
    }


@pytest.mark.parametrize("lie", _lies(b"x" * 1000))
def test_lies_are_refused_and_leave_nothing(play: Any, lie: str) -> None:
    data = random_bytes(1000)
    messages, error = _lies(data)[lie]

    async def scene(it: Scene) -> None:
        with pytest.raises(error):
            await it.speak(*messages)
        await it.settled()
        assert it.committed == []
        assert it.store.digests() == []
        assert it.store.parts() == []
        await it.send(data)

    play(scene)


def test_a_commit_that_comes_early_is_no_commit(play: Any) -> None:
    data = random_bytes(1000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        reply = await it.speak(header(blob), data[:500], commit(blob))
        assert not reply.committed
        with pytest.raises(UnavailableError):  # what it left is not the blob
            await it.send(data)
        await it.send(data)
        assert it.store.path(blob.digest).read_bytes() == data

    play(scene)


def test_a_file_that_is_shorter_than_it_was(play: Any) -> None:
    data = random_bytes(1000)

    async def scene(it: Scene) -> None:
        with pytest.raises(DataLossError, match="ends at byte 999 of 1000"):
            await it.send(data[:999], blob=ref(data))
        await it.settled()

    play(scene)


def test_a_file_that_cannot_be_read_is_told_once(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not again, as of an exception that nobody has looked at."""

    def pread(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def scene(it: Scene) -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        with monkeypatch.context() as patch:
            patch.setattr(transfers.os, "pread", pread)
            with pytest.raises(OSError, match="Input/output"):
                await it.send(random_bytes(1000))
        await it.settled()
        gc.collect()
        assert told == []

    play(scene)


@pytest.mark.parametrize(
    ("request_of", "error"),
    [
        (lambda blob: pb.DownloadRequest(digest=OTHER), NotFoundError),
        (lambda blob: pb.DownloadRequest(digest="x"), ModelFormatError),
        (lambda blob: pb.DownloadRequest(digest="../../etc/passwd"), ModelFormatError),
        (
            lambda blob: pb.DownloadRequest(digest=blob.digest, offset=blob.size + 1),
            InvalidArgumentError,
        ),
        (
            lambda blob: pb.DownloadRequest(digest=blob.digest, offset=(1 << 64) - 1),
            InvalidArgumentError,
        ),
    ],
)
def test_odd_downloads(play: Any, request_of: Any, error: type[FLError]) -> None:
    async def scene(it: Scene) -> None:
        blob = await it.send(random_bytes(1000))
        request = request_of(blob).SerializeToString()
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in it.channel.unary_stream(DOWNLOAD)(request, metadata=metadata()):
                pass
        assert type(from_rpc(caught.value)) is error
        await it.idle()

    play(scene)


def test_a_download_is_released_first(play: Any) -> None:
    async def scene(it: Scene) -> None:
        blob = await it.send(random_bytes(1000))
        it.refuse = NotFoundError("none of yours")
        with pytest.raises(NotFoundError, match="none of yours"):
            await it.fetch(blob)
        it.refuse = None
        assert await it.fetch(blob)

    play(scene)


def test_a_server_that_sends_other_bytes_is_found_out(play: Any) -> None:
    async def scene(it: Scene) -> None:
        blob = await it.send(random_bytes(1000))
        path = it.store.path(blob.digest)
        path.chmod(0o600)
        path.write_bytes(random_bytes(999) + b"?")
        with pytest.raises(InvalidArgumentError, match="declared was"):
            await it.fetch(blob)
        path.write_bytes(random_bytes(500))
        with pytest.raises(UnavailableError, match="stopped at byte 500 of 1000"):
            await it.fetch(blob)
        assert not it.local.has(blob.digest)

    play(scene)


def test_a_server_that_sends_too_much_is_found_out(play: Any) -> None:
    async def scene(it: Scene) -> None:
        blob = await it.send(random_bytes(1000))
        with pytest.raises(InvalidArgumentError, match="more than the declared"):
            await it.fetch(ModelRef(blob.digest, 10))

    play(scene)


# ---- several at once --------------------------------------------------------------------------


def test_one_transfer_is_received_once_at_a_time(play: Any) -> None:
    data = random_bytes(2000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        first = it.upload()
        await first.write(header(blob))
        while not it.store.active:
            await asyncio.sleep(0.001)
        with pytest.raises(UnavailableError, match="being received right now"):
            await it.send(data)
        await first.write(data)
        await first.write(commit(blob))
        assert pb.UploadReply.FromString(await first).committed

    play(scene)


def test_a_caller_has_so_many_slots_and_the_next_one_waits(play: Any) -> None:
    data = [random_bytes(size) for size in (1000, 1001, 1002)]

    async def scene(it: Scene) -> None:
        held = []
        for number in range(2):
            call = it.upload()
            await call.write(header(ref(data[number]), f"t{number}"))
            held.append(call)
        while len(it.store.active) < 2:
            await asyncio.sleep(0.001)
        third = asyncio.create_task(it.send(data[2], "t2"))
        token = "token of site-2"
        kit = it.federation.open("site-2")
        it.port.tokens[token] = kit.identity.fingerprint
        async with it.port.channel(kit) as other:  # its slots are its own
            path = it.folder / "other"
            path.write_bytes(random_bytes(50))
            await send_blob(other, path, ref(random_bytes(50)), "o", token=token)
        assert not third.done()
        assert it.store.active == ["t0", "t1"]
        held[0].cancel()
        await third
        held[1].cancel()
        assert {name for name, _ in it.committed} == {"o", "t2"}

    play(scene)


def test_a_reader_that_leaves_gives_its_slot_back(play: Any) -> None:
    data = random_bytes(5_000_000)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        request = pb.DownloadRequest(digest=blob.digest).SerializeToString()
        for _ in range(3):
            call = it.channel.unary_stream(DOWNLOAD)(request, metadata=metadata())
            async for _chunk in call:
                break
            call.cancel()
        await it.idle()
        assert await it.fetch(blob) == data

    play(scene, per_caller=1)  # gRPC opens some at its first use, and keeps them
    before = len(os.listdir("/proc/self/fd"))
    play(scene, per_caller=1)
    until = time.monotonic() + 60  # gRPC's own threads close its sockets
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < until:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_sender_that_falls_silent_is_ended_and_may_resume(play: Any) -> None:
    data = random_bytes(1000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        call = it.upload()
        await call.write(header(blob))
        await call.write(data[:400])
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        error = from_rpc(caught.value)
        assert (type(error), error.rule) == (DeadlineExceededError, "progress")
        await it.settled()
        assert it.store.parts() == [400]
        it.take_time()
        await it.send(data)
        assert it.store.begun[-1] == ("t", 400)

    play(scene, pace=PaceLimits(window_s=1.0))


def test_a_sender_that_trickles_is_ended_and_may_resume(play: Any) -> None:
    data = random_bytes(10_000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        call = it.upload()
        await call.write(header(blob))
        sent = 0
        with suppress(asyncio.InvalidStateError, aio.AioRpcError):
            while True:  # never silent for long
                await call.write(data[sent : sent + 1])
                sent += 1
                await asyncio.sleep(0.005)
        # A write that fails covers the reason; the server's own count has it.
        with suppress(aio.AioRpcError):
            await call
        outcomes = [what for _, what, _ in it.port.took]
        assert outcomes == [f"Upload {DeadlineExceededError.code}"]
        await it.idle()
        (part,) = it.store.parts()
        assert 1 < part <= sent
        it.take_time()
        await it.send(data)
        assert it.store.begun[-1] == ("t", part)

    play(scene, pace=PaceLimits(min_bytes_s=20_000_000, window_s=1.0))


def test_a_reader_that_never_reads_is_ended_and_gives_its_slot_back(play: Any) -> None:
    data = bytes(4 * LOOKAHEAD_BYTES)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        it.moved.clear()
        request = pb.DownloadRequest(digest=blob.digest).SerializeToString()
        call = it.channel.unary_stream(DOWNLOAD)(request, metadata=metadata())
        while not it.moved:
            await asyncio.sleep(0.001)
        await it.idle()
        assert sum(count for _, _, count in it.moved) < len(data)
        with pytest.raises(aio.AioRpcError) as caught:  # what is under way comes, then the reason
            async for _ in call:
                pass
        error = from_rpc(caught.value)
        assert (type(error), error.rule) == (DeadlineExceededError, "progress")
        it.take_time()
        assert await it.fetch(blob) == data

    play(scene, per_caller=1, pace=PaceLimits(window_s=1.0))


def test_who_waits_too_long_for_a_slot_is_told(play: Any) -> None:
    data = [random_bytes(size) for size in (1000, 1001)]

    async def scene(it: Scene) -> None:
        it.slots._wait_s = 0.05
        call = it.upload()
        await call.write(header(ref(data[0]), "first"))
        while not it.store.active:
            await asyncio.sleep(0.001)
        with pytest.raises(ResourceExhaustedError, match="no transfer slot of site-1") as caught:
            await it.send(data[1])
        assert caught.value.rule == "transfer_slots"
        assert it.store.active == ["first"], "who waits holds no writer"
        call.cancel()
        await it.idle()
        await it.send(data[1])

    play(scene, per_caller=1)


def test_what_is_not_admitted_any_more_when_its_turn_comes_is_refused(play: Any) -> None:
    data = [random_bytes(size) for size in (1000, 1001)]

    async def scene(it: Scene) -> None:
        call = it.upload()
        await call.write(header(ref(data[0]), "first"))
        while not it.store.active:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(it.send(data[1], "second"))
        while not it.slots._callers["site-1"]._waiters:
            await asyncio.sleep(0.001)
        it.refuse = FailedPreconditionError("the task is not open")
        call.cancel()
        with pytest.raises(FailedPreconditionError, match="not open"):
            await second
        assert [name for name, _ in it.store.begun] == ["first"]

    play(scene, per_caller=1)


def test_an_empty_chunk_is_refused(play: Any) -> None:
    data = random_bytes(1000)

    async def scene(it: Scene) -> None:
        with pytest.raises(InvalidArgumentError, match="empty"):
            await it.speak(header(ref(data)), data[:10], b"", data[10:])

    play(scene)


def test_a_connection_that_breaks_just_before_the_end_of_an_upload_is_no_defect(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC tells it by an error of its own if that comes while the end of the stream is written."""

    async def scene(it: Scene) -> None:
        async def break_off(_call: Any) -> None:
            for connection in psutil.Process().net_connections("tcp"):
                if connection.raddr and connection.raddr.port == it.port.number:
                    with socket.socket(fileno=os.dup(connection.fd)) as mine:
                        mine.shutdown(socket.SHUT_RDWR)
            raise aio.InternalError("Failed execute_batch")

        monkeypatch.setattr(_call.StreamUnaryCall, "done_writing", break_off)
        with pytest.raises(UnavailableError):
            await it.send(random_bytes(1000))

    play(scene)


def test_a_server_that_falls_silent_is_left(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(1000)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        with monkeypatch.context() as patch:
            patch.setattr(transfers, "ANSWER_S", 0.1)
            it.store.gate.clear()
            with pytest.raises(UnavailableError, match="not answered within"):
                await it.send(random_bytes(50))
            it.store.gate.set()
            await it.idle()
            async with it.slots._all, it.slots._all, it.slots._all, it.slots._all:
                with pytest.raises(UnavailableError, match="not answered within"):
                    await it.fetch(blob)
        assert await it.fetch(blob) == data

    play(scene)


def test_revoking_stops_a_download_under_way(play: Any) -> None:
    data = bytes(4 * LOOKAHEAD_BYTES)

    async def scene(it: Scene) -> None:
        blob = await it.send(data)
        it.moved.clear()
        request = pb.DownloadRequest(digest=blob.digest).SerializeToString()
        call = it.channel.unary_stream(DOWNLOAD)(request, metadata=metadata())
        got = 0

        async def read() -> None:
            nonlocal got
            async for chunk in call:
                got += len(chunk)

        while not it.moved:
            await asyncio.sleep(0.001)
        it.port.now = it.federation.open("site-1").identity.not_after.replace(year=2999)
        with pytest.raises(aio.AioRpcError) as caught:
            await read()
        assert type(from_rpc(caught.value)) is UnauthenticatedError
        assert got < len(data)

    play(scene)


def test_transfers_in_flight_are_limited_apart_from_calls(play: Any) -> None:
    async def scene(it: Scene) -> None:
        held = []
        for number in range(MAX_TRANSFERS):
            call = it.upload()
            await call.write(header(ref(bytes([number, 1])), f"t{number}"))
            held.append(call)
        while it.port.calls() < MAX_TRANSFERS:
            await asyncio.sleep(0.001)
        with pytest.raises(ResourceExhaustedError, match="8 transfers in flight") as caught:
            await it.send(random_bytes(100), "one more")
        assert caught.value.rule == "max_transfers"
        for call in held:
            call.cancel()
        while it.port.calls():
            await asyncio.sleep(0.001)
        await it.send(random_bytes(100), "one more")

    play(scene)


def test_revoking_stops_an_upload_under_way(play: Any) -> None:
    data = random_bytes(1000)
    blob = ref(data)

    async def scene(it: Scene) -> None:
        call = it.upload()
        await call.write(header(blob))
        while not it.store.active:
            await asyncio.sleep(0.001)
        it.port.now = it.federation.open("site-1").identity.not_after.replace(year=2999)
        await call.write(data)
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert type(from_rpc(caught.value)) is UnauthenticatedError
        await it.settled()
        assert not it.store.has(blob.digest)

    play(scene)
