import os

from flplatform.client.cache import trim
from flplatform.store.blobs import FileBlobStore


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
