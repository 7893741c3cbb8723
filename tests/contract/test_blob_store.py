"""What every blob store must do, run against each implementation."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.core.errors import (
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest, PartOf
from flplatform.core.ports import BlobStore, BlobWriter
from flplatform.files.digest import digest_of
from flplatform.files.modelfile import load
from flplatform.store.blobs import FileBlobStore
from tests.support.models import model_bytes, small_model

Open = Callable[[Path, int], BlobStore]
"""(folder, reserve in bytes) → a store; the same folder again is the same store, restarted."""

STORES: list[Open] = [FileBlobStore]
DATA = bytes(range(256)) * 40


@pytest.fixture(params=STORES, ids=lambda make: make.__name__)
def open_store(request: pytest.FixtureRequest) -> Open:
    return request.param


@pytest.fixture
def store(open_store: Open, tmp_path: Path) -> BlobStore:
    return open_store(tmp_path / "blobs", 0)


def ref(data: bytes) -> ModelRef:
    return ModelRef(digest_of(data), len(data))


def feed(writer: BlobWriter, data: bytes, chunk: int) -> None:
    for start in range(writer.offset, len(data), chunk):
        writer.write(data[start : start + chunk])


def put(
    store: BlobStore, data: bytes, manifest: Manifest | PartOf | None = None, chunk: int = 1000
) -> None:
    writer = store.receive("put", ref(data), manifest)
    feed(writer, data, chunk)
    writer.commit()


def test_a_blob_is_visible_only_after_commit(store: BlobStore) -> None:
    blob = ref(DATA)
    writer = store.receive("t", blob)
    writer.write(DATA)
    assert not store.has(blob.digest)
    assert store.digests() == []
    with pytest.raises(NotFoundError, match=blob.digest):
        store.path(blob.digest)
    writer.commit()
    assert store.has(blob.digest)
    assert store.path(blob.digest).read_bytes() == DATA
    assert store.digests() == [blob.digest]


def test_create_takes_what_was_filled_in(store: BlobStore) -> None:
    made = store.create(lambda path: path.write_bytes(DATA) and None)
    assert made == ref(DATA)
    assert store.path(made.digest).read_bytes() == DATA
    assert store.create(lambda path: path.write_bytes(DATA) and None) == made
    assert store.digests() == [made.digest]


def test_a_failed_fill_leaves_nothing(store: BlobStore) -> None:
    def fill(path: Path) -> None:
        path.write_bytes(DATA)
        raise InvalidArgumentError("no")

    with pytest.raises(InvalidArgumentError, match="no"):
        store.create(fill)
    assert store.digests() == []


def test_delete_keeps_mappings_alive_and_may_be_repeated(store: BlobStore, tmp_path: Path) -> None:
    arrays = small_model()
    data = model_bytes(arrays, tmp_path)
    put(store, data)
    mapped = load(store.path(ref(data).digest))
    store.delete(ref(data).digest)
    store.delete(ref(data).digest)
    assert not store.has(ref(data).digest)
    np.testing.assert_array_equal(mapped["d.weight"], arrays["d.weight"])


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "sha256:" + "0" * 64, "blake3:AB"])
def test_what_is_no_digest_is_refused(store: BlobStore, digest: str) -> None:
    for call in (store.has, store.path, store.delete):
        with pytest.raises(ModelFormatError, match="blake3"):
            call(digest)
    with pytest.raises(ModelFormatError, match="blake3"):
        store.receive("t", ModelRef(digest, 1))


def test_a_suspended_transfer_resumes_where_it_stopped(open_store: Open, tmp_path: Path) -> None:
    for restart in (False, True):
        store = open_store(tmp_path / f"blobs{restart}", 0)
        writer = store.receive("t", ref(DATA))
        writer.write(DATA[:3000])
        writer.suspend()
        if restart:
            store = open_store(tmp_path / f"blobs{restart}", 0)
        writer = store.receive("t", ref(DATA))
        assert writer.offset == 3000
        writer.write(DATA[3000:])
        writer.commit()
        assert store.has(ref(DATA).digest)


def test_a_discarded_transfer_starts_anew(store: BlobStore) -> None:
    writer = store.receive("t", ref(DATA))
    writer.write(DATA[:3000])
    writer.discard()
    writer = store.receive("t", ref(DATA))
    assert writer.offset == 0
    writer.discard()


def test_another_blob_under_the_same_transfer_starts_anew(store: BlobStore) -> None:
    writer = store.receive("t", ref(DATA))
    writer.write(DATA[:3000])
    writer.suspend()
    other = DATA[::-1]
    writer = store.receive("t", ref(other))
    assert writer.offset == 0
    writer.suspend()
    writer = store.receive("t", ref(DATA))
    assert writer.offset == 0
    writer.discard()


def test_one_transfer_has_one_writer_at_a_time(store: BlobStore) -> None:
    writer = store.receive("t", ref(DATA))
    with pytest.raises(UnavailableError, match="'t' is being received"):
        store.receive("t", ref(DATA))
    other = store.receive("u", ref(DATA))
    other.write(DATA)
    other.commit()
    writer.write(DATA)
    writer.commit()  # the same bytes came twice: one blob
    assert store.digests() == [ref(DATA).digest]
    store.receive("t", ref(DATA)).discard()
    assert store.has(ref(DATA).digest)


@pytest.mark.parametrize("end", ["commit", "suspend", "discard"])
def test_a_writer_is_over_once_it_ended(store: BlobStore, end: str) -> None:
    writer = store.receive("t", ref(DATA))
    writer.write(DATA[:10] if end != "commit" else DATA)
    getattr(writer, end)()
    writer.suspend()
    writer.discard()
    with pytest.raises(FLError):
        writer.write(DATA[10:20])
    if end == "commit":
        assert store.path(ref(DATA).digest).read_bytes() == DATA
    else:
        with pytest.raises(FailedPreconditionError, match="over"):
            writer.commit()
        successor = store.receive("t", ref(DATA))
        assert successor.offset == (10 if end == "suspend" else 0)
        writer.discard()  # belongs to the one before: the successor's bytes stay
        successor.write(DATA[successor.offset :])
        successor.commit()
        assert store.path(ref(DATA).digest).read_bytes() == DATA


def refused(store: BlobStore, writer: BlobWriter, transfer_id: str, blob: ModelRef) -> None:
    """Check that nothing of a refused transfer is left."""
    writer.suspend()
    assert not store.has(blob.digest)
    successor = store.receive(transfer_id, blob)
    assert successor.offset == 0
    successor.discard()


def test_more_bytes_than_declared_are_refused(store: BlobStore) -> None:
    blob = ref(DATA)
    writer = store.receive("t", blob)
    writer.write(DATA)
    with pytest.raises(InvalidArgumentError, match=f"more than the declared {blob.size} bytes"):
        writer.write(b"x")
    refused(store, writer, "t", blob)


def test_fewer_bytes_than_declared_do_not_commit(store: BlobStore) -> None:
    writer = store.receive("t", ref(DATA))
    writer.write(DATA[:-1])
    with pytest.raises(InvalidArgumentError, match=f"{len(DATA) - 1} of {len(DATA)} bytes"):
        writer.commit()
    refused(store, writer, "t", ref(DATA))


def test_other_bytes_than_declared_do_not_commit(store: BlobStore) -> None:
    writer = store.receive("t", ref(DATA))
    writer.write(DATA[:-1] + b"?")
    with pytest.raises(InvalidArgumentError, match="digest"):
        writer.commit()
    refused(store, writer, "t", ref(DATA))


def test_a_false_size_is_refused(store: BlobStore) -> None:
    put(store, DATA)
    for size in (-1, len(DATA) + 1):
        with pytest.raises(InvalidArgumentError, match="size"):
            store.receive("t", ModelRef(ref(DATA).digest, size))


def test_the_reserve_stays_free(open_store: Open, tmp_path: Path) -> None:
    store = open_store(tmp_path / "blobs", 1 << 62)
    with pytest.raises(ResourceExhaustedError, match="reserve"):
        store.receive("t", ref(DATA))
    store = open_store(tmp_path / "blobs", 0)
    with pytest.raises(ResourceExhaustedError):
        store.receive("t", ModelRef(ref(DATA).digest, 1 << 62))
    store.receive("t", ref(DATA)).discard()


def test_a_blob_that_is_here_needs_no_bytes(store: BlobStore, tmp_path: Path) -> None:
    arrays = small_model()
    data = model_bytes(arrays, tmp_path)
    put(store, data)
    writer = store.receive("again", ref(data), Manifest.of(arrays))
    assert writer.offset == len(data)
    writer.write(b"")
    writer.commit()
    writer = store.receive("again", ref(data), Manifest.of(arrays))
    with pytest.raises(InvalidArgumentError, match="more than"):
        writer.write(b"x")
    writer.discard()
    assert store.path(ref(data).digest).read_bytes() == data


# ---- model files --------------------------------------------------------------------------------


def test_a_model_of_the_job_is_accepted_in_any_chunks(store: BlobStore, tmp_path: Path) -> None:
    for chunk in (1, 3, 7, 8, 100, 10_000):
        arrays = small_model(chunk)
        put(store, model_bytes(arrays, tmp_path), Manifest.of(arrays), chunk)


def test_a_size_other_than_the_jobs_is_refused_at_once(store: BlobStore) -> None:
    manifest = Manifest.of(small_model())
    for size in (manifest.file_bytes() + 1, manifest.file_bytes() - 1, 0):
        with pytest.raises(ModelFormatError, match=str(manifest.file_bytes())):
            store.receive("t", ModelRef(ref(DATA).digest, size), manifest)


@pytest.mark.parametrize("position", [0, 8, 9, 60, -1])
@pytest.mark.parametrize("chunk", [1, 50, 10_000])
def test_another_header_is_refused_at_its_first_byte(
    store: BlobStore, tmp_path: Path, position: int, chunk: int
) -> None:
    arrays = small_model()
    data = bytearray(model_bytes(arrays, tmp_path))
    header = 8 + int.from_bytes(data[:8], "little")
    data[position % header] ^= 1
    writer = store.receive("t", ref(bytes(data)), Manifest.of(arrays))
    with pytest.raises(ModelFormatError, match="header") as caught:
        feed(writer, bytes(data[:header]), chunk)
    assert caught.value.field == "header"
    assert writer.offset <= position % header
    refused(store, writer, "t", ref(bytes(data)))


@pytest.mark.parametrize("name", ["b.half", "d.weight", "f.scalar"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("chunk", [1, 3, 8, 10_000])
def test_nan_and_infinity_are_refused_by_tensor(
    store: BlobStore, tmp_path: Path, name: str, bad: float, chunk: int
) -> None:
    arrays = small_model()
    arrays[name].reshape(-1)[-1] = bad
    data = model_bytes(arrays, tmp_path)
    with pytest.raises(ModelFormatError, match="NaN or infinity") as caught:
        put(store, data, Manifest.of(arrays), chunk)
    assert name in caught.value.field
    assert not store.has(ref(data).digest)


def test_extreme_values_and_any_bytes_outside_floats_are_accepted(
    store: BlobStore, tmp_path: Path
) -> None:
    arrays = {}
    for name in ("f2", "f4", "f8"):
        limits = np.finfo(name)
        arrays[name] = np.array([limits.max, limits.min, -0.0, limits.smallest_normal], name)
    arrays["ints"] = np.full(64, -1, "i4")  # NaN, were it float
    put(store, model_bytes(arrays, tmp_path), Manifest.of(arrays))


def test_a_blob_that_is_here_is_held_against_the_manifest(store: BlobStore, tmp_path: Path) -> None:
    arrays = small_model()
    arrays["d.weight"][1, 1] = np.nan
    data = model_bytes(arrays, tmp_path)
    put(store, data)  # without a manifest: bytes are bytes
    with pytest.raises(ModelFormatError, match="NaN"):
        store.receive("t", ref(data), Manifest.of(arrays))
    other = b"y" * len(data)
    put(store, other)
    with pytest.raises(ModelFormatError, match="header"):
        store.receive("t", ref(other), Manifest.of(arrays))


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 700), max_size=8),
    breaks=st.sets(st.integers(0, 8), max_size=4),
    with_manifest=st.booleans(),
    seed=st.integers(0, 3),
)
@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_any_chunks_and_any_interruptions_give_the_same_blob(
    make: Open, cuts: list[int], breaks: set[int], with_manifest: bool, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays = small_model(seed)
        data = model_bytes(arrays, folder)
        manifest = Manifest.of(arrays) if with_manifest else None
        store = make(folder / "blobs", 0)
        writer = store.receive("t", ref(data), manifest)
        bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if number in breaks:
                if number % 2:
                    writer.suspend()
                else:
                    writer.suspend()
                    store = make(folder / "blobs", 0)
                writer = store.receive("t", ref(data), manifest)
            assert writer.offset == start
            writer.write(data[start:stop])
        writer.commit()
        assert store.path(ref(data).digest).read_bytes() == data
        assert store.digests() == [ref(data).digest]


# ---- a part of a model --------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(names=st.sets(st.sampled_from(sorted(small_model())), min_size=1), chunk=st.integers(1, 400))
@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_any_part_of_a_model_is_taken(make: Open, names: set[str], chunk: int) -> None:
    arrays = small_model()
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder) / "blobs", 0)
        data = model_bytes({name: arrays[name] for name in names}, Path(folder))
        put(store, data, PartOf(Manifest.of(arrays)), chunk)
        put(store, data, PartOf(Manifest.of(arrays)), chunk)  # it is here: checked as it lies there
        assert store.path(ref(data).digest).read_bytes() == data


WRONG_PARTS = {
    "another tensor": ({"z": np.zeros(1, "f4")}, r"update\['z'\]: the model has no such tensor"),
    "another shape": ({"b.half": np.zeros(6, "f2")}, r"update\['b.half'\]: is F16"),
    "another dtype": ({"b.half": np.zeros(7, "f4")}, r"update\['b.half'\]: is F32"),
    "not a number": ({"b.half": np.full(7, np.nan, "f2")}, "NaN or infinity"),
}


@pytest.mark.parametrize("what", WRONG_PARTS)
def test_another_part_is_refused_by_name(store: BlobStore, tmp_path: Path, what: str) -> None:
    arrays, message = WRONG_PARTS[what]
    data = model_bytes(arrays, tmp_path)
    writer = store.receive("t", ref(data), PartOf(Manifest.of(small_model())))
    with pytest.raises(ModelFormatError, match=message):
        feed(writer, data, 50)
    refused(store, writer, "t", ref(data))


def test_a_part_is_no_larger_than_the_model(store: BlobStore, tmp_path: Path) -> None:
    data = model_bytes(small_model(), tmp_path) + b"x"
    with pytest.raises(ModelFormatError, match="a model file of this job"):
        store.receive("t", ref(data), PartOf(Manifest.of(small_model())))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends before its tensors begin"),
        (b"\x10\0\0", "ends before its tensors begin"),
        ((64).to_bytes(8, "little") + b"{", "ends before its tensors begin"),
        ((1 << 40).to_bytes(8, "little") + b"{", "declares"),
        ((4000).to_bytes(8, "little") + b"{", "that of the whole model"),
        ((2).to_bytes(8, "little") + b"{}", "no tensors"),
    ],
)
def test_a_part_without_tensors_is_refused(store: BlobStore, data: bytes, message: str) -> None:
    writer = store.receive("t", ref(data), PartOf(Manifest.of(small_model())))

    def send() -> None:
        feed(writer, data, 100)
        writer.commit()

    with pytest.raises(ModelFormatError, match=message):
        send()
    refused(store, writer, "t", ref(data))
