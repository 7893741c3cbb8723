"""`fl_state verify`: everything that must hold of a state, stopped or running."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from flplatform.core.errors import ConfigError, DataLossError, NotFoundError
from flplatform.server.upkeep.files import (
    check_audit,
    check_blobs,
    check_digests,
    check_files,
    list_unneeded,
    missing_blobs,
    submissions_in,
)
from flplatform.server.upkeep.findings import RESTORE, Finding, note
from flplatform.server.upkeep.history import History
from flplatform.server.upkeep.log_head import IF_MEANT, LOG_HEAD, LogHead
from flplatform.server.upkeep.log_id import ADVICE, LOG_ID, OwnLog
from flplatform.server.upkeep.orders import check_orders
from flplatform.server.upkeep.place import AUDIT, Place, history_of, needs_of
from flplatform.server.upkeep.streams import Stored
from flplatform.server.upkeep.unfinished import MARKER, told_of
from flplatform.store.snapshot import Snapshot

DATABASE = "I1 database"
OWN_LOG = "own log"
_OTHER_LOG = (
    "the server has written its events elsewhere (another state_url, another database or schema), "
    "or they are lost: restore a backup; only if nothing was ever accepted all is well"
)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, and how much was looked at.

    Attributes:
        deep: whether all bytes of the blobs were read; else their sizes alone were looked at.
    """

    findings: tuple[Finding, ...]
    runs: int = 0
    events: int = 0
    blobs: int = 0
    audit_records: int = 0
    deep: bool = False

    @property
    def problems(self) -> list[Finding]:
        """What is wrong."""
        return [each for each in self.findings if each.problem]

    @property
    def notes(self) -> list[Finding]:
        """What is good to know."""
        return [each for each in self.findings if not each.problem]


def verify_state(place: Place, deep: bool = False) -> Report:
    """Check log, blobs, files and audit.

    Args:
        place: the state.
        deep: compute the digests of all blobs and read the headers of all models too.

    Raises:
        FLError: the log cannot be opened.
    """
    findings = [*_unfinished(place)]
    try:
        with place.snapshot() as log:
            findings += [Finding(log.name, DATABASE, line, RESTORE) for line in log.damage(deep)]
            history = history_of(log)
            findings += check_own_log(place, log)
        findings += check_log_head(place)
    except DataLossError as error:
        finding = Finding("event log", DATABASE, error.message, error.hint or RESTORE)
        return _without_log(place, (*findings, finding), deep)
    except NotFoundError as error:
        if findings:
            return Report(tuple(findings))
        if lost := [*check_state_folder(place)]:
            return Report(tuple(lost))
        if not (beside := _what_a_log_would_know(place)):
            raise
        finding = Finding("event log", DATABASE, f"{error.message}, but {beside}", _OTHER_LOG)
        return _without_log(place, (finding,), deep)
    findings += history.findings
    findings += check_emptiness(place, history)
    findings += check_orders(history)
    needs = needs_of(history)
    found, missing = check_blobs(place.blobs, needs, deep)
    findings += found
    findings += missing_blobs(place.lost(missing, needs), needs)
    findings += list_unneeded(place.blobs, needs)
    findings += check_files(place)
    head, problems = check_audit(place)
    return Report(
        (*findings, *problems), len(history.runs), history.count, len(needs), head.seq, deep
    )


def check_emptiness(place: Place, history: History) -> Iterable[Finding]:
    """Find a log without an event beside what only comes to be with events."""
    if history.is_empty and (beside := _what_a_log_would_know(place)):
        yield Finding("event log", DATABASE, f"it is empty, but {beside}", _OTHER_LOG)


def check_state_folder(place: Place) -> Iterable[Finding]:
    """Find the empty state folder of a kit whose server has worked before."""
    own = OwnLog.of(place)
    try:
        if why := own.why_lost():
            yield Finding(place.folder.name, OWN_LOG, why, own.how_to_find())
    except ConfigError as error:
        yield Finding(LOG_ID, OWN_LOG, error.message, error.hint)


def check_own_log(place: Place, log: Snapshot) -> Iterable[Finding]:
    """Find a log that is not the one that the state folder belongs to."""
    if lost := [*check_state_folder(place)]:
        yield from lost
        return
    own, is_empty = OwnLog.of(place), not log.streams()
    try:
        if is_empty and not own.id:
            return  # `check_emptiness` says what there is to say
        if log.origin and not own.id:
            text = f"it is missing; {log.name} carries the id {log.origin}"
            advice = "if that is the log of this state folder all is well: the next start writes it"
            yield note(f"{place.folder.name}/{LOG_ID}", OWN_LOG, text, advice)
        why = own.why_another(log.name, log.origin, is_empty)
    except ConfigError as error:
        yield Finding(f"{place.folder.name}/{LOG_ID}", OWN_LOG, error.message, error.hint)
        return
    except OSError as error:
        yield Finding(f"{place.folder.name}/{LOG_ID}", OWN_LOG, f"cannot be read: {error.strerror}")
        return
    if why:
        yield Finding("event log", OWN_LOG, why, ADVICE)


def check_log_head(place: Place) -> Iterable[Finding]:
    """Find a log that ends before the event that was stored last.

    Raises:
        FLError: the log cannot be read.
    """
    with ExitStack() as stack:

        def read(stream: str) -> Iterable[Stored]:  # after the file: a server may be at work
            return stack.enter_context(place.snapshot()).scan(stream)

        if why := LogHead(place.folder).why_behind("the event log", read):
            yield Finding(f"{place.folder.name}/{LOG_HEAD}", OWN_LOG, why, IF_MEANT)


def _what_a_log_would_know(place: Place) -> str:
    """Return what there is that comes to be with events; empty if there is nothing.

    Other records of the audit, as of sign-ins, are there before the first event.
    """
    blobs, submissions = len(place.blobs.digests()), submissions_in(place.folder / AUDIT)
    found = [f"there are {blobs} blobs"] if blobs else []
    if submissions:
        found.append(f"the audit tells of {submissions} submissions")
    return " and ".join(found)


def _unfinished(place: Place) -> Iterable[Finding]:
    if told := told_of(place.kit.folder):
        yield Finding(MARKER, "whole restore", told, "no server starts yet")


def _without_log(place: Place, findings: Iterable[Finding], deep: bool) -> Report:
    """Check what can be checked without a log, which alone knows what sizes blobs have."""
    digests = place.blobs.digests() if deep else []
    found = [*findings, *check_files(place), *check_digests(place.blobs, digests)]
    head, problems = check_audit(place)
    return Report((*found, *problems), blobs=len(digests), audit_records=head.seq, deep=deep)
