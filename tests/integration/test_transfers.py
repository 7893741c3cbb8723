"""Blobs over mTLS through a connection that is cut again and again, and past peers that lie.

`FLP_TRANSFER_MB` sets the size of what is transferred.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from flplatform.core.errors import (
    FLError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from flplatform.rpc.channel import LOOKAHEAD_BYTES, open_channel
from flplatform.rpc.interceptors import Rule
from flplatform.rpc.pace import Slots
from flplatform.rpc.streams import DOWNLOAD, OFFSET_KEY, UPLOAD, BlobService
from flplatform.rpc.transfers import fetch_blob, send_blob
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.store import part_file
from flplatform.store.blobs import FileBlobStore
from tests.support.federation import Federation, provision
from tests.unit.rpc import loopback
from tests.unit.rpc.loopback import TOKEN, Port

SIZE = int(os.environ.get("FLP_TRANSFER_MB", "200")) * 1_000_000
CUTS = 20
SOCKETS_BYTES = 8 << 20
"""What two connections' socket buffers and the proxy between them may hold."""

WASTE_BYTES = LOOKAHEAD_BYTES + SOCKETS_BYTES
"""Most that one cut may cost: what flow control lets a sender run ahead, and what sockets hold."""

RULES = {UPLOAD: Rule(), DOWNLOAD: Rule()}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("transfers"))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "DEADLINE_S", 100.0)


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(1).bytes(SIZE)


def ref(data: bytes) -> ModelRef:
    return ModelRef(digest_of(data), len(data))


class Proxy:
    """A TCP proxy that counts, and aborts both sides after so many bytes of a direction.

    Attributes:
        cuts: bytes of the counted direction until each cut to come; then no more cuts.
        crossed: bytes sent towards the server, and back.
        made: cuts so far.
    """

    def __init__(self, target: int, direction: str, cuts: list[int]) -> None:
        self._target = target
        self._direction = direction
        self.cuts = cuts
        self.crossed = {"up": 0, "down": 0}
        self.made = 0
        self.port = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 18)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self._target, limit=1 << 18)
        except OSError:
            writer.transport.abort()
            return
        left = [self.cuts.pop(0)] if self.cuts else [1 << 60]

        async def pump(
            source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: str
        ) -> None:
            with suppress(OSError):
                while part := await source.read(1 << 16):
                    self.crossed[direction] += len(part)
                    sink.write(part)
                    await sink.drain()
                    if direction == self._direction:
                        left[0] -= len(part)
                        if left[0] <= 0:
                            self.made += 1
                            break
            for each in (writer, outer):
                each.transport.abort()

        await asyncio.gather(pump(reader, outer, "up"), pump(inner, writer, "down"))


@asynccontextmanager
async def serving(
    federation: Federation, store: FileBlobStore, number: int = 0
) -> AsyncIterator[Port]:
    with ThreadPoolExecutor(4) as workers:
        service = BlobService(store, lambda *_: None, lambda *_: None, Slots(4, 4), workers)

        def add(server: aio.Server) -> None:
            server.add_generic_rpc_handlers((service.handler(),))

        async with loopback.serving(federation, {}, RULES, add, number=number) as port:
            yield port


def channel_to(federation: Federation, port: int) -> aio.Channel:
    kit = federation.open("site-1")
    return open_channel(
        f"localhost:{port}",
        key_pem=kit.key_pem(),
        chain_pem=kit.chain,
        trusted_pem=kit.trust.tls_roots("server"),
    )


async def persist(step: Callable[[], Any]) -> None:
    """Try again until it is done, as a site does."""
    while True:
        try:
            return await step()
        except UnavailableError:
            await asyncio.sleep(0.02)
        except FLError as error:  # the broken connection's transfer has not ended yet
            if "right now" not in str(error):
                raise
            await asyncio.sleep(0.02)


