"""Hosts as machines: what they have left, and their ends."""

from collections.abc import Mapping, Sequence
from typing import Any

from flplatform.admin import units
from flplatform.admin.modules.hosts import Cells, Hosts, training_at
from flplatform.admin.ports import Control
from flplatform.admin.targets import SiteArguments, TargetArguments, resolve
from flplatform.core.errors import NotFoundError
from flplatform.hci import CommandSpec, Connection


class SystemModule:
    """Facts about hosts, and their shutdown.

    Args:
        control: sees and reaches them.
        hosts: resolves targets.
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
                name="sys_info",
                summary="shows processor, memory and disk of server and sites",
                arguments=TargetArguments,
                handler=self._sys_info,
                permission="operate",
                mutating=False,
                examples=("sys_info all", "sys_info client hospital-a"),
            ),
            CommandSpec(
                name="shutdown",
                summary="ends server or sites; runs go on when they are started again",
                arguments=TargetArguments,
                handler=self._shutdown,
                permission="operate",
                mutating=True,
                examples=("shutdown client hospital-a", "shutdown all"),
                confirm=self._confirm_shutdown,
                reauthenticate=True,
            ),
            CommandSpec(
                name="restart",
                summary="ends server or sites and starts them again; runs go on",
                arguments=TargetArguments,
                handler=self._restart,
                permission="operate",
                mutating=True,
                examples=("restart server", "restart client"),
                confirm=self._confirm_restart,
                reauthenticate=True,
                needs=("start.sh at the host: it starts the process again",),
            ),
            CommandSpec(
                name="remove_client",
                summary="drops a site's registration; the site may register again at once",
                arguments=SiteArguments,
                handler=self._remove_client,
                permission="operate",
                mutating=True,
                examples=("remove_client hospital-a",),
                confirm=self._confirm_remove,
            ),
        ]

    async def _sys_info(self, connection: Connection, args: TargetArguments) -> None:
        targets = await self._hosts.admit(connection, args.targets, "operate")
        facts: dict[str, Any] = {}
        if targets.server:
            facts["server"] = dict(self._control.system())
            await connection.row("server", _facts(facts["server"]))
        replies = await self._hosts.rows(connection, targets.sites, _facts)
        facts |= {site: dict(reply.body) for site, reply in replies.items() if reply.body}
        await connection.data("system", facts)

    async def _shutdown(self, connection: Connection, args: TargetArguments) -> None:
        await self._end(connection, args, restart=False)

    async def _restart(self, connection: Connection, args: TargetArguments) -> None:
        await self._end(connection, args, restart=True)

    async def _end(self, connection: Connection, args: TargetArguments, *, restart: bool) -> None:
        """End the sites first: without the server no order reaches them."""
        doing = "restarts" if restart else "shuts down"
        targets = await self._hosts.admit(connection, args.targets, "operate")
        await self._hosts.rows(connection, targets.sites, lambda _: {"state": doing})
        if targets.server:
            await connection.row("server", {"state": doing})
            self._control.stop(restart=restart)

    async def _confirm_shutdown(self, args: TargetArguments) -> str:
        return self._question("shut down", args)

    async def _confirm_restart(self, args: TargetArguments) -> str:
        return self._question("restart", args)

    def _question(self, verb: str, args: TargetArguments) -> str:
        """Name what would be interrupted."""
        sites = {site.name: site for site in self._control.sites()}
        targets = resolve(args.targets, sites)
        hosts = ["the server"] * targets.server
        if targets.sites:
            hosts.append(
                ", ".join(targets.sites)
                if len(targets.sites) < 5
                else units.count(len(targets.sites), "site")
            )
        if not hosts:
            return ""
        radius = []
        if targets.server:
            radius += [
                f"run {run.run} ({run.name}) is {run.status}, round {run.round}/{run.rounds}"
                for run in map(self._control.run, self._control.active_runs())
            ] or ["no run is active"]
        if busy := training_at(sites[name] for name in targets.sites):
            radius.append(busy)
        elif targets.sites:
            radius.append("no site among them is training")
        return f"{verb} {' and '.join(hosts)}: {'; '.join(radius)}. Continue?"

    async def _confirm_remove(self, args: SiteArguments) -> str:
        named = [site for site in self._control.sites() if site.name in args.sites]
        busy = training_at(named)
        return f"remove {', '.join(site.name for site in named)}: {busy}. Continue?" if busy else ""

    async def _remove_client(self, connection: Connection, args: SiteArguments) -> None:
        targets = await self._hosts.admit(connection, args.targets, "operate")
        for site in targets.sites:
            try:
                self._control.remove(site)
            except NotFoundError as error:
                await connection.row(site, status="error", detail=error.message)
            else:
                await connection.row(site, {"state": "removed"})


def _facts(body: Mapping[str, Any]) -> Cells:
    """Pick what a table shows; the rest is in the JSON data."""
    cpus, load = _number(body.get("cpus")), _number(body.get("load"))
    return {
        "host": _text(body.get("host")),
        "cpus": cpus,
        "load": load,
        "memory_free_bytes": _number(body.get("memory_available_bytes")),
        "memory_free_bytes_of": _number(body.get("memory_total_bytes")),
        "disk_free_bytes": _number(body.get("disk_free_bytes")),
        "disk_free_bytes_of": _number(body.get("disk_total_bytes")),
        "up_s": _number(body.get("uptime_s")),
        "python": _text(body.get("python")),
        "version": _text(body.get("version")),
        "isolation": _text(body.get("isolation")),
    }


def _number(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)[:100]
