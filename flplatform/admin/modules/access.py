"""Who may do what, who is signed in, and passwords."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flplatform.admin.login import LoginDesk
from flplatform.admin.modules.hosts import Hosts, write_row
from flplatform.admin.modules.submission import HIDDEN
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.rights import SUBMIT, Rights
from flplatform.core.config import Name, PersonName, Role, Strict, parse_json
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.hci import (
    SESSION_RIGHT,
    AdminServer,
    AdminSession,
    CommandSpec,
    Connection,
    ExitCode,
    NoArguments,
    Sessions,
    argument,
    did_you_mean,
)
from flplatform.security.authz import ROLES, Decision, Permission, Request
from flplatform.security.identity import Identity

BYOC: Permission = "byoc"
PROVE, CHANGE = "prove", "change_password"
"""Verbs that carry passwords, never in their words."""


class Who(Strict):
    """Whose rights are asked about."""

    name: PersonName
    role: Role
    organisation: Name


class ProveBody(Strict):
    """What comes with `prove`."""

    password: str


class ChangeBody(Strict):
    """What comes with `change_password`."""

    password: str
    new: str


@dataclass(frozen=True)
class CanArguments:
    """Of `can`."""

    user: str = argument(help="the user's name", metavar="USER")
    command: str = argument(
        help="a command, submit_job, or byoc: a job with code of its own", complete="command"
    )
    sites: tuple[str, ...] = argument(
        help="sites to ask; default all, and the server", complete="site", rest=True, default=()
    )
    role: str = argument(
        help="of a user who has never signed in", option="--role", choices=ROLES, default=""
    )
    org: str = argument(
        help="organisation of a user who has never signed in", option="--org", default=""
    )
    of_run: int | None = argument(
        help="the run it would concern; default one of the user's own",
        option="--run",
        metavar="N",
        complete="run",
        minimum=1,
        default=None,
    )


@dataclass(frozen=True)
class SessionsArguments:
    """Of `sessions`."""

    end: str = argument(help="id of a session to end", option="--end", metavar="ID", default="")


class AccessModule:
    """Rights, sessions and passwords.

    Args:
        control: knows sites and runs.
        rights: the server's rules.
        hosts: asks the sites for theirs.
        sessions: who is signed in.
        login: checks and changes passwords; None where nobody signs in.
        console: returns the server's side of the console, once it is made.
    """

    name = "security"
    summary = "who may do what, who did what, and whose word counts"

    def __init__(
        self,
        control: Control,
        rights: Rights,
        hosts: Hosts,
        sessions: Sessions,
        login: LoginDesk | None,
        console: Callable[[], AdminServer],
    ) -> None:
        self._control = control
        self._rights = rights
        self._hosts = hosts
        self._sessions = sessions
        self._login = login
        self._console = console

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands; the last two are the console's own."""
        return [
            CommandSpec(
                name="can",
                summary="says whether a user may do something on the server and at sites",
                arguments=CanArguments,
                handler=self._can,
                permission="view",
                mutating=False,
                examples=(
                    "can amy@clinic-a.org abort",
                    "can amy@clinic-a.org byoc hospital-a",
                    "can new@clinic-b.org submit_job --role lead --org clinic-b",
                ),
            ),
            CommandSpec(
                name="sessions",
                summary="lists who is signed in, or ends a session",
                arguments=SessionsArguments,
                handler=self._list_sessions,
                permission=SESSION_RIGHT,
                mutating=True,
                examples=("sessions", "sessions --end 5f0c2ab94e77"),
                needs=("the right operate, for other users' sessions",),
                confirm=self._confirm_end,
            ),
            CommandSpec(
                name="passwd",
                summary="changes your passphrase, and with it your password",
                arguments=NoArguments,
                handler=_console_only,
                permission=SESSION_RIGHT,
                mutating=True,
                examples=("passwd",),
                needs=("a terminal",),
                local="passwd",
            ),
            CommandSpec(
                name=PROVE,
                summary="checks the password that comes with it",
                arguments=NoArguments,
                handler=self._prove,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=(PROVE,),
            ),
            CommandSpec(
                name=CHANGE,
                summary="takes in the password that comes with it",
                arguments=NoArguments,
                handler=self._change,
                permission=SESSION_RIGHT,
                mutating=True,
                examples=(CHANGE,),
                survives_disconnect=True,
            ),
        ]

    # ---- can ----

    async def _can(self, connection: Connection, args: CanArguments) -> None:
        command, permission = self._command(args.command)
        actor = self._actor(args)
        if permission is None:
            everybody = Decision(True, "everybody who is signed in")
            await self._show(connection, "server", everybody)
            await self._tell(connection, actor, command, {"server": everybody})
            return
        submitter, organisation = actor.name, actor.organisation
        if args.of_run is not None:
            await self._control.load(args.of_run)
            run = self._control.run(args.of_run)
            submitter, organisation = run.submitter, run.submitter_organisation
        answers: dict[str, Decision] = {
            "server": self._at_server(
                Request(
                    actor,
                    SUBMIT if command == BYOC else command,
                    permission,
                    self._hosts.organisation,
                    submitter,
                    organisation,
                ),
                code=command == BYOC,
            )
        }
        body = Who(name=actor.name, role=_role(actor), organisation=actor.organisation).model_dump()
        body |= {"permission": permission, "submitter": submitter}
        body["submitter_organisation"] = organisation
        targets = await self._hosts.admit(connection, ("client", *args.sites), "view")
        await self._show(connection, "server", answers["server"])
        # The site reads the command in the signed words; an alias there is as good as unknown.
        for site, reply in (await self._hosts.ask(targets.sites, body)).items():
            if reply.status == "ok":
                rule = str(reply.body.get("rule", ""))[:300]
                answers[site] = Decision(reply.body.get("allowed") is True, rule)
                await self._show(connection, site, answers[site])
            else:
                await write_row(connection, site, reply)
        await self._tell(connection, actor, command, answers)

    async def _tell(
        self,
        connection: Connection,
        actor: Identity,
        command: str,
        answers: Mapping[str, Decision],
    ) -> None:
        await connection.data(
            "can",
            {
                "user": actor.name,
                "role": actor.role,
                "organisation": actor.organisation,
                "command": command,
                "hosts": {host: dataclasses.asdict(each) for host, each in answers.items()},
            },
        )
        if not any(each.allowed for each in answers.values()):
            connection.exit_code = ExitCode.REFUSED

    async def _show(self, connection: Connection, host: str, decision: Decision) -> None:
        answer = "allowed" if decision.allowed else "refused"
        await connection.row(host, {"answer": answer, "rule": decision.rule})

    def _at_server(self, request: Request, code: bool) -> Decision:
        actor = request.actor
        if denial := self._control.access.denied("admin", actor.name, actor.organisation):
            return Decision(False, f"revoked by {denial.by}")
        decision = self._rights.would(request)
        if decision.allowed and code:
            return self._rights.would(dataclasses.replace(request, command=BYOC, permission=BYOC))
        return decision

    def _command(self, name: str) -> tuple[str, Permission | None]:
        """Return a command's own name and the right that it needs; None is everybody's.

        Raises:
            InvalidArgumentError: there is none; the hint names the nearest one.
        """
        if name == BYOC:
            return name, "train"
        typed = [v for v in self._console().register.views() if v.name not in HIDDEN]
        views = {key: view for view in typed for key in (view.name, *view.aliases)}
        if name not in views:
            hint = did_you_mean(name, [*views, BYOC]) or "help lists the commands"
            raise InvalidArgumentError(f"unknown command {name!r}", field="COMMAND", hint=hint)
        permission: Any = views[name].permission
        return views[name].name, None if permission == SESSION_RIGHT else permission

    def _actor(self, args: CanArguments) -> Identity:
        """Return a user as the server has seen them, or as the options describe them."""
        seen = [user for user in self._users() if user[0] == args.user]
        role: str = args.role
        organisation = args.org
        if seen:
            role, organisation = role or seen[-1][1], organisation or seen[-1][2]
        if not role or not organisation:
            users = {user[0] for user in self._users()}
            short = {name.partition("@")[0]: name for name in users}
            whole = f"did you mean {short[args.user]}?" if args.user in short else ""
            near = whole or did_you_mean(args.user, users)
            raise NotFoundError(
                f"{args.user!r} has never signed in{near and f' ({near})'}",
                hint="say what they would be: --role ROLE --org ORGANISATION",
            )
        text = json.dumps({"name": args.user, "role": role, "organisation": organisation})
        who = parse_json(Who, text, "can")
        return Identity(
            project=self._control.server().project,
            kind="admin",
            organisation=who.organisation,
            name=who.name,
            role=who.role,
            fingerprint="",
            serial=0,
            not_after=datetime.now(UTC),
        )

    def _users(self) -> list[tuple[str, str, str]]:
        known = self._login.users.users() if self._login else []
        return [
            *((user.name, user.role, user.organisation) for user in known if user.role),
            *((each.user, each.role, each.organisation) for each in self._sessions.live()),
        ]

    # ---- sessions ----

    def _all(self) -> bool:
        """Whether who asks may see and end the sessions of others."""
        return self._rights.decide_at(
            ordered().signer, "operate", "sessions", self._hosts.organisation
        ).allowed

    def _visible(self, asking: str) -> list[AdminSession]:
        everybody = self._all()
        return [each for each in self._sessions.live() if everybody or each.user == asking]

    async def _confirm_end(self, args: SessionsArguments) -> str:
        if not args.end:
            return ""
        session = self._session(args.end)
        count = len(self._console().operations.of(session.id))
        return (
            f"end the session of {session.user} from {session.peer}: "
            f"{count} commands of it are under way. Continue?"
        )

    def _session(self, session_id: str) -> AdminSession:
        """Return a session that who asks may end.

        Raises:
            NotFoundError: there is none; other users' sessions are none without the right.
        """
        mine = {each.id: each for each in self._visible(ordered().signer.name)}
        if session_id not in mine:
            near = did_you_mean(session_id, mine)
            raise NotFoundError(f"there is no session {session_id!r:.40}{near and f' ({near})'}")
        return mine[session_id]

    async def _list_sessions(self, connection: Connection, args: SessionsArguments) -> None:
        if args.end:
            session = self._session(args.end)
            await connection.row(session.id, {"user": session.user, "state": "ended"})
            await connection.data("ended", session.id)
            self._sessions.close(session.id)
            return
        now, operations = self._sessions.clock(), self._console().operations
        found = []
        for session in self._visible(connection.session.user):
            facts: Mapping[str, Any] = {
                "user": session.user,
                "role": session.role,
                "organisation": session.organisation,
                "peer": session.peer.removeprefix("ipv4:").removeprefix("ipv6:"),
                "signed_in_s": round(now - session.created, 1),
                "idle_s": round(now - session.last_used, 1),
                "expires_s": round(self._sessions.expires_s(session), 1),
                "commands": len(operations.of(session.id)),
                "own": session.id == connection.session.id,
            }
            found.append({"id": session.id, **facts})
        # A line has no room for all of it: `--json` has the organisation and the port besides.
        columns = _SESSION if found else ["id"]
        rows = [[_short(key, each) for key in columns] for each in found]
        await connection.table("sessions", columns, rows)
        await connection.data("sessions", found)

    # ---- passwords ----

    async def _prove(self, connection: Connection, _: NoArguments) -> None:
        body = parse_json(ProveBody, ordered().attachment or b"{}", PROVE)
        await self._desk().prove_again(connection.session, ordered().signer, body.password)

    async def _change(self, connection: Connection, _: NoArguments) -> None:
        body = parse_json(ChangeBody, ordered().attachment or b"{}", CHANGE)
        ended = await self._desk().change_password(
            connection.session, ordered().signer, body.password, body.new
        )
        await connection.data("ended_sessions", ended)

    def _desk(self) -> LoginDesk:
        if self._login is None:
            raise PermissionDeniedError("nobody signs in here", rule="login")
        return self._login


_SESSION = ("id", "user", "role", "peer", "signed_in_s", "idle_s", "expires_s", "ops")


def _short(key: str, session: Mapping[str, Any]) -> Any:
    if key == "role":
        return f"{session['role']} of {session['organisation']}"
    if key == "ops":
        return session["commands"]
    if key == "peer":
        return session["peer"].rpartition(":")[0] or session["peer"]
    return session[key]


def _role(actor: Identity) -> Role:
    assert actor.role  # an admin's
    return actor.role


async def _console_only(_: Connection, __: NoArguments) -> None:
    raise FailedPreconditionError("this command belongs to the console, not to the server")
