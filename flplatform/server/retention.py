"""Which blobs are needed: an update is freed once nothing names it any more."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from flplatform.core import events as ev
from flplatform.core.errors import FLError
from flplatform.core.messages import TaskId
from flplatform.core.ports import BlobStore
from flplatform.files.threads import in_thread

log = logging.getLogger(__name__)

Events = Sequence[ev.Event]


class Retention:
    """Frees blobs by reference from the logs. Lives on the event loop.

    What a site has uploaded for an open task is needed until the task is settled, although no
    log names it yet.

    Args:
        blobs: where they are.
        active: returns the events of each run at work.
        ended: returns the numbers of all other runs.
        read: reads the events of such a run; it blocks, and raises FLError.
        more: returns the digests of what else is needed.
    """

    def __init__(
        self,
        blobs: BlobStore,
        active: Callable[[], Mapping[int, Events]],
        ended: Callable[[], Iterable[int]],
        read: Callable[[int], Events],
        more: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._blobs = blobs
        self._active = active
        self._ended = ended
        self._read = read
        self._more = more
        self._needed: dict[int, frozenset[str]] = {}  # by runs that have ended
        self._reading = asyncio.Lock()
        self._uploads: dict[TaskId, tuple[str, str]] = {}  # digest, and that of what came
        self._begun: set[TaskId] = set()
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, *digests: str) -> Iterator[None]:
        """Keep blobs until a log names them."""
        self._held.update(digests)
        try:
            yield
        finally:
            self._held.subtract(digests)
            self._held += Counter()  # drops the zeros

    # ---- uploads ----

    def begin(self, task_id: TaskId) -> None:
        """Note that an upload for an open task has begun: what it leaves goes with the task."""
        self._begun.add(task_id)

    def uploaded(self, task_id: TaskId, digest: str, came: str = "") -> set[str]:
        """Note a checked upload for a task; return what it takes the place of.

        Args:
            task_id: the task.
            digest: of the model.
            came: digest of the bytes that came, if a codec made them.
        """
        self._begun.discard(task_id)
        before = self._uploads.get(task_id)
        self._uploads[task_id] = digest, came or digest
        return {before[0]} - {digest} if before else set()

    def has_upload(self, task_id: TaskId, came: str) -> bool:
        """Return whether these bytes were uploaded for the task, and their model is still here."""
        return self.upload_of(task_id, came) != ""

    def upload_of(self, task_id: TaskId, came: str) -> str:
        """Return the digest of the model that came as these bytes; empty if it is not here."""
        digest, known = self._uploads.get(task_id, ("", ""))
        return digest if known == came and self._blobs.has(digest) else ""

    def settle(self, run: int, still_open: Collection[str]) -> set[str]:
        """Forget the uploads for tasks of a run that are not open any more; return them."""
        for key in [key for key in self._begun if key.run == run and str(key) not in still_open]:
            self._begun.discard(key)
            try:
                self._blobs.forget(str(key))
            except OSError as error:  # parts of transfers go when they are old
                log.warning("what came of task %s stays for now: %s", key, error)
        over = [key for key in self._uploads if key.run == run and str(key) not in still_open]
        return {self._uploads.pop(key)[0] for key in over}

    # ---- freeing ----

    def forget(self, run: int) -> None:
        """Forget what an ended run needs: it has not ended after all."""
        self._needed.pop(run, None)

    async def free(self, candidates: Collection[str]) -> None:
        """Delete those of `candidates` that nothing needs."""
        try:
            async with self._reading:
                while missing := [run for run in self._ended() if run not in self._needed]:
                    for run in missing:
                        events = await in_thread(self._read, run)
                        self._needed[run] = kept_blobs(events, freed_rounds(events))
        except FLError as error:
            log.warning("no blob is freed, a log cannot be read: %s", error)
            return
        # From here on nothing is awaited, so that no reference can come up meanwhile.
        for deleted in self._needed.keys() - set(self._ended()):
            del self._needed[deleted]
        over = set(candidates) - set(self._more()) - self._held.keys()
        over -= {digest for digest, _ in self._uploads.values()}
        for events in self._active().values():
            over -= kept_blobs(events, freed_rounds(events))
        for needed in self._needed.values():
            over = over - needed  # `-=` would look at each of what a run needs
        for digest in over:
            try:
                if self._blobs.has(digest):
                    self._blobs.delete(digest)
            except OSError as error:
                log.error("blob %s stays for now: %s", digest, error)


def freed_rounds(events: Events) -> int | None:
    """Return up to which round a run's updates are free by its `keep_updates`; None for none."""
    keep, opened, published, ended = "all", 0, 0, False
    for event in events:
        match event:
            case ev.RunOpened():
                keep = event.job.keep_updates
            case ev.RoundOpened():
                opened = event.round
            case ev.ModelPublished():
                published = event.round
            case ev.RunEnded():
                ended = True
    if keep == "last 2":
        return opened - 2
    if keep == "none":
        return opened if ended else published
    return None


def old_updates(events: Events) -> set[str]:
    """Return the digests of updates and optimiser states that are free by `keep_updates`."""
    freed = freed_rounds(events)
    if freed is None:
        return set()
    old = {
        event.digest
        for event in events
        if isinstance(event, ev.UpdateAccepted) and event.round <= freed
    }
    return old | {
        event.optimizer_state.digest
        for event in events
        if isinstance(event, ev.ModelPublished) and event.optimizer_state and event.round < freed
    }


def old_wires(events: Events) -> set[str]:
    """Return the digests of the latest wire blobs; `kept_blobs` says which is still needed."""
    wires = [
        event.wire.digest
        for event in events
        if isinstance(event, ev.RunOpened | ev.ModelPublished) and event.wire
    ]
    return set(wires[-2:])


def kept_blobs(events: Events, freed_rounds: int | None) -> frozenset[str]:
    """Return the digests that a run still needs.

    Args:
        events: the run's events.
        freed_rounds: updates of rounds up to this one are not needed; None keeps all.
    """
    kept: set[str] = set()
    borrowed: frozenset[str] = frozenset()  # of another run, needed until this one has ended
    wire: ev.Blob | None = None  # of the latest model, until the run has ended
    for event in events:
        match event:
            case ev.RunOpened():
                kept |= {event.job_blob.digest, event.initial_model.digest}
                borrowed, wire = source_models(event), event.wire
            case ev.RunEnded():
                borrowed, wire = frozenset(), None
            case ev.ModelPublished():
                kept.add(event.model.digest)
                wire = event.wire
                # The state before the next round: as long as that can be computed again.
                state = event.optimizer_state
                if state and (freed_rounds is None or event.round >= freed_rounds):
                    kept.add(state.digest)
            case ev.GatherOpened():
                kept |= {blob.digest for blob in event.models.values()} - borrowed
            case ev.ResultAccepted() if event.digest:
                kept.add(event.digest)
            case ev.UpdateAccepted() if freed_rounds is None or event.round > freed_rounds:
                kept.add(event.digest)
    return frozenset(kept) | borrowed | ({wire.digest} if wire else set())


def source_models(opened: ev.RunOpened) -> frozenset[str]:
    """Return the digests of another run's models that a run validates."""
    return frozenset(model.digest for model in opened.source_models.values())
