"""Errors of a machine that is short of something become one that says of what."""

import errno
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from flplatform.core.errors import ResourceExhaustedError, UnavailableError
from flplatform.files.shortage import (
    demand_room,
    explaining_shortage,
    probe,
    remedy_at,
    shortage_in,
)


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


def test_what_to_do_names_the_machine() -> None:
    for number, remedy in (
        (errno.EDQUOT, "free space on the disk of site-1, then try again"),
        (errno.EMFILE, "at site-1: raise the limit of open files (ulimit -n)"),
    ):
        found = shortage_in(OSError(number, os.strerror(number)))
        assert found is not None
        assert remedy_at(found, "site-1") == remedy


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


def of_postgres(state: str) -> Exception:
    error = RuntimeError("as psycopg says")
    error.sqlstate = state
    return error


def of_sqlite(name: str) -> Exception:
    error = sqlite3.OperationalError("as SQLite says")
    error.sqlite_errorname = name
    return error


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (OSError(errno.ENOSPC, ""), "disk"),
        (OSError(errno.EMFILE, ""), "descriptors"),
        (OSError(errno.EIO, ""), None),
        (BlockingIOError(errno.EAGAIN, "a lock"), None),
        (MemoryError(), "memory"),
        (RuntimeError("can't start new thread"), "processes"),
        (RuntimeError("another"), None),
        (of_sqlite("SQLITE_FULL"), "disk"),
        (of_sqlite("SQLITE_IOERR_FSYNC"), None),
        (of_postgres("53100"), "disk"),
        (of_postgres("42501"), None),
        (ResourceExhaustedError("no room", rule="disk"), "disk"),
        (ResourceExhaustedError("too many clients", rule="max_clients"), None),
    ],
)
def test_a_shortage_is_found_below_what_came_of_it(error: Exception, rule: str | None) -> None:
    for shown in (None, error):
        try:
            try:
                raise error
            except type(error):
                raise UnavailableError("cannot be opened") from shown
        except UnavailableError as above:
            found = shortage_in(above)
        assert (found and found.rule) == rule


def test_probing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(tmp_path) is None
    assert probe(tmp_path / "missing") is None, "not a shortage"

    def full(_handle: int) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "fsync", full)
    found = probe(tmp_path)
    assert found is not None
    assert found.errno == errno.EDQUOT
    assert not [*tmp_path.iterdir()]
