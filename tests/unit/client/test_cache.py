"""What a site keeps of what it received: all that is needed, the rest while there is room."""

import asyncio
import errno
import os
import shutil
import threading

import numpy as np
import pytest

from flplatform.client import cache as module
from flplatform.client.cache import BlobCache, trim
from flplatform.core.errors import NotFoundError, ResourceExhaustedError, UnavailableError
from flplatform.core.messages import ModelRef, Task, TaskId
from flplatform.files.counters import Counters
from flplatform.files.digest import digest_of
from flplatform.files.modelfile import save
from flplatform.server.wire import make_wire
from flplatform.store.blobs import FileBlobStore
from flplatform.store.part_file import PartFile

RESERVE = 1000
FOREVER = 64 << 30


def make(store: FileBlobStore, size: int, age: int) -> str:
    blob = store.create(lambda path: path.write_bytes(bytes([age]) * size) and None)
    os.utime(store.path(blob.digest), (1000 - age, 1000 - age))
    return blob.digest


def test_the_oldest_go_until_the_rest_fits(tmp_path):
    store = FileBlobStore(tmp_path)
    old, middle, new = (make(store, 100, age) for age in (3, 2, 1))
    assert trim(store, (), 300) == []
    assert trim(store, (), 250) == [old]
    assert sorted(store.digests()) == sorted([middle, new])


def test_what_is_needed_stays(tmp_path):
    store = FileBlobStore(tmp_path)
    old, new = make(store, 100, 2), make(store, 100, 1)
    assert trim(store, {old}, 0) == [new]
    assert store.digests() == [old]


def test_so_much_goes_as_the_disk_is_short_of(tmp_path):
    store = FileBlobStore(tmp_path)
    old, middle, new = (make(store, 100, age) for age in (3, 2, 1))
    assert trim(store, (), FOREVER, -1) == []
    assert trim(store, (), FOREVER, 101) == [old, middle]
    assert trim(store, {new}, FOREVER, 1) == []


def test_what_a_kill_has_left_of_downloads_goes_first(tmp_path):
    parts = [ModelRef(digest_of(data), len(data)) for data in (b"1" * 60, b"2" * 60)]
    before = FileBlobStore(tmp_path)
    for number, blob in enumerate(parts):
        writer = before.receive(str(number), blob)
        writer.write(b"12"[number : number + 1] * 50)
        writer.suspend()
    store = FileBlobStore(tmp_path)
    old = make(store, 100, 2)
    left = tmp_path / "incoming"
    assert trim(store, (), FOREVER, 0) == []
    assert len(list(left.iterdir())) == 2, "a restart may be why it stopped"
    assert trim(store, {parts[0].digest}, FOREVER, 40) == []
    assert [parts[0].digest[7:] in part.name for part in left.iterdir()] == [True]
    assert trim(store, (), FOREVER, 51) == [old]
    assert list(left.iterdir()) == []


def test_what_is_left_of_downloads_that_were_given_up_goes_in_the_end(tmp_path, caplog):
    store = FileBlobStore(tmp_path)
    left = tmp_path / "incoming"
    for name in ("a.b.part", "young.b.part", ".nfs0001"):
        (left / name).touch()
    (left / "folder.b.part").mkdir()
    for path in left.iterdir():
        if path.name != "young.b.part":
            os.utime(path, (1000, 1000))
    assert trim(store, (), FOREVER) == []
    assert {path.name for path in left.iterdir()} == {"young.b.part", "folder.b.part"}
    assert "stays for now" in caplog.text


def test_what_is_left_of_downloads_goes_at_once_where_a_run_waits_for_space(tmp_path):
    store = FileBlobStore(tmp_path)
    (tmp_path / "incoming" / "a.b.part").touch()
    assert trim(store, (), 0, -1) == []
    assert list((tmp_path / "incoming").iterdir()) == []


def test_what_cannot_be_deleted_stays_and_the_next_goes(tmp_path, monkeypatch):
    store = FileBlobStore(tmp_path)
    old, new = make(store, 100, 2), make(store, 100, 1)
    delete = store.delete

    def refuse(digest):
        if digest == old:
            raise OSError(errno.EIO, "Input/output error")
        delete(digest)

    monkeypatch.setattr(store, "delete", refuse)
    assert trim(store, (), 100) == [new]


