"""Questions to an audit: which records, newest first, within bounds; asked on server and sites."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flplatform.core.strict import Strict
from flplatform.security.audit import newest

MAX_RECORDS = 1000
MAX_SCANNED = 500_000
"""Records that one question looks at."""
MAX_ANSWER_BYTES = 900_000
"""Of the records of one answer as JSON: a site's reply holds 1 MiB."""


class AuditQuestion(Strict):
    """What is looked for; an empty field is not asked for.

    Attributes:
        since: records of this time and later, ISO 8601 with a zone.
        last: at most so many, the newest.
    """

    user: str = ""
    action: str = ""
    decision: str = ""
    order: str = ""
    since: str = ""
    last: Annotated[int, Field(ge=1, le=MAX_RECORDS)] = 50

    def fits(self, record: dict[str, Any]) -> bool:
        """Return whether a record is looked for, but for its time."""
        details = record.get("details")
        order = details.get("order", "") if isinstance(details, dict) else ""
        return (
            self.user in ("", record.get("actor"))
            and self.action in ("", record.get("action"))
            and self.decision in ("", record.get("decision"))
            and (not self.order or str(order).startswith(self.order))
        )


@dataclass(frozen=True, slots=True)
class AuditAnswer:
    """The records found, newest first, and what was not looked at."""

    records: list[dict[str, Any]]
    note: str = ""


def answer(path: Path, question: AuditQuestion) -> AuditAnswer:
    """Search an audit from its end; memory is bounded by the answer, not by the audit.

    Raises:
        DataLossError: a record on the way was changed.
        OSError: it cannot be read.
    """
    since = datetime.fromisoformat(question.since) if question.since else None
    found: list[dict[str, Any]] = []
    size = 0
    for number, record in enumerate(newest(path)):
        if since is not None and datetime.fromisoformat(record["time"]) < since:
            break
        if number >= MAX_SCANNED:
            return AuditAnswer(found, f"only the last {MAX_SCANNED} records were looked at")
        if not question.fits(record):
            continue
        size += len(json.dumps(record))
        if size > MAX_ANSWER_BYTES:
            return AuditAnswer(found, "there are more: narrow the question")
        found.append(record)
        if len(found) >= question.last:
            break
    return AuditAnswer(found)
