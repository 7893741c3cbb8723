"""What must hold: while a history goes on, and when it is over.

Numbers I1 to I6 are those of docs and threat model: acknowledged is stored; counted at most once;
a model is what its closed round says; rounds never go back; nothing torn is seen; one end each.
"""

from collections.abc import Sequence
from typing import Any

from flplatform.core import events as ev
from flplatform.core.job import JobSpec
from flplatform.core.messages import SUBMIT_MODEL, TRAIN, ModelRef, task_seed
from flplatform.core.ports import Row
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.simulation import models
from tests.simulation.world import World


class Reader:
    """Reads a run's log as somebody who knows the rules and not the program."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.opened: ev.RunOpened | None = None
        self.models: dict[int, str] = {}
        self.settled: set[str] = set()
        self.deployed: set[str] = set()
        self.quorum = 0
        self.round: ev.RoundOpened | None = None
        self.updates: dict[str, ev.UpdateAccepted] = {}
        self.failed: set[str] = set()
        self.closed: ev.RoundClosed | None = None
        self.ended: ev.RunEnded | None = None

    def read(self, item: ev.Event, blob: Any) -> None:  # noqa: PLR0912 - one case per event
        """Take the next event; `blob` returns the bytes of a digest that is on the server.

        Raises:
            AssertionError: it must not be there.
        """
        assert self.ended is None, "I6: an event follows the terminal one"
        match item:
            case ev.RunOpened():
                assert self.opened is None, "a run opens once"
                self.opened, self.quorum = item, item.min_clients
                self.models[0] = item.initial_model.digest
            case ev.SiteAnswered():
                assert item.site not in self.deployed
                self.deployed |= {item.site} if item.accepted else set()
            case ev.SiteWithdrawn():
                self.deployed.discard(item.site)
            case ev.QuorumSet():
                self.quorum = item.min_clients
            case ev.RoundOpened():
                assert self.round is None, "I4: a round opens while another is open"
                assert item.round == max(self.models) + 1, "I4: rounds follow each other"
                assert item.model.digest == self.models[item.round - 1]
                assert set(item.participants) <= self.deployed
                assert len(item.participants) >= self.quorum
                self.round, self.updates, self.failed = item, {}, set()
            case ev.UpdateAccepted() | ev.ResultAccepted() | ev.TaskFailed():
                self._settle(item, blob)
            case ev.RoundClosed():
                self._close(item)
            case ev.ModelPublished():
                assert self.closed is not None
                assert item.round == self.closed.round
                made = models.ref(models.combined(self.closed, blob)).digest
                assert item.model.digest == made, "I3: the model is not that of its closed round"
                assert blob(item.model.digest)
                self.models[item.round] = item.model.digest
                self.round = self.closed = None
            case ev.RunEnded():
                self.ended = item

    def _settle(self, item: Any, blob: Any) -> None:
        assert item.task_id not in self.settled, f"I2: {item.task_id} is counted twice"
        self.settled.add(item.task_id)
        if not isinstance(item, ev.TaskFailed) and item.digest:
            assert models.ref(blob(item.digest)).digest == item.digest, "I5: a torn update counts"
        if f"/{TRAIN}/" not in item.task_id:
            return
        assert self.round is not None
        assert self.closed is None, "an update is accepted after its round has closed"
        assert item.task_id == f"{self.run}/{self.round.round}/{TRAIN}/{item.site}"
        assert item.site in self.round.participants
        if isinstance(item, ev.UpdateAccepted):
            self.updates[item.site] = item
        else:
            self.failed.add(item.site)

    def _close(self, closed: ev.RoundClosed) -> None:
        assert self.round is not None
        assert self.closed is None
        assert closed.round == self.round.round
        assert closed.base == self.round.model
        assert [(each.site, each.digest) for each in closed.contributions] == [
            (site, update.digest) for site, update in sorted(self.updates.items())
        ], "a closed round names other updates than those that were acknowledged"
        assert len(closed.contributions) >= self.quorum, "a round closes below its quorum"
        self.closed = closed


def needed(events: Sequence[ev.Event]) -> set[str]:
    """Return the digests that a run's log still needs, by its `keep_updates`."""
    opened = next(event for event in events if isinstance(event, ev.RunOpened))
    rounds = max([0, *(e.round for e in events if isinstance(e, ev.RoundOpened))])
    published = max([0, *(e.round for e in events if isinstance(e, ev.ModelPublished))])
    ended = any(isinstance(event, ev.RunEnded) for event in events)
    oldest = {
        "all": 1,
        "last 2": rounds - 1,
        "none": (rounds if ended else published) + 1,
    }[opened.job.keep_updates]
    kept = {opened.job_blob.digest, opened.initial_model.digest}
    for event in events:
        match event:
            case ev.ModelPublished():
                kept.add(event.model.digest)
            case ev.GatherOpened():
                kept |= {blob.digest for blob in event.models.values()}
            case ev.ResultAccepted() if event.digest:
                kept.add(event.digest)
            case ev.UpdateAccepted() if event.round >= oldest:
                kept.add(event.digest)
    return kept


def undisturbed(job: JobSpec, initial: bytes, sites: Sequence[str]) -> list[bytes]:
    """Return the models that a reproducible job's rounds publish if nothing goes wrong."""
    states = dict.fromkeys(sites, b"")
    found = [initial]
    for number in range(1, job.rounds + 1):
        contributions = []
        for site in sorted(sites):
            seed = task_seed(job.seed, number, TRAIN, site)
            contributions.append(
                (5.0 + len(site), models.trained(found[-1], seed, site, states[site]))
            )
            states[site] = models.state_after(states[site], seed)
        found.append(models.mean(contributions))
    return found


