"""Errors of a machine that is short of something become one that says of what."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from flplatform.core.errors import ResourceExhaustedError
from flplatform.files.shortage import demand_room, explaining_shortage


@pytest.mark.parametrize(
    ("number", "rule"),
    [
        (errno.ENOSPC, "disk"),
        (errno.EDQUOT, "disk"),
        (errno.EMFILE, "descriptors"),
        (errno.ENFILE, "descriptors"),
        (errno.ENOMEM, "memory"),
        (errno.EAGAIN, "processes"),
    ],
)
def test_what_comes_back_is_named(number: int, rule: str) -> None:
    with pytest.raises(ResourceExhaustedError) as caught, explaining_shortage():
        raise OSError(number, os.strerror(number))
    assert caught.value.rule == rule
    assert caught.value.hint


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), explaining_shortage():
        Path("/no such file").read_bytes()
    with pytest.raises(ValueError, match="x"), explaining_shortage():
        raise ValueError("x")


def test_room(tmp_path: Path) -> None:
    demand_room(tmp_path, 1)
    with pytest.raises(ResourceExhaustedError, match="are needed on the disk") as caught:
        demand_room(tmp_path, shutil.disk_usage(tmp_path).total + 1)
    assert caught.value.rule == "disk"
