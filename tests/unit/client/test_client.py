"""What a site does when it starts, whether the server is there or not."""

import asyncio
import os
import tempfile
from pathlib import Path

from flplatform.client.client import SiteClient
from flplatform.client.sandbox import make_scratch
from tests.support.federation import provision


def test_what_run_processes_have_left_is_removed_at_the_start(tmp_path, monkeypatch):
    """The run of such a process may have ended while the site was down."""
    kit = provision(tmp_path / "federation").open("site-1")
    place = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # a short path
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    left = make_scratch(kit.folder, 7)
    (left.folder / "cache").write_bytes(bytes(1000))
    os.close(left.lock)  # as at the end of the site's process before
    held = make_scratch(kit.folder, 8)

    async def scene():
        site = SiteClient(kit, lambda _: None)
        await site.start()
        try:
            async with asyncio.timeout(60):
                while left.folder.exists():
                    await asyncio.sleep(0.01)
        finally:
            await site.stop()

    asyncio.run(scene())
    assert list(place.iterdir()) == [held.folder]
    held.close()
    place.rmdir()