class Watcher:
    """Looks on while a history goes on.

    Attributes:
        violations: what was seen that must not be.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.violations: list[str] = []
        self.server: Any = None
        self._readers: dict[int, Reader] = {}
        self._sent: dict[str, str] = {}
        self._bytes: dict[str, bytes] = {}
        self.deleted_runs: set[int] = set()

    def object(self, what: str) -> None:
        """Note a violation."""
        self.world.note("watcher", f"VIOLATION {what}")
        self.violations.append(what)

    def _blob(self, digest: str) -> bytes:
        data: bytes = self.server.read(digest)
        return data

    def stored(self, rows: Sequence[Row]) -> None:
        """See rows become durable."""
        for row in rows:
            if row.stream == ev.FEDERATION:
                event = ev.decode(row.type, row.version, row.body, row.stream)
                if isinstance(event, ev.RunDeleted):
                    self.deleted_runs.add(event.run)
                continue
            run = int(row.stream.partition("/")[2])
            reader = self._readers.setdefault(run, Reader(run))
            event = ev.decode(row.type, row.version, row.body, row.stream)
            self.world.note("log", f"run {run} #{row.seq} {_short(event)}")
            try:
                reader.read(event, self._blob)
            except Exception as error:  # noqa: BLE001 - whatever it is, the log must not cause it
                self.object(f"run {run} event {row.seq} {row.type}: {error!r}")

    def deleting(self, digest: str) -> None:
        """See a blob go."""
        self.world.count("blob freed")
        log = self.server.log
        for run in log.runs():
            if run not in self.deleted_runs and digest in needed(log.run(run)):
                self.object(f"{digest[:20]} is freed although run {run} needs it")

    def submitted(self, site: str, request: pb.SubmitResultRequest) -> None:
        """See a result come in."""
        if request.WhichOneof("outcome") != "result" or not request.result.HasField("blob"):
            return
        digest = request.result.blob.digest
        first = self._sent.setdefault(request.task_id, digest)
        if first != digest:
            self.object(f"{site} answers {request.task_id} by other bytes than before")

    def acknowledged(self, request: pb.SubmitResultRequest, outcome: str) -> None:
        """See a result acknowledged: from now on it must be in the log."""
        self.world.count(f"result {outcome}")
        run = int(request.task_id.partition("/")[0])
        digest = request.result.blob.digest
        events = self.server.log.run(run)
        if not any(
            isinstance(event, ev.UpdateAccepted | ev.ResultAccepted)
            and event.task_id == request.task_id
            and event.digest == digest
            for event in events
        ):
            self.object(f"I1: {request.task_id} is acknowledged and not stored")

    def disk_restarted(self, _host: str) -> None:
        """Check the blobs that a restart of the host has left."""
        for name, node in self.server.blob_files():
            if models.ref(bytes(node.data)).digest != f"blake3:{name}":
                self.object(f"I5: blob {name[:12]} is torn")

    # ---- the end ----

    def final(self, sites: Sequence[Any], reproducible: dict[int, list[bytes]]) -> None:
        """Check what is left when all is quiet."""
        log = self.server.log
        federation = log.events(ev.FEDERATION)
        numbers = [event.run for event in federation if isinstance(event, ev.RunNumbered)]
        if numbers != list(range(1, len(numbers) + 1)):
            self.object(f"runs are numbered {numbers}")
        submissions = [e.submission_id for e in federation if isinstance(e, ev.RunNumbered)]
        if len(set(submissions)) != len(submissions):
            self.object("one submission has become two runs")
        for stream, rows in log.streams.items():
            if [row.seq for row in rows] != list(range(1, len(rows) + 1)):
                self.object(f"{stream} has gaps")
        for run in numbers:
            reader = self._readers[run]
            if reader.ended is None:
                self.object(f"I6: run {run} has not ended long after the last fault")
            elif run in reproducible:
                self._check_reproducible(run, reader, reproducible[run])
        summarised = {e.run for e in federation if isinstance(e, ev.RunSummarised)}
        if missing := set(numbers) - summarised:
            self.object(f"runs {missing} have no summary")
        for site in sites:
            runs = site.program._runs.numbers() if site.program else []
            if runs:
                self.object(f"{site.name} still has runs {runs} that are over")

    def _check_reproducible(self, run: int, reader: Reader, expected: list[bytes]) -> None:
        assert reader.ended is not None
        if reader.ended.status != "finished":
            self.object(f"reproducible run {run} {reader.ended.status}: {reader.ended.reason}")
            return
        for number, data in enumerate(expected):
            if reader.models.get(number) != models.ref(data).digest:
                self.object(f"reproducible run {run}: the model of round {number} is another one")
                return

    def leftovers(self) -> None:
        """Check that nothing is left on the server that no log needs."""
        log = self.server.log
        kept: set[str] = set()
        for run in log.runs():
            if run not in self.deleted_runs:
                kept |= needed(log.run(run))
        found = {f"blake3:{name}" for name, _ in self.server.blob_files()}
        if more := found - kept:
            self.object(f"{len(more)} blobs are kept that nothing needs")
        if lost := kept - found:
            self.object(f"{len(lost)} blobs that logs need are gone")


def _short(event: ev.Event) -> str:
    fields = event.model_dump(exclude={"job", "order", "traceback", "job_blob"})
    text = ", ".join(
        f"{key}={str(value)[:70]}" for key, value in fields.items() if value not in ("", (), {}, [])
    )
    return f"{type(event).__name__}({text})"


__all__ = ["SUBMIT_MODEL", "ModelRef", "Reader", "Watcher", "needed", "undisturbed"]
