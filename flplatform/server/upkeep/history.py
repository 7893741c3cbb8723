"""The checks of the log: streams, numbers, and every run replayed step by step. Pure.

The rules are those that decisions keep; here they are tested on what is stored, so that a defect
or a damage is named and not just met.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flplatform.algorithms.workflows import RunState, evolve, replay
from flplatform.core import events as ev
from flplatform.core.errors import FLError
from flplatform.core.messages import TRAIN, TaskId
from flplatform.core.ports import Row
from flplatform.server.upkeep.findings import RESTORE, Finding, note
from flplatform.server.upkeep.streams import Stored, Stream, read_stream

REPLAY = "replay"
ONCE = "I2 accepted once"
CLOSED_SET = "I3 closed set"
PUBLISHED = "I3 published model"
ROUNDS = "I4 round order"
ONE_END = "I6 one end"
NUMBERS = "run numbers"
SUMMARY = "summary"
STREAMS = "streams"

_CANNOT_EVOLVE = (AssertionError, AttributeError, KeyError, TypeError, ValueError, FLError)
"""What `evolve` raises on events that no decision makes in this order."""


@dataclass(frozen=True, slots=True)
class RunHistory:
    """A run's stream and the state that it adds up to; None if it cannot be replayed."""

    run: int
    stream: Stream
    state: RunState | None
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class History:
    """The whole log, read and checked."""

    federation: Stream
    runs: Mapping[int, RunHistory]
    findings: tuple[Finding, ...]
    deleted: frozenset[int] = field(default=frozenset())

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written, not even what cannot be read."""
        return not self.runs and not self.findings and not self.federation.events

    @property
    def count(self) -> int:
        """The number of readable events."""
        return sum(len(run.stream.events) for run in self.runs.values()) + len(
            self.federation.events
        )


def check_log(streams: Mapping[str, Sequence[Stored]]) -> History:
    """Read and check all streams.

    Args:
        streams: rows by stream, in the order of their numbers.
    """
    findings: list[Finding] = []
    federation = read_stream(ev.FEDERATION, streams.get(ev.FEDERATION, ()))
    findings.extend(federation.findings)
    runs: dict[int, RunHistory] = {}
    for name, rows in streams.items():
        kind, _, number = name.partition("/")
        if kind == "run" and number.isdecimal() and name == ev.run_stream(int(number)):
            runs[int(number)] = check_run(int(number), rows)
        elif name != ev.FEDERATION:
            findings.append(Finding(name, STREAMS, "no release writes such a stream"))
    for _, run in sorted(runs.items()):
        findings.extend(run.findings)
    findings.extend(_check_federation(federation, runs))
    deleted = frozenset(
        event.run for event in federation.only() if isinstance(event, ev.RunDeleted)
    )
    return History(federation, runs, tuple(findings), deleted)


# ---- one run ------------------------------------------------------------------------------------


def check_run(run: int, rows: Sequence[Stored]) -> RunHistory:
    """Read, check and replay a run's stream."""
    stream = read_stream(ev.run_stream(run), rows)
    findings = [*stream.findings, *_accepted_twice(stream)]
    state = None
    if stream.whole:
        check = _RunCheck(run, stream.name)
        state = check.play(stream.events)
        findings.extend(check.findings)
    return RunHistory(run, stream, state, tuple(findings))


def _accepted_twice(stream: Stream) -> Iterator[Finding]:
    settled: dict[str, int] = {}
    for row, event in stream.events:
        if isinstance(event, ev.UpdateAccepted | ev.ResultAccepted):
            if before := settled.get(event.task_id):
                text = f"task {event.task_id} was accepted in #{before} already"
                yield Finding(stream.name, ONCE, text, seq=row.seq)
            settled.setdefault(event.task_id, row.seq)


