"""Where a server's state lies, seen from outside; nothing here writes into it."""

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flplatform.core import events as ev
from flplatform.core.errors import NotFoundError
from flplatform.core.messages import ModelRef
from flplatform.core.model import check_digest
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import temporary_beside
from flplatform.files.lock import PROCESS_LOCK, is_held
from flplatform.security.kit import Kit
from flplatform.server.retention import freed_rounds, kept_blobs
from flplatform.server.shelf import Shelf
from flplatform.server.upkeep.history import History, check_log
from flplatform.server.upkeep.streams import blobs_of
from flplatform.store.blobs import digests_in
from flplatform.store.snapshot import Snapshot, snapshot, sqlite_file

LOG = "events.db"
BLOBS = "blobs"
AUDIT = "audit.jsonl"
READY = "ready.json"
LOOKS = 3
"""How often a blob must be found missing, each time with a newer log, to be lost."""


def _kit_of(folder: Path) -> Kit:
    above = folder.absolute().parent
    if not (folder / "startup").is_dir() and (above / "startup").is_dir():
        kit = Kit.open(above)
        if kit.state_folder() == folder.absolute():
            return kit
    return Kit.open(folder)


@dataclass(frozen=True)
class Place:
    """A server's kit, its state folder, and what its event log is called.

    Attributes:
        target: path of the SQLite file, or the URL that the operator set.
        blobs_in: folder of the blobs, if that is not the state's own: a backup's.
    """

    kit: Kit
    folder: Path
    target: str | Path
    blobs_in: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> "Place":
        """Find the state of a server's kit.

        Args:
            folder: the kit, or the state folder in it.

        Raises:
            ConfigError: it is not a valid kit of a server.
        """
        kit = _kit_of(folder)
        kit.server  # noqa: B018 - refuses the kit of a site
        folder = kit.state_folder()
        return cls(kit, folder, kit.local.resources.state_url or folder / LOG)

    @classmethod
    def of_backup(cls, folder: Path, kit: Kit) -> "Place":
        """Return what a backup holds, as it is kept there."""
        return cls(kit, folder / "state", folder / LOG, folder / BLOBS)

    def resolved(self) -> "Place":
        """Return the same with the folder that is meant, should the kit have a link to it."""
        folder = Path(os.path.realpath(self.folder))
        return replace(self, folder=folder, target=folder / LOG if self.holds_log else self.target)

    @property
    def holds_log(self) -> bool:
        """Whether the log is the state folder's own file: it is lost with the folder."""
        return self.target == self.folder / LOG

    @property
    def log_file(self) -> Path | None:
        """The file of a SQLite log that is not the state folder's own; None for any other log.

        Raises:
            ConfigError: `target` is malformed.
        """
        file = sqlite_file(self.target)
        if file is None or _real_parent(file) == _real_parent(self.folder / LOG):
            return None
        return file

    @property
    def roots(self) -> list[Path]:
        """Return the folders in which nobody else may read."""
        if self.blobs_in:
            return [self.folder.parent]
        return [self.folder, self.kit.folder / "logs"]

    @property
    def base(self) -> Path:
        """What names of files are relative to."""
        return self.folder.parent if self.blobs_in else self.kit.folder

    @property
    def lock(self) -> Path:
        """What a running process of this kit has locked."""
        return self.kit.folder / PROCESS_LOCK

    @property
    def running(self) -> bool:
        """Whether a server runs on this kit."""
        return is_held(self.lock) or self.opened

    @property
    def opened(self) -> bool:
        """Whether some process has the log or the audit open to write."""
        return any(is_held(self.folder / name) for name in (f"{LOG}.lock", f"{AUDIT}.head"))

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Read the log as it is now; see `store.snapshot`."""
        with snapshot(self.target) as log:
            yield log

    def history(self) -> History:
        """Read and check the log as it is now.

        Raises:
            FLError: it cannot be read.
        """
        with self.snapshot() as log:
            return history_of(log)

    @property
    def blobs(self) -> "BlobFolder":
        """The blobs."""
        return BlobFolder(self.blobs_in or self.folder / BLOBS)

    def lost(self, missing: Iterable[str], needs: "Mapping[str, Need]") -> set[str]:
        """Return those missing blobs that are needed and not there, by newer logs too.

        A running server frees blobs once its log does not need them any more. Of the log only
        the runs concerned are read again.

        Args:
            missing: digests that a log needed and that were not there afterwards.
            needs: what that log needed.
        """
        lost = set(missing)
        for _ in range(LOOKS - 1):
            if not lost:
                break
            runs = {run for digest in lost if digest in needs for run in needs[digest].runs}
            with self.snapshot() as log:
                now = needs_of(history_of(log, runs))
            lost = {digest for digest in lost if digest in now and not self.blobs.has(digest)}
        return lost


def contents(folder: Path) -> Iterator[Path]:
    """Yield what makes a folder a state; a server that never started leaves nothing of it."""
    if folder.is_dir():
        for path in folder.rglob("*"):
            if not path.is_dir() and not path.name.endswith(".lock") and path.name != READY:
                yield path


def _real_parent(file: Path) -> Path:
    """Return a file's path with all links followed but the last one: it can be renamed."""
    return Path(os.path.realpath(file.parent), file.name)


