"""Connections that break at any instant of a transfer, thousands of times."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flplatform.core.errors import FLError
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from flplatform.rpc.transfers import fetch_blob, send_blob
from flplatform.store.blobs import FileBlobStore
from tests.faults.proxy import Proxy
from tests.integration.test_transfers import channel_to
from tests.support.federation import provision
from tests.unit.rpc.loopback import TOKEN

pytestmark = [pytest.mark.faults_long, pytest.mark.timeout(240)]

SECONDS = 60.0
SIZES = 1_000, 5_000, 300_000, 3_000_000
CUT_S = 0.05
"""Mean time between two cuts of all connections."""

HANGS_S = 60.0
"""A transfer whose connection is cut so often has an end long before."""


class Transfers:
    """Uploads and downloads beside each other, over connections that are cut.

    Attributes:
        ends: how many were whole, and how many broke.
    """

    def __init__(self, folder: Path, channel: Any, seed: int) -> None:
        self.folder = folder
        self.ends = {"whole": 0, "broken": 0}
        self._random = random.Random(seed)
        self._channel = channel
        self._over = time.monotonic() + SECONDS

    async def _until_over(self, step: Callable[[], Awaitable[object]]) -> None:
        while time.monotonic() < self._over:
            async with asyncio.timeout(HANGS_S):
                try:
                    await step()
                    self.ends["whole"] += 1
                except FLError:
                    self.ends["broken"] += 1
                    await asyncio.sleep(self._random.uniform(0, CUT_S))

    async def up(self, number: int) -> None:
        """Upload one file after the other."""
        path = self.folder / f"sent-{number}"

        async def step() -> None:
            data = np.random.default_rng(self._random.getrandbits(32)).bytes(self._size())
            path.write_bytes(data)
            blob = ModelRef(digest_of(data), len(data))
            await send_blob(self._channel, path, blob, f"t{number}", token=TOKEN)

        await self._until_over(step)

    async def down(self, number: int, blobs: dict[int, ModelRef]) -> None:
        """Download one of `blobs` after the other."""
        store = FileBlobStore(self.folder / f"fetched-{number}")

        async def step() -> None:
            blob = blobs[self._size()]
            await fetch_blob(self._channel, blob, store, token=TOKEN)
            store.delete(blob.digest)

        await self._until_over(step)

    async def cut(self, proxy: Proxy) -> int:
        """Cut all connections again and again; return how often."""
        cuts = 0
        while time.monotonic() < self._over:
            await asyncio.sleep(self._random.expovariate(1 / CUT_S))
            cuts += await asyncio.to_thread(proxy.cut) > 0
        return cuts

    def _size(self) -> int:
        return self._random.choice(SIZES)


def test_a_transfer_that_breaks_anywhere_ends_and_says_so(tmp_path, tally):
    """No error of the library's own gets out, and nothing waits for a connection that is gone."""
    federation = provision(tmp_path)
    folder = tmp_path / "store"
    store = FileBlobStore(folder)
    blobs = {
        size: store.create(lambda new, size=size: new.write_bytes(bytes(size)) and None)
        for size in SIZES
    }
    seed = random.randrange(1 << 24)
    command = [sys.executable, "-m", "tests.integration.transfer_peer", "serve"]
    command += [str(federation.folder), str(folder), "0"]

    async def play(proxy: Proxy) -> tuple[Transfers, int]:
        async with channel_to(federation, proxy.port) as channel:
            transfers = Transfers(tmp_path, channel, seed)
            works = [transfers.up(number) for number in range(3)]
            works += [transfers.down(number, blobs) for number in range(3)]
            *_, cuts = await asyncio.gather(*works, transfers.cut(proxy))
            return transfers, cuts

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            with Proxy(int(peer.stdout.readline())) as proxy:
                transfers, cuts = asyncio.run(play(proxy))
        finally:
            peer.kill()
    tally.fault("connections cut in a transfer", cuts)
    assert min(transfers.ends.values()) > 50, (seed, transfers.ends)
