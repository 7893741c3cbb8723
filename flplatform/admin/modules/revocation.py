"""`revoke`: a name is denied any part in the federation, at once, by an admin's signed word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.admin import units
from flplatform.admin.modules.hosts import ABSENT, absence, training_at, write_row
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.users import UserStore
from flplatform.core.control import SiteView
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.hci import CommandSpec, Connection, Sessions, argument, did_you_mean

REVOCATION, DENY = "revocation", "deny"
CARRY_S = 3.0
"""How long a site may take to take a denial in."""

KINDS = ("site", "admin")
LASTING = (
    "revoke {name} --undo takes it back; fl_provision revoke {name} makes it last, in every kit"
)


@dataclass(frozen=True)
class RevokeArguments:
    """Of `revoke`."""

    name: str = argument(help="a site or a user", complete="site", metavar="NAME")
    kind: str = argument(
        help="which of the two, if the name alone does not tell",
        option="--kind",
        choices=KINDS,
        default="",
    )
    reason: str = argument(
        help="why; those who are refused read it", option="--reason", metavar="TEXT", default=""
    )
    undo: bool = argument(help="let the name take part again", option="--undo", default=False)

    @property
    def targets(self) -> tuple[str, ...]:
        """Whom it is about, as rights are asked for."""
        return ("client", self.name)


@dataclass(frozen=True)
class RevocationArguments:
    """Of `revocation`."""

    name: str = argument(help="a site or a user", metavar="NAME")
    kind: str = argument(help="site or admin", option="--kind", choices=KINDS, default="")


@dataclass(frozen=True)
class DenyArguments:
    """Of `deny`."""

    name: str = argument(help="a site or a user", metavar="NAME")

    @property
    def targets(self) -> tuple[str, ...]:
        """Whom it is about, as rights are asked for."""
        return ("client", self.name)


class RevocationModule:
    """Denials.

    Args:
        control: takes denials in and carries them.
        sessions: those of who is denied end.
        users: whoever has signed in; None for nobody.
    """

    name = "security"
    summary = "who may do what, who did what, and whose word counts"

    def __init__(self, control: Control, sessions: Sessions, users: UserStore | None) -> None:
        self._control = control
        self._sessions = sessions
        self._users = users

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands; the last two are the console's own."""
        return [
            CommandSpec(
                name="revoke",
                summary="denies a site or a user any part in the federation, at once",
                arguments=RevokeArguments,
                handler=_console_only,
                permission="operate",
                mutating=True,
                examples=(
                    "revoke hospital-a --reason 'its machine was stolen'",
                    "revoke amy@clinic-a.org",
                    "revoke --undo hospital-a",
                ),
                states="always; a project_admin undoes it",
                needs=("project_admin, or org_admin for names of the own organisation",),
                local="revoke",
                reauthenticate=True,
            ),
            CommandSpec(
                name=REVOCATION,
                summary="says what a revocation would end",
                arguments=RevocationArguments,
                handler=self._radius,
                permission="view",
                mutating=False,
                examples=("revocation hospital-a",),
            ),
            CommandSpec(
                name=DENY,
                summary="takes in the signed denial that comes with it",
                arguments=DenyArguments,
                handler=self._deny,
                permission="operate",
                mutating=True,
                examples=("deny hospital-a",),
                survives_disconnect=True,
                reauthenticate=True,
            ),
        ]

    # ---- what it would end ----

    async def _radius(self, connection: Connection, args: RevocationArguments) -> None:
        kind, organisation = self._find(args.name, args.kind)
        denial = self._control.access.denied(kind, args.name, organisation)
        ends = self._site_ends(args.name) if kind == "site" else self._user_ends(args.name)
        await connection.data(
            "revocation",
            {
                "name": args.name,
                "kind": kind,
                "organisation": organisation,
                "ends": ends,
                "revoked_by": denial.by if denial else None,
            },
        )

    def _find(self, name: str, kind: str) -> tuple[str, str]:
        """Return kind and organisation of a name; a name never seen needs its kind."""
        sites = {site.name: site.organisation for site in self._control.sites()}
        people = self._people()
        denied = {
            (view.kind, view.name): view.organisation for view in self._control.access.denials()
        }
        found = {
            each: known.get(name, "")
            for each, known in (("site", sites), ("admin", people))
            if name in known or (each, name) in denied
        }
        if kind:
            return kind, found.get(kind, "")
        if len(found) > 1:
            raise InvalidArgumentError(
                f"{name} is a site and a user", field="NAME", hint="add --kind site or --kind admin"
            )
        if not found:
            near = did_you_mean(name, [*sites, *people])
            raise NotFoundError(
                f"{name!r} was never seen here{near and f' ({near})'}",
                hint="add --kind site or --kind admin to revoke it all the same",
            )
        ((kind, organisation),) = found.items()
        return kind, organisation

    def _people(self) -> dict[str, str]:
        known = (
            {user.name: user.organisation for user in self._users.users()} if self._users else {}
        )
        return known | {session.user: session.organisation for session in self._sessions.live()}

    def _site_ends(self, name: str) -> str:
        site = next((each for each in self._control.sites() if each.name == name), None)
        if site is None:
            return "it has never registered"
        runs = [
            f"run {view.run} ({view.name}) loses it, {len(view.targets) - 1} sites are left"
            for view in map(self._control.run, self._control.active_runs())
            if name in view.targets
        ]
        here = absence(site) if site.state in ABSENT else f"it is {site.state}"
        busy = training_at([site])
        return "; ".join([here, *([busy] if busy else []), *(runs or ["no run loses it"])])

    def _user_ends(self, name: str) -> str:
        sessions = sum(session.user == name for session in self._sessions.live())
        runs = [
            f"run {view.run} ({view.name})"
            for view in map(self._control.run, self._control.active_runs())
            if view.submitter == name
        ]
        submitted = (
            f"{', '.join(runs)} of theirs goes on until it is aborted"
            if runs
            else "no run of theirs is active"
        )
        return f"{units.count(sessions, 'session')} of theirs will end; {submitted}"

    # ---- the deed ----

    async def _deny(self, connection: Connection, args: DenyArguments) -> None:
        command = ordered()
        if not command.attachment:
            raise InvalidArgumentError("came without a denial", hint="use revoke")
        self._demand_own(command.signer.role, command.signer.organisation, args.name)
        kind, name, undone = await self._control.access.deny(
            command.attachment, connection.session.user
        )
        state = "undone" if undone else "revoked"
        if kind == "admin" and not undone:
            self._end_sessions(name)
        await connection.row("server", {"state": state})
        sites = [site for site in self._control.sites() if site.state != "revoked"]
        await self._carry(connection, sites, state)
        await connection.data("revocation", {"name": name, "kind": kind, "state": state})
        if not undone:
            await connection.text(LASTING.format(name=name))

    def _demand_own(self, role: str, organisation: str, name: str) -> None:
        """Refuse an org_admin's word about somebody known to be of another organisation.

        Raises:
            PermissionDeniedError: it is.
        """
        if role == "project_admin":
            return
        sites = {site.name: site.organisation for site in self._control.sites()}
        theirs = {known[name] for known in (sites, self._people()) if known.get(name)}
        if theirs and organisation not in theirs:
            raise PermissionDeniedError(
                f"{name} is of {', '.join(sorted(theirs))}", rule="revoke: own organisation"
            )

    def _end_sessions(self, name: str) -> None:
        for session in self._sessions.live():
            if session.user == name and self._control.access.denied(
                "admin", name, session.organisation
            ):
                self._sessions.close(session.id)

    async def _carry(self, connection: Connection, sites: list[SiteView], state: str) -> None:
        """Write a row for each site: it has taken the denial in, or gets it when it registers."""
        there = [site.name for site in sites if site.state not in ABSENT]
        replies = await self._control.access.carry(there, CARRY_S)
        for site in sites:
            if site.name in replies:
                await write_row(connection, site.name, replies[site.name], {"state": state})
            else:
                later = f"({absence(site)}); it is told when it registers"
                await connection.row(site.name, status="no_reply", detail=later)


async def _console_only(_: Connection, __: RevokeArguments) -> None:
    raise FailedPreconditionError("this command belongs to the console, not to the server")
