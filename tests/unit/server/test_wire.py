"""Codecs at the server: what sites send comes to a model, or is refused by name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.algorithms.codecs import error_bound, split_codec, wire_manifest
from flplatform.client.wire import decode_model, encode_update
from flplatform.core.errors import InvalidArgumentError, ModelFormatError, UnavailableError
from flplatform.core.job import JobSpec
from flplatform.core.messages import ModelRef, Task, TaskId
from flplatform.core.model import Array, Arrays, Manifest, PartOf
from flplatform.files.digest import digest_of
from flplatform.files.modelfile import load, save
from flplatform.files.zstd import compress
from flplatform.server.wire import admissible, make_wire, undo
from flplatform.store.blobs import FileBlobStore
from tests.support.models import model_bytes, small_model
from tests.support.workflows import job

UP = ("zstd", "bf16", "bf16+zstd", "fp16", "fp16+zstd", "int8", "int8+zstd")
DOWN = ("none", "zstd", "bf16", "fp16+zstd")


class Wire:
    """A server's and a site's blobs, a round's model, and one task of a job."""

    def __init__(self, folder: Path, codec: str = "none", down: str = "none", **fields: Any):
        self.folder = folder
        self.server = FileBlobStore(folder / "server")
        self.site = FileBlobStore(folder / "site")
        self.arrays = small_model()
        self.manifest = Manifest.of(self.arrays)
        self.job: JobSpec = job(codec=codec, codec_down=down, **fields)
        model = self.server.create(lambda path: save(path, self.arrays) and None)
        wire = make_wire(self.server, model, down) if down != "none" else None
        task_id = TaskId(1, 1, "train", "a")
        self.task = Task(task_id, 1, model, codec, wire, down if wire else "none")
        self._files = 0

    def file(self, arrays: Arrays) -> Path:
        self._files += 1
        path = self.folder / f"file{self._files}"
        save(path, arrays)
        return path

    def received(self) -> Path:
        """The model as the site has it to train from."""
        if self.task.wire is None:
            return self.server.path(self.task.model.digest)
        came = self.server.path(self.task.wire.digest)
        return self.site.path(decode_model(self.site, self.task, came))

    def send(self, update: Arrays) -> dict[str, Array]:
        """Take an update from a site's file to the server's model."""
        target = self.folder / "wire"
        base = None if self.job.updates == "delta" else self.received()
        encode_update(self.task.codec, self.file(update), base, target)
        data = target.read_bytes()
        target.unlink()
        return self.take(data)

    def take(self, data: bytes) -> dict[str, Array]:
        blob = ModelRef(digest_of(data), len(data))
        expected = admissible(self.job, self.manifest, self.task, blob)
        assert (expected is None) == self.task.codec.endswith("zstd")
        assert self.server.create(lambda path: path.write_bytes(data) and None) == blob
        before = set(self.server.digests())
        try:
            made = undo(self.server, self.job, self.manifest, self.task, blob)
        except BaseException:
            assert set(self.server.digests()) == before
            assert not list((self.folder / "server").glob(".tmp-*")), "nothing is left"
            raise
        assert not list((self.folder / "server").glob(".tmp-*"))
        found = load(self.server.path(made.digest))
        kept = model_bytes(found, self.folder)
        assert self.server.path(made.digest).read_bytes() == kept, "canonical"
        return found


