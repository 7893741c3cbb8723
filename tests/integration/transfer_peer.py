"""One end of a transfer in a process of its own, to be killed: `serve` or `send`."""

import asyncio
import sys
from pathlib import Path
from typing import Any, cast

from flplatform.core.messages import ModelRef
from flplatform.rpc.transfers import send_blob
from flplatform.store.blobs import FileBlobStore
from tests.integration.test_transfers import channel_to, persist, serving
from tests.support.federation import Federation
from tests.unit.rpc import loopback
from tests.unit.rpc.loopback import TOKEN


async def serve(federation: Federation, store: str, port: str) -> None:
    """Serve a store until killed; prints the port."""
    loopback.DEADLINE_S = 100.0
    async with serving(federation, FileBlobStore(Path(store)), int(port)) as served:
        print(served.number, flush=True)
        await asyncio.Event().wait()


async def send(federation: Federation, port: str, path: str, digest: str, size: str) -> None:
    """Send a file until it is through; prints each offset that it has reached."""
    blob = ModelRef(digest, int(size))
    async with channel_to(federation, int(port)) as channel:
        await persist(
            lambda: send_blob(
                channel,
                Path(path),
                blob,
                "t",
                token=TOKEN,
                progress=lambda offset: print(offset, flush=True),
            )
        )


if __name__ == "__main__":
    role, folder, *rest = sys.argv[1:]
    known = Federation(cast(Any, None), Path(folder))
    asyncio.run({"serve": serve, "send": send}[role](known, *rest))