def history_of(log: Snapshot, runs: Collection[int] | None = None) -> History:
    """Read and check a log.

    Args:
        log: the log.
        runs: read those alone, and the federation's stream; None for all.
    """
    wanted = None if runs is None else {ev.FEDERATION, *map(ev.run_stream, runs)}
    return check_log(
        {name: log.scan(name) for name in log.streams() if wanted is None or name in wanted}
    )


@dataclass(frozen=True, slots=True)
class Need:
    """A blob that the log needs.

    Attributes:
        size: bytes, as the log says.
        runs: those that need it; none if it only lies staged.
        is_model: whether it is a model file; else a job's package or what a codec made.
    """

    size: int
    runs: tuple[int, ...]
    is_model: bool

    @property
    def who(self) -> str:
        """Say who needs it."""
        return f"run {self.runs[0]} needs it" if self.runs else "a staged job needs it"


def needs_of(history: History) -> dict[str, Need]:
    """Return what must be there for the runs to go on and their models to be had, by digest."""
    needs: dict[str, Need] = {}
    for number, run in sorted(history.runs.items()):
        if number not in history.deleted:
            events = run.stream.only()
            _add(needs, events, kept_blobs(events, freed_rounds(events)), number)
    shelf = Shelf()
    for row, event in history.federation.events:
        try:
            shelf.apply(event, row.time)
        except KeyError:  # of a run without a number: found by the checks of the log
            continue
    _add(needs, history.federation.only(), shelf.blobs(), 0)
    return needs


def _add(
    needs: dict[str, Need], events: Iterable[ev.Event], digests: Iterable[str], run: int
) -> None:
    found = {digest: (size, model) for event in events for digest, size, model in blobs_of(event)}
    for digest in digests:
        size, is_model = found[digest]
        known = needs.setdefault(digest, Need(size, (), is_model))
        if run:
            needs[digest] = replace(known, runs=(*known.runs, run))


class BlobFolder:
    """The blobs of a server that may run: read only.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, digest: str) -> Path:
        """Return where a blob lies, or would lie.

        Raises:
            ModelFormatError: `digest` is not one.
        """
        return self.root / check_digest(digest).partition(":")[2]

    def has(self, digest: str) -> bool:
        """Return whether the blob is here."""
        try:
            return stat.S_ISREG(self.file(digest).lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def path(self, digest: str) -> Path:
        """Return the file of a blob.

        Raises:
            NotFoundError: no such blob.
        """
        if not self.has(digest):
            raise NotFoundError(f"there is no blob {digest}")
        return self.file(digest)

    def digests(self) -> list[str]:
        """Return the digests of all blobs, sorted; none if the folder cannot be read."""
        try:
            return digests_in(self.root) if self.root.is_dir() else []
        except PermissionError:
            return []


class ScratchBlobs(BlobFolder):
    """Reads a server's blobs; what is created is digested in a folder of its own, then dropped.

    Args:
        root: the server's blobs.
        scratch: takes one model file at a time.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        super().__init__(root)
        self._scratch = scratch

    def checked(self, digest: str) -> Path:
        """Return the file of a blob, unchecked: what is made of it tells whether it is damaged.

        Raises:
            NotFoundError: no such blob.
        """
        return self.path(digest)

    def create(self, fill: Callable[[Path], None]) -> ModelRef:
        """Return digest and size of what `fill` writes; nothing is kept."""
        path = temporary_beside(self._scratch / "model")
        try:
            fill(path)
            return ModelRef(*digest_of_file(path))
        finally:
            path.unlink(missing_ok=True)


def pool() -> ThreadPoolExecutor:
    """Return threads for an aggregation, as a server has them."""
    return ThreadPoolExecutor(2, thread_name_prefix="aggregate")
