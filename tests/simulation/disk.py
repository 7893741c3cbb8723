"""File systems in memory that forget what was not fsynced.

What a program writes is in the page cache: a kill of the process keeps all of it, a restart of
the host keeps what `fsync` of the file (its bytes) and of the folder (its entries) have made
durable, and of the rest whatever a real file system may keep.
"""

import errno
import fnmatch
import os as real_os
import random
import stat as real_stat
import types
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from tests.simulation.world import PROCESS, Killed, World

FREE_BYTES = 1 << 40

WRITEBACK_S = 30.0
"""What is older is on the disk also without fsync: kernels write back by themselves."""


class File:
    """Bytes in the page cache, and those on the disk; None if nothing of it ever came there."""

    def __init__(self, now: float) -> None:
        self.data = bytearray()
        self.durable: bytes | None = None
        self.mtime = now


class Folder:
    """Entries as they are seen, and as they are on the disk."""

    def __init__(self, now: float) -> None:
        self.entries: dict[str, Node] = {}
        self.durable: dict[str, Node] = {}
        self.mtime = now


Node = File | Folder
Change = tuple[Folder, str, Node | None]


class Step(tuple[Change, ...]):
    """Changes that become durable together; `at` says since when they wait."""

    at = 0.0


class Host:
    """One machine's disk.

    Attributes:
        journal: changes of entries that are not durable yet, in order; each is all or nothing.
        ordered: whether a change is durable only together with all before it, as on ext4.
        full: no byte more can be written.
        broken: the next fsync of a file or folder fails.
        log_broken: that of the event log does.
    """

    def __init__(self, name: str, ordered: bool) -> None:
        self.name = name
        self.root = Folder(0.0)
        self.journal: list[Step] = []
        self.ordered = ordered
        self.full = self.broken = self.log_broken = False

    def change(self, at: float, *changes: Change) -> None:
        """Change entries at a time; together, if there are several."""
        for folder, name, node in changes:
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node
        step = Step(changes)
        step.at = at
        self.journal.append(step)

    def sync_folder(self, folder: Folder) -> None:
        """Make a folder's entries durable."""
        last = max(
            (
                index
                for index, changes in enumerate(self.journal)
                if any(each[0] is folder for each in changes)
            ),
            default=-1,
        )
        if last < 0:
            return
        if self.ordered:
            kept, self.journal = self.journal[: last + 1], self.journal[last + 1 :]
        else:
            kept = self._depended_on(folder)
            gone = {id(changes) for changes in kept}
            self.journal = [changes for changes in self.journal if id(changes) not in gone]
        for changes in kept:
            _apply(changes)

    def _depended_on(self, folder: Folder) -> list[Step]:
        """Return the changes of a folder, and those before them of the same entries elsewhere."""
        wanted: set[tuple[int, str]] = set()
        found = []
        for changes in reversed(self.journal):
            keys = {(id(each[0]), each[1]) for each in changes}
            if any(each[0] is folder for each in changes) or keys & wanted:
                found.append(changes)
                wanted |= keys
        return found[::-1]

    def sync_all(self) -> None:
        """Make everything durable."""
        for changes in self.journal:
            _apply(changes)
        self.journal = []

        def down(folder: Folder) -> None:
            for node in folder.entries.values():
                if isinstance(node, Folder):
                    down(node)
                else:
                    node.durable = bytes(node.data)

        down(self.root)

    def crash(self, rng: random.Random, now: float) -> None:
        """Forget what a restart of the machine forgets."""
        old = now - WRITEBACK_S
        for step in self.journal:
            if step.at < old:
                _apply(step)
        self.journal = [step for step in self.journal if step.at >= old]
        if self.ordered:
            kept = self.journal[: rng.randint(0, len(self.journal))]
        else:
            kept = [changes for changes in self.journal if rng.random() < 0.5]
        for changes in kept:
            _apply(changes)
        self.journal = []
        self.full = self.broken = self.log_broken = False
        self._settle(self.root, rng, old)

    def _settle(self, folder: Folder, rng: random.Random, old: float) -> None:
        folder.entries = dict(folder.durable)
        for node in folder.entries.values():
            if isinstance(node, Folder):
                self._settle(node, rng, old)
            elif node.mtime < old:
                node.durable = bytes(node.data)
            elif node.durable is None or bytes(node.data) != node.durable:
                node.data = bytearray(_left(node.durable or b"", bytes(node.data), rng))
                node.durable = bytes(node.data)


def _apply(changes: tuple[Change, ...]) -> None:
    for folder, name, node in changes:
        if node is None:
            folder.durable.pop(name, None)
        else:
            folder.durable[name] = node


def _left(before: bytes, after: bytes, rng: random.Random) -> bytes:
    """Return what a crash leaves of a file: old, new, cut short, or its tail never written."""
    at = rng.randint(0, len(after))
    return rng.choice([before, after, after[:at], after[:at] + bytes(len(after) - at)])


