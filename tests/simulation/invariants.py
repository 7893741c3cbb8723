"""What must hold: while a history goes on, and when it is over.

Numbers I1 to I6 are those of docs and threat model: acknowledged is stored; counted at most once;
a model is what its closed round says; rounds never go back; nothing torn is seen; one end each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flplatform.algorithms.recipes import recipe_of
from flplatform.core import events as ev
from flplatform.core.job import JobSpec
from flplatform.core.messages import SUBMIT_MODEL, TRAIN, ModelRef, task_seed
from flplatform.core.ports import Row
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.simulation import models
from tests.simulation.attendance import Attendance
from tests.simulation.disk import Disks
from tests.simulation.steps import Steps
from tests.simulation.validations import check_cell, check_gather, check_matrix, check_source
from tests.simulation.world import World


class Reader:
    """Reads a run's log as somebody who knows the rules and not the program."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.opened: ev.RunOpened | None = None
        self.models: dict[int, str] = {}
        self.state: ev.Blob | None = None
        self.settled: set[str] = set()
        self.deployed: set[str] = set()
        self.quorum = 0
        self.round: ev.RoundOpened | None = None
        self.updates: dict[str, ev.UpdateAccepted] = {}
        self.failed: set[str] = set()
        self.gathers: list[ev.GatherOpened] = []
        self.closed: ev.RoundClosed | None = None
        self.ended: ev.RunEnded | None = None

    def read(self, item: ev.Event, blob: Any, wire: Any) -> None:  # noqa: PLR0912 - one case each
        """Take the next event.

        Args:
            item: the event.
            blob: returns the bytes of a digest that is on the server.
            wire: those of one that was once uploaded.

        Raises:
            AssertionError: it must not be there.
        """
        assert self.ended is None, "I6: an event follows the terminal one"
        match item:
            case ev.RunOpened():
                assert self.opened is None, "a run opens once"
                self.opened, self.quorum = item, item.min_clients
                self.models[0] = item.initial_model.digest
                if not item.source_run:
                    self._check_wire(item.wire, item.initial_model, blob)
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
            case ev.GatherOpened():
                check_gather(item, self.opened)
                self.gathers.append(item)
            case ev.UpdateAccepted() | ev.ResultAccepted() | ev.TaskFailed():
                self._settle(item, blob, wire)
            case ev.RoundClosed():
                self._close(item)
            case ev.ModelPublished():
                assert self.closed is not None
                assert item.round == self.closed.round
                made, state = models.combined(self.closed, blob)
                assert item.model.digest == models.ref(made).digest, "I3: another model"
                named = models.ref(state).digest if state else ""
                self.state = item.optimizer_state
                assert (self.state.digest if self.state else "") == named, "I3: another state"
                assert blob(item.model.digest) == made
                assert state is None or blob(named) == state
                self._check_wire(item.wire, item.model, blob)
                self.models[item.round] = item.model.digest
                self.round = self.closed = None
            case ev.RunEnded():
                self.ended = item

    def _check_wire(self, wire: ev.Blob | None, made: ev.Blob, blob: Any) -> None:
        """Check that what sites download is the model, as far as its codec can tell."""
        assert self.opened is not None
        codec, whole = self.opened.job.codec_down, blob(made.digest)
        assert (wire is None) == (codec == "none")
        if wire is not None:
            expected = models.decoded(codec, models.encoded(codec, whole))
            assert models.decoded(codec, blob(wire.digest)) == expected, "I3: another wire blob"

    def _check_update(self, item: ev.UpdateAccepted, blob: Any, wire: Any) -> None:
        """Check that an update is what its bytes stand for."""
        assert self.opened is not None
        assert self.round is not None
        job = self.opened.job
        assert bool(item.wire) == (job.codec != "none")
        if item.wire:
            base = blob(self.round.model.digest) if job.updates == "full" else None
            made = models.decoded(job.codec, wire(item.wire), base, job.codec_down)
            assert models.ref(made).digest == item.digest, "I3: not the update that came"

    def _settle(self, item: Any, blob: Any, wire: Any) -> None:
        assert item.task_id not in self.settled, f"I2: {item.task_id} is counted twice"
        self.settled.add(item.task_id)
        if not isinstance(item, ev.TaskFailed) and item.digest:
            assert models.ref(blob(item.digest)).digest == item.digest, "I5: a torn update counts"
        if isinstance(item, ev.ResultAccepted) and not item.digest:
            check_cell(item, self.gathers, blob)
        if f"/{TRAIN}/" not in item.task_id:
            return
        assert self.round is not None
        assert self.closed is None, "an update is accepted after its round has closed"
        assert item.task_id == f"{self.run}/{self.round.round}/{TRAIN}/{item.site}"
        assert item.site in self.round.participants
        if isinstance(item, ev.UpdateAccepted):
            self._check_update(item, blob, wire)
            self.updates[item.site] = item
        else:
            self.failed.add(item.site)

    def _close(self, closed: ev.RoundClosed) -> None:
        assert self.round is not None
        assert self.closed is None
        assert closed.round == self.round.round
        assert closed.base == self.round.model
        assert closed.optimizer_state == self.state
        assert self.opened is not None
        job = self.opened.job
        assert (closed.aggregator, closed.updates) == (job.aggregator.name, job.updates)
        assert closed.optimizer == (job.optimizer.name if job.optimizer else "")
        weight_of = recipe_of(job).aggregator.weight_of
        assert [each.weight for each in closed.contributions] == [
            weight_of(site, update.examples) for site, update in sorted(self.updates.items())
        ]
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
    borrowed = {model.digest for model in opened.source_models.values()}
    kept = {opened.job_blob.digest, opened.initial_model.digest} | (set() if ended else borrowed)
    wire = opened.wire
    for event in events:
        match event:
            case ev.ModelPublished():
                kept.add(event.model.digest)
                wire = event.wire
                if event.optimizer_state and event.round >= oldest - 1:
                    kept.add(event.optimizer_state.digest)
            case ev.GatherOpened():
                kept |= {blob.digest for blob in event.models.values()} - borrowed
            case ev.ResultAccepted() if event.digest:
                kept.add(event.digest)
            case ev.UpdateAccepted() if event.round >= oldest:
                kept.add(event.digest)
    return kept | ({wire.digest} if wire and not ended else set())


