"""`audit`: who did what, on the server and at sites, and whether the record of it is whole."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flplatform.admin.modules.hosts import Hosts, write_row
from flplatform.core.errors import DataLossError, FLError, InvalidArgumentError
from flplatform.hci import CommandSpec, Connection, argument
from flplatform.security.audit import Seal, verify
from flplatform.security.audit_query import MAX_RECORDS, AuditQuestion, answer

VERIFY_S = 30.0
"""How long a site may take to check its audit."""

READ_S = 10.0

_OBVIOUS = frozenset({"targets", "sites", "name", "job", "words"})
COLUMNS = ("time_at", "host", "user", "action", "target", "decision", "reason", "order")
MAX_CHARS = 300

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_AGE = re.compile(r"(\d{1,9})\s*(s|min|m|h|d)")


@dataclass(frozen=True)
class AuditArguments:
    """Of `audit`."""

    user: str = argument(help="who did it", option="--user", metavar="NAME", default="")
    site: tuple[str, ...] = argument(
        help="sites whose audit is asked for, besides the server's",
        option="--site",
        complete="site",
        metavar="SITE",
        default=(),
    )
    since: str = argument(
        help="30m, 2h, 7d, or a time as 2024-05-01T12:00+00:00",
        option="--since",
        metavar="TIME",
        default="",
    )
    action: str = argument(help="the command", option="--action", metavar="VERB", default="")
    decision: str = argument(
        help="allowed, denied, refused, failed", option="--decision", default=""
    )
    order: str = argument(
        help="the command's id, or its beginning: one on server and sites",
        option="--order",
        metavar="ID",
        default="",
    )
    last: int = argument(
        help=f"the newest so many of each host, at most {MAX_RECORDS}",
        option="--last",
        metavar="N",
        minimum=1,
        default=50,
    )
    verify: bool = argument(
        help="check that no record was changed, moved or taken away",
        option="--verify",
        default=False,
    )

    @property
    def targets(self) -> tuple[str, ...]:
        """The hosts besides the server, in the grammar of targets."""
        if self.site:
            return ("client", *self.site)
        return ("all",) if self.verify else ("server",)


class AuditModule:
    """The audits of all hosts.

    Args:
        hosts: asks the sites.
        source: returns the server's current audit file, and what checks its checkpoints.
        now: the present, UTC.
    """

    name = "security"
    summary = "who may do what, who did what, and whose word counts"

    def __init__(
        self,
        hosts: Hosts,
        source: Callable[[], tuple[Path, Seal | None]],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._hosts = hosts
        self._source = source
        self._now = now

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="audit",
                summary="shows who did what, or checks that the record of it is whole",
                arguments=AuditArguments,
                handler=self._audit,
                permission="operate",
                mutating=False,
                examples=(
                    "audit --since 2h --user amy@clinic-a.org",
                    "audit --site hospital-a --decision refused",
                    "audit --verify",
                ),
                needs=("operate at a site, for that site's audit",),
            )
        ]

    async def _audit(self, connection: Connection, args: AuditArguments) -> None:
        question = self._question(args)
        targets = await self._hosts.admit(connection, args.targets, "operate")
        server = targets.server
        if args.site:
            server = await self._hosts.admit_server(connection, "operate")
        timeout_s = VERIFY_S if args.verify else READ_S
        asking = asyncio.create_task(
            self._hosts.ask(targets.sites, question.model_dump(), timeout_s)
        )
        found: dict[str, Any] = {}
        try:
            if server:
                await self._own(connection, question if not args.verify else None, found)
            replies = await asking
        finally:
            asking.cancel()
        for site, reply in replies.items():
            if reply.status != "ok":
                await write_row(connection, site, reply)
            elif args.verify:
                found[site] = await _whole(connection, site, reply.body)
            else:
                records = _records(reply.body.get("records"), question.last)
                found[site] = records
                note = str(reply.body.get("note", ""))[:200]
                await connection.row(site, {"records": len(records), "note": note})
        if not args.verify:
            await _table(connection, found)
        await connection.data("audit", found)

    def _question(self, args: AuditArguments) -> AuditQuestion:
        if args.last > MAX_RECORDS:
            raise InvalidArgumentError(f"is {args.last}; at most {MAX_RECORDS}", field="--last")
        return AuditQuestion(
            user=args.user,
            action=args.action,
            decision=args.decision,
            order=args.order,
            since=since(args.since, self._now()),
            last=args.last,
        )

    async def _own(
        self, connection: Connection, question: AuditQuestion | None, found: dict[str, Any]
    ) -> None:
        """Write the server's row; without a question its audit is checked."""
        path, seal = self._source()
        try:
            if question is None:
                head = await asyncio.to_thread(verify, path, seal)
                whole: Mapping[str, Any] = {"records": head.seq, "hash": head.hash}
                found["server"] = await _whole(connection, "server", whole)
                return
            answered = await asyncio.to_thread(answer, path, question)
        except (DataLossError, OSError) as error:
            text = error.message if isinstance(error, FLError) else str(error)
            await connection.row("server", status="error", detail=text)
            return
        found["server"] = answered.records
        await connection.row("server", {"records": len(answered.records), "note": answered.note})