class Disks:
    """All hosts' file systems: the first part of a path is the host's name.

    Attributes:
        never_synced: a mutation: fsync of what has this in its path does nothing.
    """

    never_synced = ""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hosts: dict[str, Host] = {}
        self.handles: dict[int, tuple[Host, Node, str]] = {}
        self._next = 1000

    def add(self, name: str) -> None:
        """Add a machine."""
        self.hosts[name] = Host(name, ordered=self.world.rng.random() < 0.5)

    # ---- walking ----

    def touch(self) -> None:
        """Let a kill strike here."""
        process = PROCESS.get()
        if process is not None:
            process.touch()

    def find(self, path: Any) -> tuple[Host, Node | None]:
        """Return what lies at a path."""
        parts = str(path).split("/")[1:]
        host = self.hosts[parts[0]]
        node: Node | None = host.root
        for part in parts[1:]:
            node = node.entries.get(part) if isinstance(node, Folder) else None
        return host, node

    def get(self, path: Any) -> tuple[Host, Node]:
        """Return what lies at a path.

        Raises:
            FileNotFoundError: nothing.
        """
        host, node = self.find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", str(path))
        return host, node

    def folder(self, path: Any) -> tuple[Host, Folder]:
        """Return a folder."""
        host, node = self.get(path)
        if isinstance(node, File):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        return host, node

    def parent(self, path: Any) -> tuple[Host, Folder, str]:
        """Return the folder that a path's last name lies in."""
        above, _, name = str(path).rpartition("/")
        host, folder = self.folder(above)
        return host, folder, name

    # ---- changing ----

    def room(self, host: Host) -> None:
        """Refuse if the disk is full."""
        if host.full:
            self.world.count("met a full disk")
            raise OSError(errno.ENOSPC, "no space left on device")

    def mkdir(self, path: Any) -> None:
        """Make a folder."""
        self.touch()
        host, folder, name = self.parent(path)
        if name in folder.entries:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        self.room(host)
        host.change(self.world.loop.now, (folder, name, Folder(self.world.loop.now)))

    def create(self, path: Any, exclusive: bool = False) -> tuple[Host, File]:
        """Return the file at a path, made if missing."""
        host, folder, name = self.parent(path)
        node = folder.entries.get(name)
        if isinstance(node, Folder):
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        if node is None:
            self.touch()
            self.room(host)
            node = File(self.world.loop.now)
            host.change(self.world.loop.now, (folder, name, node))
        elif exclusive:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        return host, node

    def write(self, host: Host, file: File, at: int, data: bytes) -> int:
        """Write bytes."""
        self.touch()
        self.room(host)
        file.data[at : at + len(data)] = data
        file.mtime = self.world.loop.now
        return len(data)

    def rename(self, old: Any, new: Any) -> None:
        """Move a file or folder, over a file if there is one."""
        self.touch()
        host, source, name = self.parent(old)
        _, target, other = self.parent(new)
        node = source.entries.get(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", str(old))
        there = target.entries.get(other)
        if isinstance(there, Folder) and (isinstance(node, File) or there.entries):
            raise OSError(errno.ENOTEMPTY, "directory not empty", str(new))
        host.change(self.world.loop.now, (source, name, None), (target, other, node))

    def link(self, old: Any, new: Any) -> None:
        """Give a file one more name."""
        self.touch()
        _, node = self.get(old)
        host, folder, name = self.parent(new)
        if name in folder.entries:
            raise FileExistsError(errno.EEXIST, "exists", str(new))
        self.room(host)
        host.change(self.world.loop.now, (folder, name, node))

    def unlink(self, path: Any) -> None:
        """Remove a file."""
        self.touch()
        host, folder, name = self.parent(path)
        if name not in folder.entries:
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", str(path))
        host.change(self.world.loop.now, (folder, name, None))

    def rmtree(self, path: Any) -> None:
        """Remove a folder with all in it, bit by bit."""
        _, folder = self.folder(path)
        for name, node in list(folder.entries.items()):
            inner = f"{path}/{name}"
            if isinstance(node, Folder):
                self.rmtree(inner)
            else:
                self.unlink(inner)
        self.unlink(path)

    def fsync(self, host: Host, node: Node, path: str) -> None:
        """Make bytes or entries durable.

        Raises:
            OSError: EIO, once after the disk was broken; the bytes count as clean, and are lost.
        """
        self.touch()
        if self.never_synced and self.never_synced in path:
            return
        if host.broken:
            host.broken = False
            self.world.count("met EIO at fsync")
            raise OSError(errno.EIO, "input/output error")
        if isinstance(node, Folder):
            host.sync_folder(node)
        else:
            node.durable = bytes(node.data)

    # ---- handles ----

    def open(self, path: Any, flags: int) -> int:
        """Open a file or folder."""
        if flags & real_os.O_CREAT:
            host, node = self.create(path, bool(flags & real_os.O_EXCL))
        else:
            host, node = self.get(path)  # type: ignore[assignment]
        self._next += 1
        self.handles[self._next] = host, node, str(path)
        return self._next


_DISKS: list[Disks] = []


def disks() -> Disks:
    """Return the file systems of this history."""
    return _DISKS[-1]


def use(found: Disks) -> None:
    """Make these the file systems that programs see."""
    _DISKS[:] = [found]


def status(node: Node) -> Any:
    """Return what `stat` says."""
    is_file = isinstance(node, File)
    return types.SimpleNamespace(
        st_mode=(real_stat.S_IFREG | 0o600) if is_file else (real_stat.S_IFDIR | 0o700),
        st_size=len(node.data) if isinstance(node, File) else 0,
        st_mtime=node.mtime,
        st_mtime_ns=int(node.mtime * 1e9),
        st_uid=real_os.geteuid(),
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


class SimPath(PurePosixPath):
    """`pathlib.Path` on these file systems."""

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
        return iter([self / name for name in list(disks().folder(self)[1].entries)])

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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("O_"):
            return getattr(real_os, name)
        raise AttributeError(f"the simulated os has no {name}")

    @staticmethod
    def open(path: Any, flags: int, mode: int = 0) -> int:
        return disks().open(path, flags)

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
    def utime(path: Any) -> None:
        disks().get(path)[1].mtime = disks().world.loop.now

    @staticmethod
    def rename(old: Any, new: Any) -> None:
        disks().rename(old, new)

    replace = rename

    @staticmethod
    def walk(top: Any, topdown: bool = True) -> "Iterator[tuple[str, list[str], list[str]]]":
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


__all__ = ["Disks", "Killed", "SimOs", "SimPath", "SimShutil", "disks", "use"]