def cut_points() -> list[int]:
    """Return after how many bytes each connection is cut: uneven, half of the blob in all."""
    shares = np.random.default_rng(2).uniform(0.2, 1.8, CUTS)
    return [int(share * SIZE / 2 / CUTS) for share in shares]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_twenty_cuts_cost_only_what_was_in_flight(
    federation: Federation, tmp_path: Path, data: bytes, direction: str
) -> None:
    blob = ref(data)
    server, site = FileBlobStore(tmp_path / "server"), FileBlobStore(tmp_path / "site")
    path = tmp_path / "file"
    path.write_bytes(data)
    if direction == "down":
        server.create(lambda new: new.write_bytes(data) and None)

    async def scene() -> Proxy:
        async with (
            serving(federation, server) as port,
            Proxy(port.number, direction, cut_points()).serving() as proxy,
            channel_to(federation, proxy.port) as channel,
        ):
            if direction == "up":
                await persist(lambda: send_blob(channel, path, blob, "t", token=TOKEN))
            else:
                await persist(lambda: fetch_blob(channel, blob, site, token=TOKEN))
            return proxy

    proxy = asyncio.run(scene())
    got = (server if direction == "up" else site).path(blob.digest)
    assert got.read_bytes() == data
    assert proxy.made == CUTS
    wasted = proxy.crossed[direction] - SIZE
    print(f"{direction}: {wasted / CUTS / 1e6:.2f} MB wasted per cut")
    assert wasted <= CUTS * WASTE_BYTES
    assert proxy.crossed[direction] < 2 * SIZE, "it did not begin anew again and again"


