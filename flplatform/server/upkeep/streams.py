"""One stream: its rows decoded, its numbers and digests checked. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel

from flplatform.core import events as ev
from flplatform.core.errors import FailedPreconditionError, FLError
from flplatform.core.model import is_digest
from flplatform.core.ports import Row
from flplatform.server.upkeep.findings import RELEASE, Finding
from flplatform.store.snapshot import DamagedRow

READABLE = "readable event"
GAPLESS = "I1 gapless stream"
Stored = Row | DamagedRow

_NO_MODELS = ("job_blob", "wire")
"""Fields of events whose blobs are no model files: packages, and models as a codec packs them."""
_CANNOT_DECODE = (
    AttributeError,
    FLError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What decoding raises on a body that no release wrote."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream as far as it can be read.

    Attributes:
        events: of the readable rows, with the rows.
        whole: whether none is missing or unreadable.
    """

    name: str
    events: tuple[tuple[Row, ev.Event], ...]
    whole: bool
    findings: tuple[Finding, ...]

    def only(self) -> list[ev.Event]:
        """Return the events alone."""
        return [event for _, event in self.events]


def read_stream(name: str, rows: Sequence[Stored]) -> Stream:
    """Decode a stream and check its numbers; a row that cannot be read is a finding."""
    findings: list[Finding] = []
    events: list[tuple[Row, ev.Event]] = []
    expected = 1
    for row in rows:
        if row.seq > expected:
            last = row.seq - 1
            which = f"event {last} is" if last == expected else f"events {expected} to {last} are"
            findings.append(Finding(name, GAPLESS, f"{which} missing", seq=expected))
        expected = max(expected, row.seq + 1)
        event = _decode(name, row)
        if isinstance(event, Finding):
            findings.append(event)
        elif isinstance(row, Row):
            events.append((row, event))
    return Stream(name, tuple(events), not findings, tuple(findings))


def _decode(name: str, row: Stored) -> ev.Event | Finding:
    where = f"{name}#{row.seq}" if row.seq else f"{name}, an event without a number,"
    if isinstance(row, DamagedRow):
        return Finding(name, READABLE, f"{where} {row.text}", seq=row.seq)
    try:
        event = ev.decode(row.type, row.version, row.body, where)
        datetime.fromisoformat(row.time)
    except FailedPreconditionError as error:
        return Finding(name, READABLE, error.message, RELEASE, row.seq)
    except _CANNOT_DECODE as error:
        return Finding(name, READABLE, " ".join(str(error).split()), seq=row.seq)
    for digest in _digests(event):
        if not is_digest(digest):
            text = f"{where} names {digest[:100]!r}, which is no digest"
            return Finding(name, READABLE, text, seq=row.seq)
    return event


def _digests(event: ev.Event) -> Iterator[str]:
    for digest, _, _ in blobs_of(event):
        if digest or not isinstance(event, ev.ResultAccepted):
            yield digest
    match event:
        case ev.UpdateAccepted(wire=str(wire)) if wire:
            yield wire
        case ev.RoundClosed():
            yield from (each.digest for each in event.contributions)


def blobs_of(value: object, name: str = "") -> Iterator[tuple[str, int, bool]]:
    """Yield digest, size and whether it is a model of everything that an event names."""
    match value:
        case ev.Blob() | ev.UpdateAccepted() | ev.ResultAccepted():
            yield value.digest, value.size, name not in _NO_MODELS
        case BaseModel():
            for field in type(value).model_fields:
                yield from blobs_of(getattr(value, field), field)
        case Mapping():
            for each in value.values():
                yield from blobs_of(each)
        case tuple():
            for each in value:
                yield from blobs_of(each)
