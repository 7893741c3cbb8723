import errno
import os
from pathlib import Path

import pytest

from flplatform.files import writing
from flplatform.files.writing import set_aside, start_writing

MB = 1 << 20


def test_room_that_is_set_aside_leaves_the_size_alone(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"x" * 1000)
        if not set_aside(file.fileno(), 1000, 4 * MB):
            pytest.skip("this file system cannot set room aside")
        status = os.fstat(file.fileno())
        assert status.st_size == 1000
        assert status.st_blocks * 512 >= 4 * MB
        file.truncate(1000)
        assert os.fstat(file.fileno()).st_blocks * 512 < MB, "it is given back"


def test_what_is_on_its_way_to_the_disk_stays_as_it_was(tmp_path: Path) -> None:
    data = os.urandom(3 * MB)
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.write(data)
        start_writing(file.fileno(), MB, MB)
        start_writing(file.fileno(), 0, 3 * MB)
        file.seek(0)
        assert file.read() == data


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC])
def test_a_disk_that_cannot_does_without(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(writing, "_call", refuse)
    assert not set_aside(0, 0, 1)


def test_a_broken_disk_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(writing, "_call", refuse)
    with pytest.raises(OSError, match="broken"):
        set_aside(0, 0, 1)
    with pytest.raises(OSError, match="broken"):
        start_writing(0, 0, 1)


def test_a_system_without_the_calls_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_LIBC", None)
    assert not set_aside(0, 0, 1)
    start_writing(0, 0, 1)
