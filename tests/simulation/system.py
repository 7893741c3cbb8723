"""What programs see of the file systems: the parts of `os`, `shutil` and `pathlib` they use."""

import fnmatch
import mmap as real_mmap
import os as real_os
import secrets as real_secrets
import stat as real_stat
import types
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from tests.simulation.disk import FREE_BYTES, Disks, File, Folder, Node

_DISKS: list[Disks] = []
USER = real_os.geteuid()


def disks() -> Disks:
    """Return the file systems of this history."""
    return _DISKS[-1]


def use(found: Disks) -> None:
    """Make these the file systems that programs see."""
    _DISKS[:] = [found]


def absent(what: str) -> AttributeError:
    """Return the error for what a program uses and this machine lacks; the history has failed."""
    if not what.rpartition(" ")[2].startswith("__"):
        disks().world.absent.append(what)
    return AttributeError(f"the simulated {what}")


def status(node: Node) -> Any:
    """Return what `stat` says."""
    is_file = isinstance(node, File)
    return types.SimpleNamespace(
        st_mode=(real_stat.S_IFREG | 0o600) if is_file else (real_stat.S_IFDIR | 0o700),
        st_size=len(node.data) if isinstance(node, File) else 0,
        st_mtime=node.mtime,
        st_mtime_ns=int(node.mtime * 1e9),
        st_uid=USER,
    )


class OpenFile:
    """An open file, unbuffered."""

    def __init__(self, handle: int, mode: str = "r+b") -> None:
        self._handle = handle
        self._host, node, self._path = disks().handles[handle]
        assert isinstance(node, File)
        self._file = node
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        """Return bytes from here on."""
        end = len(self._file.data) if size < 0 else self._at + size
        data = bytes(self._file.data[self._at : end])
        self._at += len(data)
        return data

    def write(self, data: Any) -> int:
        """Write bytes here."""
        count = disks().write(self._host, self._file, self._at, bytes(data))
        self._at += count
        return count

    def truncate(self, size: int) -> None:
        """Cut."""
        disks().touch()
        del self._file.data[size:]
        self._file.mtime = disks().world.loop.now

    def seek(self, at: int, whence: int = 0) -> int:
        """Go to a place."""
        self._at = at if whence == 0 else len(self._file.data) + at
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def flush(self) -> None:
        """Nothing is buffered."""

    def fileno(self) -> int:
        """Return the handle."""
        return self._handle

    def close(self) -> None:
        """Close."""
        disks().handles.pop(self._handle, None)

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SimPath:
    """`pathlib.Path` on these file systems: absolute paths, what of it the programs use."""

    __slots__ = ("_text",)

    def __init__(self, *parts: Any) -> None:
        self._text = "/".join(map(str, parts))

    def __truediv__(self, name: Any) -> "SimPath":
        made = SimPath.__new__(SimPath)
        made._text = f"{self._text}/{name}"
        return made

    def __str__(self) -> str:
        return self._text

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"SimPath({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimPath) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __lt__(self, other: "SimPath") -> bool:
        return self._text < other._text

    def __getattr__(self, name: str) -> Any:
        raise absent(f"path has no {name}")

    @property
    def name(self) -> str:
        return self._text.rpartition("/")[2]

    @property
    def parent(self) -> "SimPath":
        return SimPath(self._text.rpartition("/")[0])

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self._text).suffixes

    def with_suffix(self, suffix: str) -> "SimPath":
        return SimPath(PurePosixPath(self._text).with_suffix(suffix))

    def is_symlink(self) -> bool:
        return False

    def resolve(self) -> "SimPath":
        return self

    def exists(self) -> bool:
        return disks().find(self)[1] is not None

    def is_dir(self) -> bool:
        return isinstance(disks().find(self)[1], Folder)

    def is_file(self) -> bool:
        return isinstance(disks().find(self)[1], File)

    def stat(self) -> Any:
        return status(disks().get(self)[1])

    lstat = stat

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        try:
            disks().mkdir(self)
        except FileNotFoundError:
            if not parents:
                raise
            self.parent.mkdir(mode, parents=True, exist_ok=True)
            self.mkdir(mode, exist_ok=exist_ok)
        except FileExistsError:
            if not (exist_ok and self.is_dir()):
                raise

    def iterdir(self) -> "Iterator[SimPath]":
        disks().touch()
        above = self._text
        return iter([SimPath(f"{above}/{name}") for name in disks().folder(above)[1].entries])

    def glob(self, pattern: str) -> "Iterator[SimPath]":
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            disks().unlink(self)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: Any) -> "SimPath":
        disks().rename(self, target)
        return SimPath(target)

    replace = rename

    def hardlink_to(self, target: Any) -> None:
        disks().link(target, self)

    def open(self, mode: str = "r", buffering: int = -1) -> OpenFile:
        flags = real_os.O_CREAT if mode[0] in "wx" else 0
        flags |= real_os.O_EXCL if mode[0] == "x" else 0
        file = OpenFile(disks().open(self, flags))
        if mode[0] == "w":
            file.truncate(0)
        return file

    def read_bytes(self) -> bytes:
        disks().touch()
        with self.open("rb") as file:
            return file.read()

    def write_bytes(self, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data)


