"""One row per target, always: who may not be reached, who does not exist, who does not answer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flplatform.admin import units
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.targets import Targets, resolve
from flplatform.core.control import SiteReply, SiteView
from flplatform.core.errors import NotFoundError, PermissionDeniedError
from flplatform.hci import Connection, did_you_mean
from flplatform.security.authz import Permission

REPLY_TIMEOUT_S = 2.0
"""How long a site may take to answer a command."""

ABSENT = frozenset({"away", "stopped", "removed"})
"""States of sites that are not there."""

BARRED = frozenset({"disabled", "revoked"})
"""States of sites that take no part in new runs."""

Cells = Mapping[str, None | bool | int | float | str]


class Hosts:
    """Carries a command to its targets.

    Args:
        control: reaches them.
        rights: decides about each.
        organisation: the server's.
        timeout_s: how long a site may take to answer.
    """

    def __init__(
        self,
        control: Control,
        rights: Rights,
        organisation: str,
        timeout_s: float = REPLY_TIMEOUT_S,
    ) -> None:
        self._control = control
        self._rights = rights
        self._organisation = organisation
        self._timeout_s = timeout_s

    @property
    def organisation(self) -> str:
        """The server's organisation."""
        return self._organisation

    async def admit(
        self,
        connection: Connection,
        words: tuple[str, ...],
        permission: Permission,
        known: Iterable[str] = (),
    ) -> Targets:
        """Write a row for each target that is unknown or refused; return the others.

        Args:
            connection: takes the rows.
            words: the targets, as typed.
            permission: what the command in hand needs at each of them.
            known: sites to know besides those that are registered.
        """
        organisations = dict.fromkeys(known, "")
        organisations |= {site.name: site.organisation for site in self._control.sites()}
        targets = resolve(words, organisations)
        connection.in_order(("server", *(words[1:] or targets.sites)))
        for site in targets.unknown:
            near = did_you_mean(site, organisations)
            await connection.failed(site, NotFoundError(f"site{near and f' ({near})'}"))
        server = targets.server and await self._allowed(
            connection, "server", permission, self._organisation
        )
        allowed = [
            site
            for site in targets.sites
            if await self._allowed(connection, site, permission, organisations[site])
        ]
        return Targets(server, tuple(allowed))

    async def admit_server(self, connection: Connection, permission: Permission) -> bool:
        """Return whether the command in hand may reach the server; write its row if not."""
        return await self._allowed(connection, "server", permission, self._organisation)

    async def ask(
        self,
        sites: Iterable[str],
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, SiteReply]:
        """Relay the command in hand, signed as it came, and return each site's reply.

        Args:
            sites: who is asked.
            body: what the server adds, unsigned.
            timeout_s: how long a site may take; default that of this server. What the session
                has set comes before both.
        """
        command = ordered()
        allowed_s = self._timeout_s if timeout_s is None else timeout_s
        if command.reply_timeout_s is not None:
            allowed_s = command.reply_timeout_s
        return await self._control.ask(
            list(sites),
            command.order.argv[0],
            timeout_s=allowed_s,
            signed=command.signed,
            body=body,
        )

    async def rows(
        self,
        connection: Connection,
        sites: Iterable[str],
        show: Callable[[Mapping[str, Any]], Cells],
    ) -> dict[str, SiteReply]:
        """As `ask`, and write each site's row; `show` picks the cells of an answer."""
        replies = await self.ask(sites)
        for site, reply in replies.items():
            await write_row(connection, site, reply, show(reply.body) if _ok(reply) else None)
        return replies

    async def _allowed(
        self, connection: Connection, host: str, permission: Permission, organisation: str
    ) -> bool:
        command = ordered()
        decision = self._rights.decide_at(
            command.signer, permission, command.order.argv[0], organisation
        )
        if not decision.allowed:
            await connection.failed(host, PermissionDeniedError("refused", rule=decision.rule))
        return decision.allowed


def _ok(reply: SiteReply) -> bool:
    return reply.status == "ok"


async def write_row(
    connection: Connection, site: str, reply: SiteReply, cells: Cells | None = None
) -> None:
    """Write the row of a site that was asked."""
    match reply.status:
        case "ok":
            await connection.row(site, cells)
        case "refused":
            await connection.row(site, cells, status="refused", detail=refusal(reply))
        case "no_reply":
            detail = reply.message.removeprefix("no reply ")
            await connection.row(site, cells, status="no_reply", detail=detail)
        case _:
            await connection.row(site, cells, status="error", detail=reply.message)


def refusal(reply: SiteReply) -> str:
    """Say why a site refuses: the rule and, unless it says the same, the message."""
    if not reply.rule:
        return reply.message
    if reply.rule in reply.message:
        return reply.message
    return f"rule {reply.rule}" + (f": {reply.message}" if reply.message else "")


def absence(site: SiteView | None) -> str:
    """Say why a site cannot be reached: stopped, removed, lost, or not seen yet."""
    if site is None:
        return "has never registered"
    ago = f"{units.seconds(site.last_seen_s)} ago" if site.last_seen_s is not None else ""
    match site.state:
        case "stopped" | "removed":
            return f"{site.state} {ago}".rstrip()
        case "expected":
            return "not back yet since the server's restart"
        case _:
            return f"lost: last heard of {ago}" if ago else "not seen since the server's start"


async def reachable(connection: Connection, control: Control, sites: Iterable[str]) -> list[str]:
    """Write a row for each site that is unknown, disabled or not there; return the others."""
    known = {site.name: site for site in control.sites()}
    found = []
    for name in sites:
        site = known.get(name)
        if site is None:
            near = did_you_mean(name, known)
            await connection.failed(name, NotFoundError(f"site{near and f' ({near})'}"))
        elif site.state in BARRED:
            await connection.row(name, status="refused", detail=f"{site.state} on the server")
        elif site.state in ABSENT:
            await connection.row(name, status="no_reply", detail=f"({absence(site)})")
        else:
            found.append(name)
    return found


def training_at(sites: Iterable[SiteView]) -> str:
    """Say which of these sites are busy in a run, for questions; empty if none is."""
    busy = [
        f"{site.name} works on run {run} round {number}"
        for site in sites
        for run, number, phase, _ in site.runs
        if phase not in ("idle", "deployed")
    ]
    return ", ".join(busy)
