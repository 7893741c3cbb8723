"""What hosts have, run and allow: `report_resources`, `report_version`, `policy`."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flplatform.admin.modules.hosts import Cells, Hosts, write_row
from flplatform.admin.rights import Rights
from flplatform.admin.targets import GRAMMAR, TargetArguments
from flplatform.files.inventory import PACKAGES, resources, versions
from flplatform.hci import CommandSpec, Connection, argument
from flplatform.security.authz import DEFAULT_RULES

MAX_ITEMS = 200
"""Lines of one site's policy that a table shows."""

REPLY_S = 8.0
"""How long a site may take: it asks its GPUs' driver."""


@dataclass(frozen=True)
class PolicyArguments:
    """Of `policy`."""

    words: tuple[str, ...] = argument(
        help=f"{GRAMMAR}; default all", complete="target", metavar="TARGET", rest=True, default=()
    )

    def __post_init__(self) -> None:
        if self.words:
            TargetArguments(self.words)

    @property
    def targets(self) -> tuple[str, ...]:
        """The same, `all` if nothing was said."""
        return self.words or ("all",)


class ReportsModule:
    """Facts about hosts.

    Args:
        hosts: asks the sites.
        rights: the server's rules.
        folder: returns the folder whose disk is the server's.
    """

    name = "system"
    summary = "server and sites as machines"

    def __init__(self, hosts: Hosts, rights: Rights, folder: Callable[[], Path]) -> None:
        self._hosts = hosts
        self._rights = rights
        self._folder = folder

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [
            CommandSpec(
                name="report_resources",
                summary="shows processors, memory, disk, GPUs and environments of hosts",
                arguments=TargetArguments,
                handler=self._resources,
                permission="view",
                mutating=False,
                examples=("report_resources all", "report_resources client hospital-a"),
            ),
            CommandSpec(
                name="report_version",
                summary="shows which releases hosts run",
                arguments=TargetArguments,
                handler=self._versions,
                permission="view",
                mutating=False,
                examples=("report_version all",),
            ),
            CommandSpec(
                name="policy",
                summary="shows the policy in force on the server and at sites",
                arguments=PolicyArguments,
                handler=self._policy,
                permission="view",
                mutating=False,
                examples=("policy", "policy server", "policy client hospital-a"),
            ),
        ]

    async def _resources(self, connection: Connection, args: TargetArguments) -> None:
        await self._report(
            connection, args, "resources", lambda: resources(self._folder()), _resource_cells
        )

    async def _versions(self, connection: Connection, args: TargetArguments) -> None:
        await self._report(connection, args, "versions", versions, _version_cells)

    async def _report(
        self,
        connection: Connection,
        args: TargetArguments,
        name: str,
        own: Callable[[], Mapping[str, Any]],
        show: Callable[[Mapping[str, Any]], Cells],
    ) -> None:
        targets = await self._hosts.admit(connection, args.targets, "view")
        asking = asyncio.create_task(self._hosts.ask(targets.sites, timeout_s=REPLY_S))
        found: dict[str, Any] = {}
        try:
            if targets.server:
                found["server"] = dict(await asyncio.to_thread(own))
                await connection.row("server", show(found["server"]))
            replies = await asking
        finally:
            asking.cancel()
        for site, reply in replies.items():
            ok = reply.status == "ok"
            await write_row(connection, site, reply, show(reply.body) if ok else None)
            if ok:
                found[site] = dict(reply.body)
        await connection.data(name, found)

    async def _policy(self, connection: Connection, args: PolicyArguments) -> None:
        targets = await self._hosts.admit(connection, args.targets, "view")
        found: dict[str, Any] = {}
        if targets.server:
            rules = self._rights.rules
            file = str(self._rights.path) if self._rights.path.exists() else "defaults only"
            path = self._rights.path
            short = f"{path.parent.name}/{path.name}" if path.exists() else file
            await connection.row("server", {"file": short})
            found["server"] = {
                "file": file,
                "roles": {
                    role: {key: list(value) for key, value in entries.items()}
                    for role, entries in rules.items()
                },
            }
        replies = await self._hosts.ask(targets.sites)
        for site, reply in replies.items():
            ok = reply.status == "ok"
            await write_row(connection, site, reply, _policy_cells(reply.body) if ok else None)
            if ok:
                found[site] = dict(reply.body)
        if targets.server:
            rows = [
                [role, key, ", ".join(value) or "none", _origin(role, entries)]
                for role, entries in self._rights.rules.items()
                for key, value in entries.items()
            ]
            await connection.text("roles on the server")
            await connection.table("server roles", ("role", "right", "who", "from"), rows)
        alike: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
        for site, reply in replies.items():
            if reply.status == "ok":
                lines = tuple(_policy_lines(reply.body)[:MAX_ITEMS])
                alike.setdefault(lines, []).append(site)
        for lines, sites in alike.items():
            name = f"policy of {', '.join(sites)}"
            await connection.text(name)
            await connection.table(name, ("rule", "name", "who"), lines)
        await connection.data("policy", found)