class _RunCheck:
    """Plays a run's events one by one, and looks at each before it is taken in."""

    def __init__(self, run: int, name: str) -> None:
        self.findings: list[Finding] = []
        self._run = run
        self._name = name
        self._seq = 0

    def play(self, events: Sequence[tuple[Row, ev.Event]]) -> RunState | None:
        """Return the state after all events; None if one cannot be taken in."""
        first = events[0][1] if events else None
        if not isinstance(first, ev.RunOpened):
            self._seq = 1
            self._find(REPLAY, "the stream does not begin with RunOpened")
            return None
        self._seq = 1
        if first.run != self._run:
            self._find(NUMBERS, f"RunOpened is of run {first.run}")
        state = replay([first])
        for row, event in events[1:]:
            self._seq = row.seq
            try:
                self._look(state, event)
                state = evolve(state, event)
            except _CANNOT_EVOLVE as error:
                what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                self._find(REPLAY, f"{row.type} does not fit what came before it ({what})")
                return None
        return state

    def _find(self, rule: str, text: str) -> None:
        self.findings.append(Finding(self._name, rule, text, RESTORE, self._seq))

    def _look(self, state: RunState, event: ev.Event) -> None:
        if state.ended:
            self._find(ONE_END, f"{type(event).__name__} after the run has {state.ended.status}")
        match event:
            case ev.RoundOpened():
                self._look_opened(state, event)
            case ev.UpdateAccepted():
                self._look_update(state, event)
            case ev.ResultAccepted() | ev.TaskFailed():
                self._look_task(event.task_id, event.site)
            case ev.RoundClosed():
                self._look_closed(state, event)
            case ev.ModelPublished():
                self._look_published(state, event)

    def _look_opened(self, state: RunState, event: ev.RoundOpened) -> None:
        if event.round != state.round + 1:
            self._find(ROUNDS, f"round {event.round} was opened after round {state.round}")
        if state.open_round is not None:
            number = state.open_round.opened.round
            self._find(ROUNDS, f"round {event.round} was opened before round {number} was over")
        if event.model != state.model:
            self._find(ROUNDS, f"round {event.round} does not start from the latest model")

    def _look_task(self, task_id: str, site: str, number: int | None = None) -> None:
        task = TaskId.parse(task_id)
        found = (task.run, task.site, task.round if number is None else number)
        if found != (self._run, site, task.round) or (number is not None and task.kind != TRAIN):
            self._find(ONCE, f"task {task_id} is not one of {site} in this run and round")

    def _look_update(self, state: RunState, event: ev.UpdateAccepted) -> None:
        self._look_task(event.task_id, event.site, event.round)
        current = state.open_round
        if current is None or current.opened.round != event.round:
            text = f"an update of {event.site} for round {event.round}, which is not open"
            self._find(CLOSED_SET, text)
        elif current.closed:
            text = f"an update of {event.site} after round {event.round} was closed"
            self._find(CLOSED_SET, text)
        elif event.site not in current.opened.participants:
            text = f"{event.site} does not participate in round {event.round}"
            self._find(CLOSED_SET, text)
        elif event.site in current.failed:
            self._find(ONCE, f"task {event.task_id} had failed already")

    def _look_closed(self, state: RunState, event: ev.RoundClosed) -> None:
        current = state.open_round
        if current is None or current.opened.round != event.round or current.closed:
            self._find(ROUNDS, f"round {event.round} was closed, but it is not open")
            return
        accepted = {site: (each.digest, each.size) for site, each in current.accepted.items()}
        named = {each.site: (each.digest, each.size) for each in event.contributions}
        if len(named) != len(event.contributions):
            self._find(CLOSED_SET, f"round {event.round} counts a site more than once")
        for site in sorted(named.keys() - accepted.keys()):
            self._find(CLOSED_SET, f"no update of {site} was accepted in round {event.round}")
        for site in sorted(accepted.keys() - named.keys()):
            self._find(
                CLOSED_SET, f"the accepted update of {site} is not counted in round {event.round}"
            )
        for site in sorted(accepted.keys() & named.keys()):
            if accepted[site] != named[site]:
                text = f"round {event.round} counts {named[site][0]} of {site}, but "
                self._find(CLOSED_SET, f"{text}{accepted[site][0]} was accepted")
        if event.base != current.opened.model:
            self._find(CLOSED_SET, f"round {event.round} was closed with another base model")
        if event.optimizer_state != state.optimizer_state:
            self._find(CLOSED_SET, f"round {event.round} was closed with another optimiser state")

    def _look_published(self, state: RunState, event: ev.ModelPublished) -> None:
        current = state.open_round
        closed = current.closed if current else None
        if closed is None or closed.round != event.round:
            self._find(PUBLISHED, f"a model of round {event.round}, which was not closed before")
        elif bool(closed.optimizer) != (event.optimizer_state is not None):
            what = "lacks" if closed.optimizer else "has"
            self._find(PUBLISHED, f"the model of round {event.round} {what} an optimiser state")