class SimOs:
    """The part of `os` that the programs use, on these file systems."""

    path = real_os.path
    geteuid = real_os.geteuid
    SEEK_END = real_os.SEEK_END

    O_RDONLY, O_WRONLY, O_RDWR = real_os.O_RDONLY, real_os.O_WRONLY, real_os.O_RDWR
    O_CREAT, O_EXCL = real_os.O_CREAT, real_os.O_EXCL
    O_DIRECTORY, O_NOFOLLOW = real_os.O_DIRECTORY, real_os.O_NOFOLLOW

    def __getattr__(self, name: str) -> Any:
        raise absent(f"os has no {name}")

    @staticmethod
    def open(path: Any, flags: int, mode: int = 0) -> int:
        return disks().open(path, flags)

    @staticmethod
    def pwrite(handle: int, data: Any, offset: int) -> int:
        host, node, _ = disks().handles[handle]
        assert isinstance(node, File)
        return disks().write(host, node, offset, bytes(data))

    @staticmethod
    def close(handle: int) -> None:
        disks().handles.pop(handle, None)

    @staticmethod
    def fdopen(handle: int, mode: str) -> OpenFile:
        return OpenFile(handle)

    @staticmethod
    def fsync(handle: int) -> None:
        disks().fsync(*disks().handles[handle])

    fdatasync = fsync

    @staticmethod
    def fchmod(handle: int, mode: int) -> None:
        disks().touch()

    @staticmethod
    def chmod(path: Any, mode: int) -> None:
        disks().touch()

    @staticmethod
    def utime(path: Any) -> None:
        disks().get(path)[1].mtime = disks().world.loop.now

    @staticmethod
    def rename(old: Any, new: Any) -> None:
        disks().rename(old, new)

    replace = rename

    @staticmethod
    def walk(
        top: Any, topdown: bool = True, onerror: Any = None
    ) -> "Iterator[tuple[str, list[str], list[str]]]":
        def down(path: SimPath) -> Iterator[tuple[str, list[str], list[str]]]:
            entries = disks().folder(path)[1].entries
            folders = [name for name, node in entries.items() if isinstance(node, Folder)]
            files = [name for name in entries if name not in folders]
            if topdown:
                yield str(path), folders, files
            for name in folders:
                yield from down(path / name)
            if not topdown:
                yield str(path), folders, files

        return down(SimPath(top))


class SimMmap:
    """The part of `mmap` that the programs use: a mapping is a copy, the files never change."""

    ACCESS_READ = real_mmap.ACCESS_READ
    PAGESIZE = real_mmap.PAGESIZE

    @staticmethod
    def mmap(handle: int, _length: int, access: int) -> bytes:
        node = disks().handles[handle][1]
        assert isinstance(node, File)
        assert access == real_mmap.ACCESS_READ
        return bytes(node.data)


class SimSecrets:
    """The part of `secrets` that the programs use: the same secrets for the same seed."""

    compare_digest = staticmethod(real_secrets.compare_digest)

    @staticmethod
    def token_hex(count: int) -> str:
        return disks().world.secrets.randbytes(count).hex()

    token_urlsafe = token_hex


class SimDatetime(datetime):
    """The wall clock, which goes with the virtual one."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime(2026, 1, 1, tzinfo=tz) + timedelta(seconds=disks().world.loop.now)


class SimShutil:
    """The part of `shutil` that the programs use."""

    @staticmethod
    def rmtree(path: Any, ignore_errors: bool = False) -> None:
        try:
            disks().rmtree(path)
        except OSError:
            if not ignore_errors:
                raise

    @staticmethod
    def disk_usage(path: Any) -> Any:
        host, _ = disks().get(path)
        return types.SimpleNamespace(free=0 if host.full else FREE_BYTES)
