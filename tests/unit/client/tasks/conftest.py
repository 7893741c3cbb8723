import pytest

from flplatform.client import answering, cache
from flplatform.client import task_loop as module
from flplatform.files.modelfile import load_copy
from tests.unit.client.tasks.world import World


@pytest.fixture
def world(tmp_path, monkeypatch):
    async def fetch(channel, blob, blobs, *, token):
        return blobs.path(blob.digest) if blobs.has(blob.digest) else await channel.fetch(blob)

    async def send(channel, path, blob, transfer_id, *, token):
        await channel.send(transfer_id, path, blob)

    monkeypatch.setattr(cache, "fetch_blob", fetch)
    monkeypatch.setattr(answering, "send_blob", send)
    monkeypatch.setattr(module, "RETRY_S", 0)
    return World(tmp_path)


@pytest.fixture
def keep(world, monkeypatch):
    """The arrays of every model that is uploaded."""
    kept = []

    async def send(channel, path, blob, transfer_id, *, token):
        kept.append(load_copy(path)["w"])
        await channel.send(transfer_id, path, blob)

    monkeypatch.setattr(answering, "send_blob", send)
    return kept