class Site:
    """A site's cache on a disk of its own, and a server that has all models.

    Attributes:
        disk_bytes: size of the disk, on which there is nothing but blobs.
        gate: if set, downloads wait for it before their first byte.
        fetched: digests, in order.
    """

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.disk_bytes = 10_000
        usage = shutil.disk_usage(folder)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: usage._replace(free=self.disk_bytes - self.taken)
        )
        monkeypatch.setattr(module, "fetch_blob", self._fetch_blob)
        self.store = FileBlobStore(folder / "blobs", RESERVE, copies=True)
        self.data: dict[str, bytes] = {}
        self.gate: asyncio.Event | None = None
        self.begun = asyncio.Event()
        self.fetched: list[str] = []
        self.needed: set[str] = set()
        self.cache = self.make(FOREVER)

    def make(self, limit_bytes):
        return BlobCache(self, self.store, limit_bytes, lambda: self.needed, Counters())

    @property
    def taken(self) -> int:
        files = (self.folder / "blobs").rglob("*")
        return sum(path.stat().st_size for path in files if path.is_file())

    def model(self, size: int = 3000) -> ModelRef:
        data = os.urandom(size)
        self.data[digest_of(data)] = data
        return ModelRef(digest_of(data), size)

    async def transfer(self, move):
        return await move(self, "token")

    async def _fetch_blob(self, _channel, blob, blobs, *, token):
        if not blobs.has(blob.digest):
            writer = blobs.receive(f"download {blob.digest}", blob)
            self.fetched.append(blob.digest)
            self.begun.set()
            try:
                if self.gate:
                    await self.gate.wait()
                writer.write(self.data[blob.digest])
                writer.commit()
            finally:
                writer.suspend()
        return blobs.path(blob.digest)

    async def ask(self, blob: ModelRef):
        """Fetch, as somebody who is over then."""
        asker = asyncio.create_task(self.cache.fetch(blob))
        await asyncio.wait([asker])
        while asker in self.cache._held:  # its callbacks come in their turn
            await asyncio.sleep(0)
        return asker.result()

    def parts(self) -> list[str]:
        return [path.name for path in (self.folder / "blobs" / "incoming").iterdir()]

    async def until_forgotten(self):
        while self.parts():  # a thread is at it
            await asyncio.sleep(0.01)

    def has(self, *blobs: ModelRef) -> list[bool]:
        return [self.store.has(blob.digest) for blob in blobs]


@pytest.fixture
def site(tmp_path, monkeypatch):
    return Site(tmp_path, monkeypatch)


