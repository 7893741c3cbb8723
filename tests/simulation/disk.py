"""File systems in memory that forget what was not fsynced.

What a program writes is in the page cache: a kill of the process keeps all of it, a restart of
the host keeps what `fsync` of the file (its bytes) and of the folder (its entries) have made
durable, and of the rest whatever a real file system may keep.
"""

import errno
import os as real_os
import random
from typing import Any

from tests.simulation.world import PROCESS, World

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
        journal = self.journal
        last = len(journal) - 1
        while (
            last >= 0 and folder is not journal[last][0][0] and folder is not journal[last][-1][0]
        ):
            last -= 1
        if last < 0:
            return
        if self.ordered:
            kept, self.journal = journal[: last + 1], journal[last + 1 :]
        else:
            kept, rest = self._depended_on(folder, last)
            self.journal = rest + journal[last + 1 :]
        for changes in kept:
            _apply(changes)

    def _depended_on(self, folder: Folder, last: int) -> tuple[list[Step], list[Step]]:
        """Return the changes of a folder, with those before them of the same entries elsewhere.

        And all others up to the last one of that folder.
        """
        wanted: set[tuple[int, str]] = set()
        found, others = [], []
        for index in range(last, -1, -1):
            changes = self.journal[index]
            for where, name, _ in changes:
                if where is folder or (id(where), name) in wanted:
                    found.append(changes)
                    wanted.update((id(each[0]), each[1]) for each in changes)
                    break
            else:
                others.append(changes)
        return found[::-1], others[::-1]

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
        if process is not None and (process.touches or process.dead):
            process.touch()

    def find(self, path: Any) -> tuple[Host, Node | None]:
        """Return what lies at a path."""
        _, name, *parts = str(path).split("/")
        host = self.hosts[name]
        node: Any = host.root
        try:
            for part in parts:
                node = node.entries[part]
        except (KeyError, AttributeError):  # not there, or below a file
            return host, None
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