def trained(arrays: Arrays, scale: float = 0.5) -> dict[str, Array]:
    rng = np.random.default_rng(5)
    return {
        name: np.asarray(array + scale * rng.standard_normal(array.shape), array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("down", DOWN)
@pytest.mark.parametrize("codec", UP)
def test_a_model_comes_back_within_the_bound(tmp_path: Path, codec: str, down: str) -> None:
    wire = Wire(tmp_path, codec, down)
    base = load(wire.received())
    sent = trained(base)
    found = wire.send(sent)
    assert Manifest.of(found) == wire.manifest
    first, _ = split_codec(codec)
    for name, array in sent.items():
        wide = array.astype("f8").reshape(-1)
        change = wide - base[name].astype("f8").reshape(-1)
        exact = (
            first == "none" or array.dtype.kind != "f" or (first != "int8" and array.itemsize < 4)
        )
        own = 0 if exact else np.abs(wide) * np.finfo(array.dtype).eps
        bound = 0 if exact else error_bound(first, change)
        off = np.abs(found[name].astype("f8").reshape(-1) - wide)
        assert (off <= bound + own).all(), name


@pytest.mark.parametrize("codec", UP)
def test_a_change_and_a_part_come_back_too(tmp_path: Path, codec: str) -> None:
    wire = Wire(tmp_path, codec, "bf16", updates="delta", partial_updates=True)
    part = {name: small_model(3)[name] for name in ("b.half", "d.weight", "e.empty", "g.steps")}
    found = wire.send(part)
    assert Manifest.of(found) == Manifest.of(part)
    for name, array in part.items():
        np.testing.assert_allclose(found[name].astype("f8"), array.astype("f8"), atol=0.02)


def test_the_same_update_comes_to_the_same_bytes(tmp_path: Path) -> None:
    one, other = (
        Wire(tmp_path / "one", "int8+zstd", "bf16"),
        Wire(tmp_path / "other", "int8", "bf16"),
    )
    assert one.task.wire == other.task.wire, "what goes down is a function of the model"
    first, second = (each.send(trained(load(each.received()))) for each in (one, other))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_what_goes_down_exactly_is_the_model(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "none", "zstd")
    assert wire.received().name == wire.task.model.digest.partition(":")[2]


@pytest.mark.parametrize("codec", UP)
def test_only_so_many_bytes_are_admitted(tmp_path: Path, codec: str) -> None:
    wire = Wire(tmp_path, codec)
    exact = wire_manifest(split_codec(codec)[0], wire.manifest).file_bytes()
    packed = codec.endswith("zstd")
    for size in (exact + 1000, *(() if packed else (exact - 1, exact + 1))):
        with pytest.raises(InvalidArgumentError, match=f"run 1 with codec {codec[:4]}") as caught:
            admissible(wire.job, wire.manifest, wire.task, ModelRef(digest_of(b""), size))
        assert caught.value.field == "blob.size"


def test_a_part_is_admitted_without_a_codec(tmp_path: Path) -> None:
    wire = Wire(tmp_path, partial_updates=True)
    size = wire.manifest.file_bytes()
    for each in (size, 20):
        found = admissible(wire.job, wire.manifest, wire.task, ModelRef(digest_of(b""), each))
        assert found == PartOf(wire.manifest)
    with pytest.raises(InvalidArgumentError, match=f"at most {size}"):
        admissible(wire.job, wire.manifest, wire.task, ModelRef(digest_of(b""), size + 1))


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("part", [False, True])
def test_what_a_codec_made_is_held_against_its_form_from_the_first_byte(
    tmp_path: Path, codec: str, part: bool
) -> None:
    wire = Wire(tmp_path, codec, partial_updates=part)
    data = encoded(wire)
    blob = ModelRef(digest_of(data), len(data))
    expected = admissible(wire.job, wire.manifest, wire.task, blob)
    assert expected is not None
    with pytest.raises(InvalidArgumentError):
        wire.server.receive("a lie", blob, expected).write(b"\xff" * 40)
    writer = wire.server.receive("honest", blob, expected)
    for start in range(0, len(data), 7):
        writer.write(data[start : start + 7])
    writer.commit()
    assert wire.server.has(blob.digest)


# ---- hostile bytes ------------------------------------------------------------------------------


def encoded(wire: Wire) -> bytes:
    """What an honest site sends."""
    target = wire.folder / "honest"
    encode_update(wire.task.codec, wire.file(trained(wire.arrays)), wire.received(), target)
    return target.read_bytes()


@pytest.mark.parametrize("codec", UP)
def test_any_bytes_come_to_a_finite_model_or_are_refused(
    codec: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wire = Wire(tmp_path_factory.mktemp("hostile"), codec)
    honest = encoded(wire)

    @settings(deadline=None, max_examples=40)
    @given(
        position=st.integers(0, len(honest) - 1),
        patch=st.binary(min_size=1, max_size=40),
    )
    def attack(position: int, patch: bytes) -> None:
        data = (honest[:position] + patch + honest[position + len(patch) :])[: len(honest)]
        try:
            found = wire.take(data)
        except ModelFormatError:
            return
        assert Manifest.of(found) == wire.manifest
        assert all(np.isfinite(a).all() for a in found.values() if a.dtype.kind == "f")

    attack()


def packed(data: bytes, folder: Path) -> bytes:
    (folder / "plain").write_bytes(data)
    (folder / "packed").unlink(missing_ok=True)
    compress(folder / "plain", folder / "packed")
    return (folder / "packed").read_bytes()


def quantised(wire: Wire, **changes: Array) -> bytes:
    arrays = {
        spec.name: np.zeros(
            spec.shape, {"I8": "i1", "F32": "f4", "I64": "i8"}.get(spec.dtype, "u1")
        )
        for spec in wire_manifest("int8", wire.manifest).tensors
    } | {"t/a.flag": np.zeros(3, bool)}
    return model_bytes({**arrays, **changes}, wire.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s/d.weight": np.full(1, np.nan, "f4")}, r"update\['s/d.weight'\]: holds NaN"),
        ({"s/d.weight": np.full(1, np.inf, "f4")}, r"update\['s/d.weight'\]: holds NaN"),
        (
            {"s/d.weight": np.full(1, 3e38, "f4"), "q/d.weight": np.full((3, 5), 127, "i1")},
            r"model\['d.weight'\]: a value is beyond float32",
        ),
    ],
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    for codec in ("int8", "int8+zstd"):
        wire = Wire(tmp_path / codec, codec)
        data = quantised(wire, **changes)
        with pytest.raises(ModelFormatError, match=message):
            wire.take(packed(data, wire.folder) if codec != "int8" else data)


def test_another_header_is_refused(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "int8+zstd")
    plain = model_bytes(wire.arrays, tmp_path)
    exact = wire_manifest("int8", wire.manifest).file_bytes()
    with pytest.raises(ModelFormatError, match="a model file of this job"):
        wire.take(packed(plain, tmp_path))
    with pytest.raises(ModelFormatError, match="header: is not that of the job's model"):
        wire.take(packed(bytes(exact), tmp_path))


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "zstd", partial_updates=True)
    with pytest.raises(ModelFormatError, match=f"is {1 << 24} bytes, a model file of this job"):
        wire.take(packed(bytes(1 << 24), tmp_path))


def test_parts_are_of_the_model(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "int8", partial_updates=True)
    one = np.zeros(1, "f4")
    for arrays, message in (
        ({"q/d.weight": np.zeros((3, 5), "i1")}, r"update\['s/d.weight'\]: tensor is missing"),
        ({"s/d.weight": one}, "the model has no such tensor"),
        ({"t/d.weight": np.zeros((3, 5), "f4")}, "the model has no such tensor"),
        ({"q/x": np.zeros(1, "i1"), "s/x": one}, "the model has no such tensor"),
        ({"q/d.weight": np.zeros((5, 3), "i1"), "s/d.weight": one}, r"is I8\[5, 3\]"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            wire.take(model_bytes(arrays, tmp_path))


def test_bytes_that_are_gone_must_come_again(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "int8")
    with pytest.raises(UnavailableError, match="is gone"):
        undo(wire.server, wire.job, wire.manifest, wire.task, ModelRef(digest_of(b"x"), 1))


def test_an_overflow_names_tensor_codec_and_hint(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "fp16")
    with pytest.raises(ModelFormatError) as caught:
        wire.send({**wire.arrays, "d.weight": np.full((3, 5), 1e6, "f4")})
    assert str(caught.value) == (
        "model['d.weight']: codec fp16: a value is beyond float16; "
        "choose codec none, zstd or bf16 in job.yml"
    )


# ---- down ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("down", ["zstd", "bf16", "fp16+zstd"])
def test_a_site_holds_what_comes_against_the_task(tmp_path: Path, down: str) -> None:
    wire = Wire(tmp_path, "none", down)
    came = wire.server.path(wire.task.wire.digest)
    other = {**wire.arrays, "f.scalar": np.zeros((), "f4")}
    model = wire.server.create(lambda path: save(path, other) and None)
    fake = wire.server.path(make_wire(wire.server, model, down).digest)
    with pytest.raises(ModelFormatError, match="stands for a model of"):
        decode_model(wire.site, wire.task, fake)
    assert wire.site.digests() == []
    junk = tmp_path / "junk"
    junk.write_bytes(came.read_bytes()[:-1])
    with pytest.raises(ModelFormatError):
        decode_model(wire.site, wire.task, junk)
    assert math.isfinite(float(load(wire.received())["f.scalar"]))
