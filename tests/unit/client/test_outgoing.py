"""What leaves a site: the whole model filtered, the update made of it, the codec last."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flplatform.client import outgoing as module
from flplatform.client.outgoing import prepare
from flplatform.client.run_spec import Outcome
from flplatform.client.update import whole_model
from flplatform.core.config import Component
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.messages import ModelRef, Task, TaskId
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import load, save

CLIP = Component(name="clip_norm", args={"max_norm": 1.0})
BASE = {"v": np.ones(4, "f4"), "w": np.ones(4, "f4")}


def sent(
    folder: Path,
    update: dict[str, Any],
    *,
    delta: bool = False,
    filters: tuple[Component, ...] = (),
    codec: str = "none",
) -> dict[str, Any]:
    """Return the arrays of the file that is sent for what training returned."""
    work = folder / "work"
    work.mkdir()
    save(folder / "base", BASE)
    whole = whole_model(BASE, update, delta=delta)
    save(work / "result.safetensors", whole)
    (folder / "best").hardlink_to(work / "result.safetensors")
    save(work / "update.safetensors", update)
    outcome = Outcome("result.safetensors", 1, {}, {}, 0, "update.safetensors", delta)
    task = Task(TaskId(1, 1, "train", "a"), 1, ModelRef("", 1), codec)
    blob = prepare(work, outcome, folder / "base", filters, task)
    assert sorted(path.name for path in work.iterdir()) == ["result.safetensors"]
    path = work / "result.safetensors"
    assert blob == ModelRef(*digest_of_file(path))
    best = load(folder / "best")
    for name, array in whole.items():
        np.testing.assert_array_equal(best[name], array)  # the site's own model stays whole
    return load(path)


def test_a_part_is_sent_as_it_was_returned(tmp_path: Path) -> None:
    found = sent(tmp_path, {"w": np.full(4, 3, "f4")})
    assert found.keys() == {"w"}
    np.testing.assert_array_equal(found["w"], 3)


def test_a_change_is_sent_as_it_was_returned(tmp_path: Path) -> None:
    found = sent(tmp_path, {"w": np.full(4, 3, "f4")}, delta=True)
    np.testing.assert_array_equal(found["w"], 3)


@pytest.mark.parametrize(("delta", "value"), [(True, 0.5), (False, 1.5)])
def test_filters_see_the_whole_model_and_the_update_follows(
    tmp_path: Path, delta: bool, value: float
) -> None:
    # The whole model changes by 2 in each of four values: a norm of 4, of which 1 may leave.
    update = {"w": np.full(4, 2 if delta else 3, "f4")}
    found = sent(tmp_path, update, delta=delta, filters=(CLIP,))
    assert found.keys() == {"w"}
    np.testing.assert_allclose(found["w"], value, rtol=1e-6)


def test_the_codec_takes_the_change(tmp_path: Path) -> None:
    found = sent(tmp_path, {"w": np.full(4, 3, "f4")}, codec="int8")
    assert found["q/w"].tolist() == [127] * 4
    assert found["s/w"][0] == pytest.approx(2 / 127, rel=1e-6)


def test_the_codec_takes_a_change_as_it_is(tmp_path: Path) -> None:
    found = sent(tmp_path, {"w": np.full(4, 3, "f4")}, delta=True, codec="bf16")
    np.testing.assert_array_equal(found["h/w"].astype("f4"), 3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"model\['w'\]: codec fp16"):
        sent(tmp_path, {"w": np.full(4, 1e6, "f4")}, delta=True, codec="fp16")


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="codec: 'zip' is unknown to this release"):
        sent(tmp_path, {"w": np.ones(4, "f4")}, codec="zip")


def test_a_full_disk_costs_nothing_that_was_trained(tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever step fails, the same call later sends what it would have sent at once."""
    real = module.digest_of_file

    def full(path: Path) -> tuple[str, int]:
        raise OSError(errno.ENOSPC, "full")

    expected = tmp_path / "expected"
    expected.mkdir()
    settings: dict[str, Any] = {"delta": True, "filters": (CLIP,), "codec": "bf16"}
    wanted = sent(expected, {"w": np.full(4, 2, "f4")}, **settings)
    monkeypatch.setattr(module, "digest_of_file", full)
    with pytest.raises(OSError, match="full"):
        sent(tmp_path, {"w": np.full(4, 2, "f4")}, **settings)
    monkeypatch.setattr(module, "digest_of_file", real)
    outcome = Outcome("result.safetensors", 1, {}, {}, 0, "update.safetensors", True)
    task = Task(TaskId(1, 1, "train", "a"), 1, ModelRef("", 1), "bf16")
    prepare(tmp_path / "work", outcome, tmp_path / "base", (CLIP,), task)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["result.safetensors"]
    found = load(tmp_path / "work" / "result.safetensors")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