def play(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def task(blob: ModelRef, number: int = 1, **more) -> Task:
    return Task(TaskId(7, number, "train", "site-1"), 0, blob, **more)


def test_past_rounds_give_way_to_the_next_where_the_disk_is_smaller_than_the_limit(site):
    async def go():
        for number in range(1, 8):
            work = task(site.model(), number)
            await site.cache.offer([work])
            assert site.store.free_bytes() >= work.model.size
            await site.ask(work.model)

    play(go())
    assert len(site.fetched) == 7
    assert len(site.store.digests()) == 3, "as many as the disk holds"


def test_a_download_that_is_refused_for_want_of_space_goes_on_in_the_room_of_others(site):
    """Also if nobody has offered it, as the package of a run."""

    async def go():
        blobs = [site.model() for _ in range(7)]
        for blob in blobs:
            assert (await site.ask(blob)).stat().st_size == blob.size
        assert site.has(*blobs) == [False] * 4 + [True] * 3

    play(go())


def test_a_disk_that_is_full_before_its_reserve_is(site, monkeypatch):
    """A quota, say, of which `disk_usage` does not know."""

    async def go():
        old = site.model()
        await site.ask(old)
        write = PartFile.write
        refusals = [ResourceExhaustedError("the disk is full", rule="disk")]

        def refuse(self, chunk):
            if refusals:
                self.suspend()
                raise refusals.pop()
            write(self, chunk)

        monkeypatch.setattr(PartFile, "write", refuse)
        new = site.model()
        await site.ask(new)
        assert site.has(old, new) == [False, True]

    play(go())


def test_other_refusals_delete_nothing(site, monkeypatch):
    async def go():
        old = site.model()
        await site.ask(old)
        for rule in ("processes", ""):
            error = ResourceExhaustedError("not now", rule=rule)

            async def refuse(*_, error=error, **__):
                raise error

            monkeypatch.setattr(module, "fetch_blob", refuse)
            with pytest.raises(ResourceExhaustedError):
                await site.ask(site.model())
        assert site.has(old) == [True]

    play(go())


def test_nothing_that_is_needed_goes_whatever_the_disk_says(site):
    async def go():
        run, offered, held = (site.model() for _ in range(3))
        for blob in (run, offered):
            await site.ask(blob)
        site.needed.add(run.digest)
        await site.cache.fetch(held)  # this one goes on, and has not begun to use it
        await site.cache.offer([task(offered)], short_of_space=True)
        with pytest.raises(ResourceExhaustedError):
            await site.ask(site.model())
        assert site.has(run, offered, held) == [True] * 3

    play(go())
    assert site.cache._held == {}, "whoever is over holds nothing"


def test_all_that_nobody_needs_goes_where_a_run_waits_for_space(site):
    async def go():
        old, new = site.model(), site.model()
        for blob in (old, new):
            await site.ask(blob)
        await site.cache.offer([task(new)])
        assert site.has(old, new) == [True, True]
        await site.cache.offer([task(new)], short_of_space=True)
        assert site.has(old, new) == [False, True]

    play(go())


def test_what_is_being_received_is_not_counted_twice(site):
    """Its room is promised already: the models of others may stay in what is left."""

    async def go():
        old, new = site.model(), site.model()
        site.disk_bytes = RESERVE + 8000
        await site.ask(old)
        site.gate = asyncio.Event()
        fetching = asyncio.create_task(site.cache.fetch(new))
        site.begun.clear()
        await site.begun.wait()
        await site.cache.offer([task(new)])
        assert site.has(old) == [True]
        site.gate.set()
        await fetching

    play(go())


def test_whoever_asks_while_blobs_are_deleted_does_not_get_one_of_them(site, monkeypatch):
    """It was here and not wanted when the deleting began, and is wanted before it goes."""

    async def go():
        loop, old = asyncio.get_running_loop(), site.model()
        await site.ask(old)
        deleting, may_delete = asyncio.Event(), threading.Event()
        delete = site.store.delete

        def slowly(digest):
            loop.call_soon_threadsafe(deleting.set)
            assert may_delete.wait(10)
            delete(digest)

        monkeypatch.setattr(site.store, "delete", slowly)
        offering = asyncio.create_task(site.cache.offer([], short_of_space=True))
        await deleting.wait()
        asking = asyncio.create_task(site.cache.fetch(old))
        await asyncio.wait([asking], timeout=0.05)
        may_delete.set()
        assert (await asking).read_bytes() == site.data[old.digest]
        await offering
        assert site.fetched == [old.digest] * 2

    play(go())


def test_a_model_that_is_being_decoded_does_not_go_before_it_has_a_name(site, monkeypatch):
    """Nobody can know that it is needed: its digest comes out only at the end."""

    async def go():
        loop = asyncio.get_running_loop()
        plain = site.folder / "plain"
        save(plain, {"w": np.linspace(0, 1, 500, dtype=np.float32)})
        server = FileBlobStore(site.folder / "server")
        model = server.create(lambda path: path.write_bytes(plain.read_bytes()) and None)
        wire = make_wire(server, model, "bf16")
        site.data[wire.digest] = server.path(wire.digest).read_bytes()
        work = task(model, wire=wire, wire_codec="bf16")
        made, may_go_on = asyncio.Event(), threading.Event()
        decode = module.decode_model

        def slowly(*args):
            digest = decode(*args)
            loop.call_soon_threadsafe(made.set)
            assert may_go_on.wait(10)
            return digest

        monkeypatch.setattr(module, "decode_model", slowly)
        await site.cache.offer([work])
        asking = asyncio.create_task(site.cache.model_of(work))
        await made.wait()
        await site.cache.offer([work], short_of_space=True)
        may_go_on.set()
        path = await asking
        await site.cache.offer([work], short_of_space=True)
        assert path.exists()
        assert path != site.folder / "blobs" / model.digest.removeprefix("blake3:")
        await site.cache.offer([], short_of_space=True)
        assert site.store.digests() == []

    play(go())


def test_tasks_need_not_wait_for_blobs_that_cannot_be_looked_through(site, monkeypatch, caplog):
    async def go():
        def fail():
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(site.store, "digests", fail)
        await site.cache.offer([task(site.model())], short_of_space=True)

    play(go())
    assert "not looked through now" in caplog.text


def test_an_offer_whose_digest_is_none_does_not_count(site):
    async def go():
        old = site.model()
        await site.ask(old)
        await site.cache.offer([task(ModelRef("odd", 5)), task(site.model(8000))])
        assert site.has(old) == [False]

    play(go())


def test_a_blob_that_the_disk_cannot_read_is_fetched_again(site, monkeypatch):
    blob = site.model()
    play(site.ask(blob))
    site.store = FileBlobStore(site.folder / "blobs", RESERVE, copies=True)  # the next process
    site.cache = site.make(FOREVER)
    name = site.store.path(blob.digest).name
    monkeypatch.setattr(os, "fstat", _eio_for(os.fstat, site.folder / "blobs" / name))
    play(site.ask(blob))
    assert site.fetched == [blob.digest] * 2
    assert site.store.path(blob.digest).read_bytes() == site.data[blob.digest]


def _eio_for(real, path):
    """Let a call fail on the file that has this name now, and on no successor of it."""
    bad = path.stat().st_ino

    def fail(handle):
        status = real(handle)
        if status.st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")
        return status

    return fail


def test_a_blob_that_can_neither_be_read_nor_deleted_is_waited_for(site, monkeypatch):
    blob = site.model()
    play(site.ask(blob))
    site.store = FileBlobStore(site.folder / "blobs", RESERVE, copies=True)
    site.cache = site.make(FOREVER)
    path = site.store.path(blob.digest)
    monkeypatch.setattr(os, "fstat", _eio_for(os.fstat, path))

    def fail(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(UnavailableError, match=r"Input/output error.*nor can it be deleted"):
            play(site.ask(blob))
    play(site.ask(blob))
    assert site.fetched == [blob.digest] * 2


def test_a_blob_that_the_server_has_not(site, monkeypatch):
    async def refuse(*_, **__):
        raise NotFoundError("no such blob")

    monkeypatch.setattr(module, "fetch_blob", refuse)
    with pytest.raises(NotFoundError):
        play(site.ask(site.model()))


def test_what_came_of_a_download_goes_with_the_last_who_wanted_it(site):
    async def scene():
        site.gate, blob = asyncio.Event(), site.model()
        first = asyncio.create_task(site.cache.fetch(blob))
        await site.begun.wait()
        second = asyncio.create_task(site.cache.fetch(blob))
        site.begun.clear()
        await asyncio.sleep(0)
        first.cancel()
        await site.begun.wait()  # the second one goes on with it
        assert site.parts()
        second.cancel()
        await asyncio.wait([first, second])
        await site.until_forgotten()

    play(scene())


def test_what_came_of_a_download_stays_while_it_is_needed(site):
    async def scene():
        site.gate, offered, needed = asyncio.Event(), site.model(), site.model()
        site.needed = {needed.digest}
        await site.cache.offer([task(offered)])
        for blob in (offered, needed):
            site.begun.clear()
            asker = asyncio.create_task(site.cache.fetch(blob))
            await site.begun.wait()
            asker.cancel()
            await asyncio.wait([asker])
        return site.parts()

    assert len(play(scene())) == 2


def test_what_came_of_a_download_goes_also_between_two_tries(site):
    async def scene():
        blob = site.model()
        site.gate = asyncio.Event()
        between = asyncio.Event()

        async def insist():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await site.cache.fetch(blob)
            between.set()
            await asyncio.Event().wait()

        asker = asyncio.create_task(insist())
        await between.wait()
        assert site.parts()
        asker.cancel()
        await asyncio.wait([asker])
        await site.until_forgotten()

    play(scene())