def undisturbed(job: JobSpec, initial: bytes, sites: Sequence[str]) -> list[bytes]:
    """Return the models that a reproducible job's rounds publish if nothing goes wrong."""
    states = dict.fromkeys(sites, b"")
    found = [initial]
    recipe, optimizer = recipe_of(job), None
    for number in range(1, job.rounds + 1):
        contributions = []
        base = found[-1]
        received = models.decoded(job.codec_down, models.encoded(job.codec_down, base))
        for site in sorted(sites):
            seed = task_seed(job.seed, number, TRAIN, site)
            update = models.trained(received, seed, site, states[site])
            if job.codec != "none":
                full = job.updates == "full"
                sent = models.encoded(job.codec, update, received if full else None)
                update = models.decoded(job.codec, sent, base if full else None, job.codec_down)
            weight = recipe.aggregator.weight_of(site, 5 + len(site))
            contributions.append((site, weight, update))
            states[site] = models.state_after(states[site], seed)
        made, optimizer = models.combine(recipe, base, contributions, optimizer)
        found.append(made)
    return found


class Watcher:
    """Looks on while a history goes on.

    Attributes:
        violations: what was seen that must not be.
    """

    def __init__(self, world: World, disks: Disks) -> None:
        self.world = world
        self.violations: list[str] = []
        self.server: Any = None
        self.steps = Steps()
        self.attendance = Attendance(world, disks, self.object)
        self._readers: dict[int, Reader] = {}
        self._sent: dict[str, str] = {}
        self._came: dict[str, bytes] = {}
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
            event = self.server.log.events(row.stream)[row.seq - 1]
            if row.stream == ev.FEDERATION:
                if isinstance(event, ev.RunDeleted):
                    self.deleted_runs.add(event.run)
                self._check(f"{row.stream} event {row.seq} {row.type}", self.steps.take, event)
                self.attendance.bar(event)
                continue
            run = int(row.stream.partition("/")[2])
            reader = self._readers.setdefault(run, Reader(run))
            if self.world.tells:
                self.world.note("log", f"run {run} #{row.seq} {_short(event)}")
            self._count(event)
            what = f"run {run} event {row.seq} {row.type}"
            self._check(what, reader.read, event, self._blob, self._came.__getitem__)
            self._check(what, self.attendance.take, run, event)
            if isinstance(event, ev.RunOpened) and event.source_run:
                source = self.server.log.run(event.source_run)
                self._check(what, check_source, event, source, self._blob)

    def _check(self, what: str, check: Any, *args: Any) -> None:
        try:
            check(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, the log must not cause it
            self.object(f"{what}: {error!r}")

    def _count(self, event: ev.Event) -> None:
        match event:
            case ev.UpdateAccepted() if event.wire:
                self.world.count("update decoded")
            case ev.ModelPublished():
                self.world.count("model published")
                if event.optimizer_state:
                    self.world.count("optimiser stepped")
                if event.wire:
                    self.world.count("model encoded")
            case ev.RunOpened() if event.source_run:
                self.world.count("validation opened")
            case ev.ResultAccepted() if not event.digest:
                self.world.count("model measured")

    def deleting(self, digest: str) -> None:
        """See a blob go."""
        self.world.count("blob freed")
        log = self.server.log
        if digest in self.steps.blobs():
            self.object(f"{digest[:20]} is freed although it lies ready")
        for run in log.runs():
            if run not in self.deleted_runs and digest in needed(log.run(run)):
                self.object(f"{digest[:20]} is freed although run {run} needs it")

    def came(self, digest: str, data: bytes) -> None:
        """See an upload come to its end."""
        self._came[digest] = data

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
            and digest in (event.digest, getattr(event, "wire", ""))
            for event in events
        ):
            self.object(f"I1: {request.task_id} is acknowledged and not stored")

    def disk_restarted(self, _host: str) -> None:
        """Check the blobs that a restart of the host has left."""
        for name, node in self.server.blob_files():
            if models.ref(bytes(node.data)).digest != f"blake3:{name}":
                self.object(f"I5: blob {name[:12]} is torn")

    # ---- the end ----

    def final(self, sites: Mapping[str, Any], reproducible: dict[int, list[bytes]]) -> None:
        """Check what is left when all is quiet."""
        log = self.server.log
        federation = log.events(ev.FEDERATION)
        numbers = [event.run for event in federation if isinstance(event, ev.RunNumbered)]
        for stream, rows in log.streams.items():
            if [row.seq for row in rows] != list(range(1, len(rows) + 1)):
                self.object(f"{stream} has gaps")
        for run in numbers:
            reader = self._readers[run]
            if reader.ended is None:
                self.object(f"I6: run {run} has not ended long after the last fault")
                continue
            if run in reproducible:
                self._check_reproducible(run, reader, reproducible[run])
            if reader.ended.status == "finished":
                self._check(f"run {run}", check_matrix, log.run(run), self.world.count)
            elif run in reproducible:
                self.object(f"run {run} {reader.ended.status}: {reader.ended.reason}")
        summarised = {e.run for e in federation if isinstance(e, ev.RunSummarised)}
        if missing := set(numbers) - summarised:
            self.object(f"runs {missing} have no summary")
        self.attendance.final(sites)

    def _check_reproducible(self, run: int, reader: Reader, expected: list[bytes]) -> None:
        assert reader.ended is not None
        for number, data in enumerate(expected):
            if reader.models.get(number) != models.ref(data).digest:
                self.object(f"reproducible run {run}: the model of round {number} is another one")
                return

    def leftovers(self) -> None:
        """Check that nothing is left on the server that no log needs."""
        log = self.server.log
        kept = self.steps.blobs()
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