def _origin(role: str, entries: Mapping[str, Any]) -> str:
    defaults: Mapping[str, Any] = {str(key): value for key, value in DEFAULT_RULES.items()}
    return "default" if defaults.get(role) == entries else "policy.yml"


def _resource_cells(body: Mapping[str, Any]) -> Cells:
    gpus, environments = body.get("gpus"), body.get("environments")
    names = [str(gpu.get("name"))[:40] for gpu in _dicts(gpus)]
    used = [
        f"{name} {each.get('in_use')}/{each.get('max_runs')}"
        for name, each in _items(environments)
        if isinstance(each, dict)
    ]
    return {
        "cpus": _number(body.get("cpus")),
        "memory_free_bytes": _number(body.get("memory_free_bytes")),
        "memory_bytes": _number(body.get("memory_bytes")),
        "disk_free_bytes": _number(body.get("disk_free_bytes")),
        "disk_bytes": _number(body.get("disk_bytes")),
        "gpus": f"{len(names)} {', '.join(sorted(set(names)))}"[:120].strip() if names else "none",
        "environments": ", ".join(used)[:200] or None,
        "isolation": _text(body.get("isolation")),
    }


def _version_cells(body: Mapping[str, Any]) -> Cells:
    names = ("flplatform", "python", *(name.removesuffix("io") for name in PACKAGES), "os")
    return {name: _text(body.get(name)) for name in names}


def _policy_cells(body: Mapping[str, Any]) -> Cells:
    level, least = _text(body.get("isolation")), _text(body.get("minimum_isolation"))
    return {
        "isolation": f"{level}, least {least}",
        "byoc": _who(body.get("byoc")),
        "submitters": _who(body.get("submitters")),
        "datasets": len(_items(body.get("datasets"))),
        "filters": len(_strings(body.get("filters"))),
    }


def _policy_lines(body: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    lines = [(rule, "", _who(body.get(rule))) for rule in ("submitters", "byoc")]
    lines += [("command", name[:60], _who(who)) for name, who in _items(body.get("commands"))]
    lines += [("dataset", name[:60], _who(who)) for name, who in _items(body.get("datasets"))]
    lines += [("filter", text[:200], "") for text in _strings(body.get("filters"))]
    lines += [("shell", text[:60], "") for text in _strings(body.get("allowed_shell_cmds"))]
    if body.get("allow_foreign_code_unsandboxed") is True:
        lines.append(("foreign code", "may run without a sandbox", ""))
    if (most := _number(body.get("max_examples"))) is not None:
        lines.append(("max_examples", str(most), ""))
    return lines


def _items(value: object) -> list[tuple[str, Any]]:
    return [(str(k), v) for k, v in value.items()][:MAX_ITEMS] if isinstance(value, dict) else []


def _dicts(value: object) -> list[dict[str, Any]]:
    items = value if isinstance(value, list) else []
    return [item for item in items[:MAX_ITEMS] if isinstance(item, dict)]


def _strings(value: object) -> list[str]:
    return [str(item) for item in value[:MAX_ITEMS]] if isinstance(value, list) else []


def _who(value: object) -> str:
    return ", ".join(_strings(value))[:200] or "none"


def _number(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)[:100]
