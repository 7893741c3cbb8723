"""What server and sites know of themselves: the errors they have logged, and their numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from flplatform.admin.modules.hosts import Cells, Hosts
from flplatform.admin.ports import Control
from flplatform.admin.targets import TargetArguments
from flplatform.hci import CommandSpec, Connection

LEVELS = {"WARNING": "warnings", "ERROR": "errors", "CRITICAL": "critical"}
MAX_ENTRIES = 200
"""Counts, and messages, taken from one host's answer."""


class StatsModule:
    """Errors and numbers of hosts.

    Args:
        control: the server's own.
        hosts: reaches the sites.
    """

    name = "system"
    summary = "server and sites as machines"

    def __init__(self, control: Control, hosts: Hosts) -> None:
        self._control = control
        self._hosts = hosts

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [
            CommandSpec(
                name="show_errors",
                summary="shows the warnings and errors that server and sites have logged",
                arguments=TargetArguments,
                handler=self._show_errors,
                permission="view",
                mutating=False,
                examples=("show_errors all", "show_errors client hospital-a"),
            ),
            CommandSpec(
                name="reset_errors",
                summary="begins to count the logged warnings and errors anew",
                arguments=TargetArguments,
                handler=self._reset_errors,
                permission="operate",
                mutating=True,
                examples=("reset_errors all", "reset_errors server"),
            ),
            CommandSpec(
                name="show_stats",
                summary="shows calls, transfers and tasks of server and sites since their start",
                arguments=TargetArguments,
                handler=self._show_stats,
                permission="view",
                mutating=False,
                examples=("show_stats server", "show_stats all"),
            ),
        ]

    async def _show_errors(self, connection: Connection, args: TargetArguments) -> None:
        targets = await self._hosts.admit(connection, args.targets, "view")
        found: dict[str, dict[str, Any]] = {}
        if targets.server:
            found["server"] = errors_of(self._control.stats.errors())
            await connection.row("server", _error_cells(found["server"]))
        replies = await self._hosts.rows(
            connection, targets.sites, lambda body: _error_cells(errors_of(body))
        )
        found |= {
            site: errors_of(reply.body) for site, reply in replies.items() if reply.status == "ok"
        }
        counts = [
            (host, entry["level"], entry["logger"], entry["count"])
            for host, errors in found.items()
            for entry in errors["counts"]
        ]
        if counts:
            await connection.table("counts", ("target", "level", "logger", "count"), counts)
            last = sorted(
                (entry["at"], host, entry["level"], entry["message"])
                for host, errors in found.items()
                for entry in errors["last"]
            )
            await connection.table("last", ("at", "target", "level", "message"), last)
        await connection.data("errors", found)

    async def _reset_errors(self, connection: Connection, args: TargetArguments) -> None:
        targets = await self._hosts.admit(connection, args.targets, "operate")
        if targets.server:
            await connection.row("server", {"reset": self._control.stats.reset_errors()})
        await self._hosts.rows(
            connection, targets.sites, lambda body: {"reset": _whole(body.get("reset"))}
        )

    async def _show_stats(self, connection: Connection, args: TargetArguments) -> None:
        targets = await self._hosts.admit(connection, args.targets, "view")
        found: dict[str, Any] = {}
        if targets.server:
            stats = self._control.stats.stats()
            found["server"] = dict(stats)
            await connection.row("server", _server_cells(stats))
        replies = await self._hosts.rows(connection, targets.sites, _site_cells)
        found |= {
            site: dict(_site_cells(reply.body))
            for site, reply in replies.items()
            if reply.status == "ok"
        }
        if targets.server:
            await self._show_server(connection, self._control.stats.stats())
        await connection.data("stats", found)

    async def _show_server(self, connection: Connection, stats: Mapping[str, Any]) -> None:
        calls = [
            (key, view["count"], view["p50_s"], view["p99_s"], view["max_s"])
            for key, view in sorted(stats["rpcs"].items())
        ]
        columns = ("call", "count", "p50_ms", "p99_ms", "max_ms")
        rows = [(key, count, *(1000 * value for value in times)) for key, count, *times in calls]
        if rows:
            await connection.table("calls", columns, rows)
        received, sent = stats["received_bytes"], stats["sent_bytes"]
        moved = [
            (peer, received.get(peer, 0), sent.get(peer, 0))
            for peer in sorted(received.keys() | sent.keys())
        ]
        if moved:
            await connection.table("transfers", ("peer", "received_bytes", "sent_bytes"), moved)


def errors_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a host says of its errors; what is malformed is left out.

    Returns:
        `since` (ISO time or None), `counts` and `last`, the latest last.
    """
    counts, last = body.get("counts"), body.get("last")
    return {
        "since": _moment(body.get("since")),
        "counts": [
            {"level": level, "logger": logger, "count": count}
            for level, logger, count in _entries(counts, 3)
            if isinstance(level, str) and isinstance(logger, str) and _whole(count) is not None
        ],
        "last": [
            {"at": _moment(at) or "", "level": level, "logger": logger, "message": message}
            for at, level, logger, message in _entries(last, 4)
            if isinstance(level, str) and isinstance(logger, str) and isinstance(message, str)
        ],
    }


def _entries(value: object, length: int) -> Iterator[list[Any]]:
    for entry in value[:MAX_ENTRIES] if isinstance(value, list) else ():
        if isinstance(entry, list) and len(entry) == length:
            yield [item[:500] if isinstance(item, str) else item for item in entry]


def _error_cells(errors: Mapping[str, Any]) -> Cells:
    cells: dict[str, None | int | str] = dict.fromkeys(LEVELS.values(), 0)
    for entry in errors["counts"]:
        if (name := LEVELS.get(entry["level"])) is not None:
            cells[name] = int(cells[name] or 0) + entry["count"]
    last = errors["last"][-1]["message"] if errors["last"] else None
    return {**cells, "since_at": errors["since"], "last": last and last[:100]}


def _server_cells(stats: Mapping[str, Any]) -> Cells:
    return {
        "up_s": stats["uptime_s"],
        "runs": stats["runs_active"],
        "tasks_done": None,
        "tasks_failed": None,
        "received_bytes": sum(stats["received_bytes"].values()),
        "sent_bytes": sum(stats["sent_bytes"].values()),
        "reconnects": None,
        "requests": stats["requests"],
        "outstanding": stats["requests_outstanding"],
        "appends": stats["appends"],
        "loop_lag_ms": _lag(stats),
    }


def _site_cells(body: Mapping[str, Any]) -> Cells:
    return {
        "up_s": _finite(body.get("uptime_s")),
        "runs": _whole(body.get("runs_active")),
        **{
            name: _whole(body.get(name))
            for name in ("tasks_done", "tasks_failed", "received_bytes", "sent_bytes", "reconnects")
        },
        "requests": None,
        "outstanding": None,
        "appends": None,
        "loop_lag_ms": _lag(body),
    }


def _lag(stats: Mapping[str, Any]) -> float | None:
    lag = stats.get("loop_lag")
    value = _finite(lag.get("p99_s")) if isinstance(lag, Mapping) else None
    return None if value is None else 1000 * value


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _finite(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None  # type: ignore[arg-type]


def _moment(value: object) -> str | None:
    seconds = _finite(value)
    if seconds is None or not 0 <= seconds < 1 << 33:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
