"""Where a server's state lies, seen from outside; nothing here writes into it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from flplatform.core import events as ev
from flplatform.core.errors import NotFoundError
from flplatform.core.messages import ModelRef
from flplatform.core.model import check_digest
from flplatform.core.ports import Row
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import temporary_beside
from flplatform.files.lock import PROCESS_LOCK, is_held
from flplatform.security.kit import Kit
from flplatform.server.retention import freed_rounds, kept_blobs
from flplatform.server.shelf import Shelf
from flplatform.server.upkeep.history import History, check_log
from flplatform.store.snapshot import Snapshot, snapshot

LOG = "events.db"
BLOBS = "blobs"
AUDIT = "audit.jsonl"
READY = "ready.json"
_NO_MODELS = ("job_blob", "wire")
"""Fields of events whose blobs are no model files: packages, and models as a codec packs them."""


@dataclass(frozen=True)
class Place:
    """A server's kit, its state folder, and what its event log is called.

    Attributes:
        target: path of the SQLite file, or the URL that the operator set.
    """

    kit: Kit
    folder: Path
    target: str | Path

    @classmethod
    def of(cls, kit_folder: Path) -> "Place":
        """Find the state of a server's kit.

        Raises:
            ConfigError: it is not a valid kit of a server.
        """
        kit = Kit.open(kit_folder)
        kit.server  # noqa: B018 - refuses the kit of a site
        folder = kit.state_folder()
        return cls(kit, folder, kit.local.resources.state_url or folder / LOG)

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
        return BlobFolder(self.folder / BLOBS)


def history_of(log: Snapshot) -> History:
    """Read and check a log."""
    streams: dict[str, list[Row]] = {name: log.read(name) for name in log.streams()}
    return check_log(streams)


@dataclass(frozen=True, slots=True)
class Need:
    """A blob that the log needs.

    Attributes:
        size: bytes, as the log says.
        by: the first run that needs it; 0 for what lies staged.
        is_model: whether it is a model file; else a job's package or what a codec made.
    """

    size: int
    by: int
    is_model: bool


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
    found = {digest: (size, model) for event in events for digest, size, model in _blobs(event)}
    for digest in digests:
        size, is_model = found[digest]
        needs.setdefault(digest, Need(size, run, is_model))


def _blobs(value: object, name: str = "") -> Iterator[tuple[str, int, bool]]:
    """Yield digest, size and whether it is a model of everything that an event names."""
    match value:
        case ev.Blob() | ev.UpdateAccepted() | ev.ResultAccepted():
            yield value.digest, value.size, name not in _NO_MODELS
        case BaseModel():
            for field in type(value).model_fields:
                yield from _blobs(getattr(value, field), field)
        case Mapping():
            for each in value.values():
                yield from _blobs(each)
        case tuple():
            for each in value:
                yield from _blobs(each)


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
        return self.file(digest).is_file()

    def path(self, digest: str) -> Path:
        """Return the file of a blob.

        Raises:
            NotFoundError: no such blob.
        """
        if not self.has(digest):
            raise NotFoundError(f"there is no blob {digest}")
        return self.file(digest)

    def digests(self) -> list[str]:
        """Return the digests of all blobs, sorted."""
        if not self.root.is_dir():
            return []
        names = (path.name for path in self.root.iterdir() if path.is_file())
        return sorted(f"blake3:{name}" for name in names if not name.startswith("."))


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