def since(text: str, now: datetime) -> str:
    """Return an age or a time as a time in UTC, ISO 8601.

    Raises:
        InvalidArgumentError: it is neither.
    """
    if not text:
        return ""
    if match := _AGE.fullmatch(text):
        try:
            return (now - timedelta(seconds=int(match[1]) * _UNITS[match[2]])).isoformat()
        except OverflowError:
            raise InvalidArgumentError(f"{text!r} is too long ago", field="--since") from None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgumentError(
            f"{text!r:.40} is neither an age (30m, 2h, 7d) nor a time (2024-05-01T12:00)",
            field="--since",
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).isoformat()


async def _whole(
    connection: Connection, host: str, body: Mapping[str, Any]
) -> dict[str, int | str]:
    records, digest = body.get("records"), str(body.get("hash", ""))[:64]
    count = records if isinstance(records, int) else 0
    await connection.row(host, {"state": "whole", "records": count, "hash": digest[:16]})
    return {"records": count, "hash": digest}


def _records(value: object, last: int) -> list[dict[str, Any]]:
    """Return what a site said as far as it has the shape of records; it is untrusted."""
    items = value if isinstance(value, list) else []
    return [item for item in items[:last] if isinstance(item, dict)]


async def _table(connection: Connection, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    rows = []
    for host, records in found.items():
        for record in records:
            details = record.get("details")
            order = details.get("order", "") if isinstance(details, dict) else ""
            texts = [
                record.get("actor", ""),
                str(record.get("action", "")).rpartition("/")[2],  # of a call its last part
                record.get("target", "") or _arguments(details),
                record.get("decision", ""),
                _reason(record.get("reason", ""), details),
            ]
            moment = str(record.get("time", ""))[:40]
            rows.append([moment, host, *(str(text)[:MAX_CHARS] for text in texts), str(order)[:8]])
    rows.sort(key=lambda row: row[0])
    kept = [  # a column without a word says nothing
        index
        for index, column in enumerate(COLUMNS)
        if column not in ("target", "reason", "order") or any(row[index] for row in rows)
    ]
    if rows:
        columns = [COLUMNS[index] for index in kept]
        table = [[row[index] or None for index in kept] for row in rows]
        await connection.table("records", columns, table)


def _reason(reason: object, details: object) -> str:
    """Return why, and of refusals that were summed up how many there were, and since when."""
    summed = details if isinstance(details, dict) else {}
    times, first = str(summed.get("times", "1")), str(summed.get("first", ""))
    return str(reason) if times == "1" else f"{times[:20]} times since {first[:40]}: {reason}"


def _arguments(details: object) -> str:
    """Say what a command was about: its arguments, but for those that were left out."""
    try:
        given = json.loads(details["arguments"]) if isinstance(details, dict) else {}
    except (KeyError, TypeError, ValueError, RecursionError):
        return ""
    if not isinstance(given, dict):
        return ""
    said = {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in given.items()}
    return " ".join(
        str(value) if key in _OBVIOUS else f"{key}={value}"
        for key, value in said.items()
        if value not in (None, "", False)
    )
