from types import SimpleNamespace

import pytest

from flplatform.client import resuming, retrying, site_run
from tests.support.federation import provision
from tests.unit.client.runs.world import JOB, FakeProcess, World, play


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    admins = {"amy": "project_admin", "lea": "lead@site-1", "rex": "project_admin"}
    federation = provision(tmp_path_factory.mktemp("runs"), admins=admins)
    signers = {name: (federation.key(name), federation.open(name).chain) for name in admins}
    before = federation.open("site-1").trust
    federation.revoke("rex")
    return SimpleNamespace(kit=federation.open("site-1"), signers=signers, before=before)


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    class Process(FakeProcess):
        made: list[FakeProcess] = []
        gate = None
        script: list[BaseException] = []

    monkeypatch.setattr(site_run, "RunProcess", Process)
    monkeypatch.setattr(retrying, "backoff_s", lambda *_: 0.0)
    return Process


@pytest.fixture
def world(people, tmp_path):
    world = World(people, tmp_path)
    world.local()
    return world


@pytest.fixture
def accepted(world):
    """The offer of a run that was accepted before a restart."""
    offer = world.offer()

    async def go():
        runs = world.runs()
        await runs.accept(*offer)
        await runs.close()

    play(go())
    return offer


@pytest.fixture
def patient(monkeypatch):
    """Nothing is tried again by itself."""
    monkeypatch.setattr(resuming, "backoff_s", lambda *_: 3600.0)


@pytest.fixture
def unmounted(world):
    """The offer of a run that was accepted before a restart; its data is not there any more."""
    mount = world.folder / "mnt"
    mount.mkdir()
    world.mount(mount)
    text = f"{JOB}data: [mnist]\n"
    offer = world.offer(data=world.packed(text=text))

    async def go():
        runs = world.runs()
        await runs.accept(*offer)
        await runs.close()

    play(go())
    mount.rmdir()
    return SimpleNamespace(offer=offer, mount=mount)