# ---- the federation -----------------------------------------------------------------------------


def _check_federation(stream: Stream, runs: Mapping[int, RunHistory]) -> Iterator[Finding]:
    numbered: dict[int, ev.RunNumbered] = {}
    submissions: dict[str, int] = {}
    reserved: set[int] = set()
    summarised: set[int] = set()
    for row, event in stream.events:
        match event:
            case ev.RunNumbered():
                texts = []
                if event.run in numbered:
                    texts.append(f"number {event.run} was given twice")
                if event.submission_id in submissions:
                    texts.append(
                        f"submission {event.submission_id} became run {event.run}, and run "
                        f"{submissions[event.submission_id]} before"
                    )
                numbered.setdefault(event.run, event)
                submissions.setdefault(event.submission_id, event.run)
                yield from (Finding(stream.name, NUMBERS, text, seq=row.seq) for text in texts)
                yield from _check_opened(stream.name, row.seq, event, runs.get(event.run))
            case ev.RunReserved():
                if event.run in reserved | numbered.keys():
                    text = f"number {event.run} was given twice"
                    yield Finding(stream.name, NUMBERS, text, seq=row.seq)
                reserved.add(event.run)
            case ev.RunSummarised() if event.run in numbered:
                summarised.add(event.run)
                yield from _check_summary(stream.name, row.seq, event, runs.get(event.run))
            case ev.RunPrepared() | ev.RunSummarised() | ev.RunDeleted():
                if event.run not in reserved | numbered.keys():
                    text = f"{row.type} of run {event.run}, which has no number"
                    yield Finding(stream.name, NUMBERS, text, seq=row.seq)
    if stream.whole:
        yield from _check_without_number(runs, numbered)
    yield from _check_without_summary(runs, summarised)


def _check_opened(
    name: str, seq: int, event: ev.RunNumbered, run: RunHistory | None
) -> Iterator[Finding]:
    if run is None:
        yield Finding(name, NUMBERS, f"run {event.run} has a number, but no stream", seq=seq)
        return
    opened = run.stream.events[0][1] if run.stream.events else None
    if isinstance(opened, ev.RunOpened) and (
        (opened.submission_id, opened.job_blob.digest) != (event.submission_id, event.job_digest)
    ):
        yield Finding(
            name, NUMBERS, f"run {event.run} was opened for another submission or job", seq=seq
        )


def _check_summary(
    name: str, seq: int, event: ev.RunSummarised, run: RunHistory | None
) -> Iterator[Finding]:
    state = run.state if run else None
    if state is None:
        return  # said already
    if state.ended is None:
        text = f"run {event.run} was summed up as {event.status}, but its stream has no end"
        yield Finding(name, SUMMARY, text, seq=seq)
        return
    told = (event.status, event.reason, event.round, event.rounds)
    true = (state.ended.status, state.ended.reason, state.round, state.job.rounds)
    if told != true:
        yield Finding(
            name, SUMMARY, f"run {event.run} was summed up as {told}, its stream says {true}",
            seq=seq,
        )  # fmt: skip


def _check_without_number(
    runs: Mapping[int, RunHistory], numbered: Iterable[int]
) -> Iterator[Finding]:
    for number in sorted(runs.keys() - set(numbered)):
        yield Finding(ev.run_stream(number), NUMBERS, "the federation gave no such number")


def _check_without_summary(
    runs: Mapping[int, RunHistory], summarised: set[int]
) -> Iterator[Finding]:
    for number, run in sorted(runs.items()):
        if run.state and run.state.ended and number not in summarised:
            yield note(
                run.stream.name, SUMMARY, "has ended, but is not summed up yet",
                "the server does it at its next start",
            )  # fmt: skip
