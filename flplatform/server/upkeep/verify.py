"""`fl_state verify`: everything that must hold of a state, stopped or running."""

from collections.abc import Iterable
from dataclasses import dataclass

from flplatform.core.errors import DataLossError, NotFoundError
from flplatform.server.upkeep.files import (
    BLOB_MISSING,
    check_audit,
    check_blobs,
    check_files,
    list_unneeded,
)
from flplatform.server.upkeep.findings import RESTORE, Finding
from flplatform.server.upkeep.place import Place, history_of, needs_of

DATABASE = "I1 database"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, and how much was looked at."""

    findings: tuple[Finding, ...]
    runs: int = 0
    events: int = 0
    blobs: int = 0
    audit_records: int = 0

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
    findings: list[Finding] = []
    try:
        with place.snapshot() as log:
            findings += [Finding(log.name, DATABASE, line, RESTORE) for line in log.damage(deep)]
            history = history_of(log)
    except DataLossError as error:
        return Report((Finding("event log", DATABASE, str(error)), *_beside_log(place)))
    except NotFoundError as error:
        text = "there is no event log, but there are blobs"
        if not place.blobs.digests():
            raise
        return Report((Finding("event log", DATABASE, f"{text}: {error}"), *_beside_log(place)))
    findings += history.findings
    needs = needs_of(history)
    found = [*check_blobs(place.blobs, needs, deep)]
    if any(each.rule == BLOB_MISSING for each in found):
        # A running server may have freed it since: what is still needed now is really missing.
        now = needs_of(place.history())
        found = [each for each in found if each.rule != BLOB_MISSING] + [
            each for each in check_blobs(place.blobs, now, False) if each.rule == BLOB_MISSING
        ]
    findings += found
    findings += list_unneeded(place.blobs, needs)
    findings += check_files(place)
    head, problems = check_audit(place)
    return Report((*findings, *problems), len(history.runs), history.count, len(needs), head.seq)


def _beside_log(place: Place) -> Iterable[Finding]:
    """Check what can be checked without a log."""
    return [*check_files(place), *check_audit(place)[1]]