class Peer:
    """One end of a transfer as a process; ended with the block."""

    def __init__(self, role: str, federation: Federation, *arguments: object) -> None:
        command = [sys.executable, "-m", "tests.integration.transfer_peer", role]
        command += [str(federation.folder), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def number(self) -> int:
        """Return the next number that it prints; 0 at its end."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline() or 0)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.mark.parametrize("killed", ["server", "sender"])
def test_a_killed_process_costs_only_what_was_in_flight(
    federation: Federation, tmp_path: Path, data: bytes, killed: str
) -> None:
    blob = ref(data)
    path = tmp_path / "file"
    path.write_bytes(data)
    store = tmp_path / "store"
    arguments = (path, blob.digest, blob.size)

    def parts() -> int:
        return sum(part.stat().st_size for part in (store / "incoming").iterdir())

    with Peer("serve", federation, store, 0) as server:
        port = server.number()
        with Peer("send", federation, port, *arguments) as sender:
            reached = 0
            while reached < SIZE // 2:
                reached = sender.number()
            if killed == "sender":
                sender.kill()
                with Peer("send", federation, port, *arguments) as successor:
                    first = successor.number()
                    while successor.number():
                        pass
                    assert successor.process.wait(60) == 0
            else:
                server.kill()
                had = parts()
                with Peer("serve", federation, store, port) as again:
                    assert again.number() == port
                    first = reached
                    while number := sender.number():
                        first = min(first, number)  # where it went on
                    assert sender.process.wait(60) == 0
                assert had >= reached - WASTE_BYTES
    assert first >= reached - WASTE_BYTES, "what had come was kept"
    assert FileBlobStore(store).path(blob.digest).read_bytes() == data


# ---- lies ---------------------------------------------------------------------------------------


@pytest.fixture
def set_aside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much disk space was set aside, at each time."""
    counts: list[int] = []

    def noted(_handle: int, _offset: int, count: int) -> bool:
        counts.append(count)
        return True

    monkeypatch.setattr(part_file, "set_aside", noted)
    return counts


SMALL = bytes(range(256)) * 8
HUGE = 1 << 50


@pytest.mark.parametrize(
    ("declared", "sent", "error"),
    [
        (HUGE, [SMALL], ResourceExhaustedError),  # beyond what is free
        (-1, [SMALL], InvalidArgumentError),
        (len(SMALL), [SMALL, b"x"], InvalidArgumentError),  # too long
        (len(SMALL), [SMALL[:-1]], UnavailableError),  # too short: it may go on
        (len(SMALL), [SMALL[:-1] + b"?"], InvalidArgumentError),  # other bytes
        (len(SMALL), [b""], InvalidArgumentError),  # nothing, again and again
        (len(SMALL), [bytes(5 << 20)], ResourceExhaustedError),  # more than a message may hold
        (len(SMALL) + 1, [SMALL, b"x"], InvalidArgumentError),  # another size than the digest's
    ],
)
def test_a_lying_server_takes_neither_memory_nor_disk_of_a_site(
    federation: Federation,
    tmp_path: Path,
    set_aside: list[int],
    declared: int,
    sent: list[bytes],
    error: type[FLError],
) -> None:
    asked: list[bytes] = []

    async def download(request: bytes, context: Any) -> None:
        asked.append(request)
        for part in sent:
            await context.write(part)

    async def scene() -> None:
        site = FileBlobStore(tmp_path / "site")
        handlers = {"Download": grpc.unary_stream_rpc_method_handler(download)}

        def add(server: aio.Server) -> None:
            name = "flplatform.v1.Blobs"
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

        async with (
            loopback.serving(federation, {}, RULES, add) as port,
            channel_to(federation, port.number) as channel,
        ):
            blob = ModelRef(digest_of(SMALL), declared)
            with pytest.raises(error):
                await fetch_blob(channel, blob, site, token=TOKEN)
        assert site.digests() == []
        assert sum(set_aside) <= len(SMALL) + 1
        if declared in (HUGE, -1):
            assert not asked, "it is refused before anything is asked for"
            assert not list((tmp_path / "site" / "incoming").iterdir())

    asyncio.run(scene())


@pytest.mark.parametrize("offset", ["-1", str(len(SMALL) + 1), "0x1", "", "9" * 5000, "1.0"])
def test_a_server_that_lies_about_an_offset_gets_nothing(
    federation: Federation, tmp_path: Path, offset: str
) -> None:
    got: list[bytes] = []

    async def upload(stream: AsyncIterator[bytes], context: Any) -> bytes:
        got.append(await anext(stream))
        await context.send_initial_metadata(((OFFSET_KEY, offset),))
        async for message in stream:
            got.append(message)
        return b""

    async def scene() -> None:
        path = tmp_path / "file"
        path.write_bytes(SMALL)
        handlers = {"Upload": grpc.stream_unary_rpc_method_handler(upload)}

        def add(server: aio.Server) -> None:
            name = "flplatform.v1.Blobs"
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

        async with (
            loopback.serving(federation, {}, RULES, add) as port,
            channel_to(federation, port.number) as channel,
        ):
            with pytest.raises(UnavailableError):
                await send_blob(channel, path, ref(SMALL), "t", token=TOKEN)
        assert len(got) == 1, "the header, and no byte of the file"

    asyncio.run(scene())


def test_a_declaration_alone_takes_no_disk(
    federation: Federation, tmp_path: Path, set_aside: list[int]
) -> None:
    """A site declares a large blob, sends a little of it and leaves, again and again."""
    size = 10 << 30
    store = FileBlobStore(tmp_path / "server")

    async def scene() -> None:
        async with (
            serving(federation, store) as port,
            channel_to(federation, port.number) as channel,
        ):
            for number in range(4):
                blob = ModelRef(digest_of(bytes([number])), size)
                call: Any = channel.stream_unary(UPLOAD)(metadata=loopback.metadata())
                header = pb.UploadHeader(
                    transfer_id="t", blob=pb.Blob(digest=blob.digest, size=blob.size)
                )
                await call.write(header.SerializeToString())
                await call.initial_metadata()
                assert not set_aside, "nothing came: nothing is set aside"
                await call.write(SMALL)
                while not set_aside:
                    await asyncio.sleep(0.001)
                call.cancel()
                while store._active:
                    await asyncio.sleep(0.001)
                assert sum(set_aside) <= part_file.AHEAD_BYTES
                set_aside.clear()

    asyncio.run(scene())
    parts = list((tmp_path / "server" / "incoming").iterdir())
    assert len(parts) == 1, "another digest under the same id takes the place of the one before"
    assert parts[0].stat().st_size == len(SMALL)
