"""Model files: mapped views, one-pass writes, finite values."""

import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings

from flplatform.core.errors import ModelFormatError
from flplatform.core.model import DTYPES, MAX_HEADER_BYTES, Array, Manifest
from flplatform.files.modelfile import check_finite, load, load_copy, mapped, read_layout, save
from tests.support.models import arrays_of, small_model


def check_same(one: Mapping[str, Array], other: Mapping[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        assert one[name].tobytes() == other[name].tobytes()


@settings(max_examples=50, deadline=None)
@given(arrays=arrays_of(finite=False))
def test_what_was_saved_is_loaded_and_readable_elsewhere(
    arrays: Mapping[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("model") / "file"
    assert save(path, arrays) == Manifest.of(arrays) == read_layout(path).manifest
    check_same(load(path), arrays)
    check_same(load_copy(path), arrays)
    if all(array.dtype != DTYPES["BF16"] for array in arrays.values()):
        check_same(safetensors.numpy.load_file(path), arrays)


@settings(max_examples=50, deadline=None)
@given(arrays=arrays_of())
def test_a_file_of_the_safetensors_library_is_loaded(
    arrays: Mapping[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("model") / "file"
    safetensors.numpy.save_file(dict(arrays), path, metadata={"format": "np"})
    check_same(load(path), arrays)


def test_the_file_is_canonical(tmp_path: Path) -> None:
    arrays = small_model()
    save(tmp_path / "a", arrays)
    save(tmp_path / "b", dict(reversed(list(arrays.items()))))
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
               for name, array in arrays.items()}  # fmt: skip
    save(tmp_path / "c", strided)
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    save(tmp_path / "d", swapped)
    files = {(tmp_path / name).read_bytes() for name in "abcd"}
    assert len(files) == 1


def test_views_are_read_only_and_outlive_block_and_file(tmp_path: Path) -> None:
    arrays = small_model()
    save(tmp_path / "file", arrays)
    with mapped(tmp_path / "file") as views, pytest.raises(ValueError, match="read-only"):
        views["d.weight"][0, 0] = 1
    (tmp_path / "file").unlink()
    check_same(views, arrays)
    copies = dict(views)
    del views
    check_same(copies, arrays)


def test_a_copy_is_writable_and_private(tmp_path: Path) -> None:
    arrays = small_model()
    save(tmp_path / "file", arrays)
    load_copy(tmp_path / "file")["d.weight"][...] = 7
    check_same(load(tmp_path / "file"), arrays)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "file", small_model())
    with pytest.raises(FileExistsError):
        save(tmp_path / "file", small_model(1))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_cut_or_longer_file_is_refused(tmp_path: Path, change: int) -> None:
    path = tmp_path / "file"
    save(path, small_model())
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(ModelFormatError, match="describes"):
        load(path)


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_a_stump_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    save(path, small_model())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelFormatError):
        load(path)


@pytest.mark.parametrize("padding", [0, 1, 8])
def test_the_longest_header_is_read(tmp_path: Path, padding: int) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    text = text.ljust(MAX_HEADER_BYTES - padding)
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\x07")
    assert load(tmp_path / "file")["a"].tolist() == [7]


BOMB = """
import sys
from pathlib import Path
from flplatform.core.errors import ModelFormatError
from flplatform.files.modelfile import load
for path in sys.argv[1:]:
    try:
        load(Path(path))
        sys.exit(path)
    except ModelFormatError as error:
        pass
"""


def test_no_header_makes_the_reader_allocate(tmp_path: Path) -> None:
    texts = [
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}}',
        b"[" * (MAX_HEADER_BYTES - 1),
    ]
    paths = []
    for number, text in enumerate(texts):
        paths.append(str(tmp_path / str(number)))
        Path(paths[-1]).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    limit = 1 << 30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command = [sys.executable, "-c", BOMB, *paths]
    environment = {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(command, check=True, preexec_fn=limited, env=environment, timeout=60)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_nan_and_infinity_are_found_and_counted(dtype: str) -> None:
    arrays = {"fine": np.zeros(3, dtype), "bad": np.zeros((2, 5), dtype)}
    check_finite(arrays)
    arrays["bad"][0, 1] = np.nan
    arrays["bad"][1, 1:3] = np.inf, -np.inf
    with pytest.raises(ModelFormatError, match=r"update\['bad'\]: 3 of 10 values"):
        check_finite(arrays)


def test_large_but_finite_values_pass() -> None:
    check_finite({"a": np.full(10, np.finfo("f8").max), "b": np.full(10, np.finfo("f2").max, "f2"),
                  "i": np.full(3, -1, "i4"), "n": np.zeros((0, 3))})  # fmt: skip
