"""Who may do what here: the server's policy, held against what a command is about."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.targets import current_run, resolve
from flplatform.core.control import RunView
from flplatform.core.errors import FLError, UnavailableError
from flplatform.hci import SESSION_RIGHT, AdminSession
from flplatform.security.authz import (
    DEFAULT_RULES,
    Decision,
    Permission,
    Request,
    Rules,
    decide,
    demand,
    parse_server_policy,
    rules_of,
)
from flplatform.security.identity import Identity

log = logging.getLogger(__name__)

SUBMIT = "submit_job"
LIST_RUNS = "list_runs"
SUBMITTING = frozenset({SUBMIT, "preflight", "submit", "upload_folder", "stage", "delete_job"})
"""Commands that stand or fall with the right to submit a job of one's own."""


REVOKE = "revoke"
"""The right to `deny`; whose names one may deny, the signed denial itself decides."""


@runtime_checkable
class ForTargets(Protocol):
    """Arguments that name hosts."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Words in the grammar of targets."""


@runtime_checkable
class ForRun(Protocol):
    """Arguments that name a run, or leave it to the session."""

    @property
    def run(self) -> int | None:
        """The run's number; None means the current one."""


@runtime_checkable
class ForFiles(Protocol):
    """Arguments that name files: a run's, or the user's own."""

    @property
    def source_run(self) -> int | None:
        """The run whose files they are; None for the user's own."""


class Rights:
    """The authorizer of the console.

    A command for several hosts passes if it may reach one of them; its handler then asks
    `decide_at` for each.

    Until `load` the roles' defaults hold.

    Args:
        policy: the server's `local/policy.yml`, which need not exist.
        organisation: the server's.
        control: knows runs and sites.
    """

    def __init__(self, policy: Path, organisation: str, control: Control) -> None:
        self._path = policy
        self._organisation = organisation
        self._control = control
        self._commands: Collection[str] = ()
        self._text = ""
        self._rules: Rules = DEFAULT_RULES
        self.allowed_shell_cmds: tuple[str, ...] = ()

    def load(self, commands: Collection[str]) -> None:
        """Read the policy for the first time; `commands` are the verbs that it may name.

        Raises:
            ConfigError: it is wrong.
            OSError: it cannot be read.
        """
        self._commands = commands
        self._text = self._read()
        self._rules = self._parse(self._text)

    def knows(self, command: str) -> bool:
        """Return whether there is such a command."""
        return command in self._commands

    def reload(self) -> None:
        """Take in a changed policy; one with an error is refused whole, the old one stays."""
        try:
            text = self._read()
            if text != self._text:
                self._text = text
                self._rules = self._parse(text)
                log.info("%s was read again", self._path)
        except (FLError, OSError, UnicodeDecodeError) as error:
            log.error("%s was not read again, the old policy stays: %s", self._path, error)

    async def prepare(self, permission: str, args: object) -> None:
        """Have the log at hand of the run that a command is about; `check` says what is wrong.

        Raises:
            UnavailableError: the log cannot be read now: `check` would wait, and all with it.
        """
        try:
            if isinstance(args, ForFiles):
                number = args.source_run
            elif isinstance(args, ForRun):
                number = self._run(permission, args)
            else:
                return
            if number is not None:
                await self._control.load(number)
        except UnavailableError:
            raise
        except FLError:
            return

    def check(self, session: AdminSession, permission: str, command: str, args: object) -> None:
        """Decide about a whole command, see `hci.Authorizer`.

        Raises:
            PermissionDeniedError: with the rule.
            FLError: the command names no run, or one that does not exist.
        """
        del session  # the signature says who asks, the servicer has compared the two
        if permission == SESSION_RIGHT:
            return
        requests = [*self._requests(ordered().signer, cast(Permission, permission), command, args)]
        if not any(decide(self._rules, request).allowed for request in requests):
            demand(decide(self._rules, requests[0]), requests[0])

    def decide_at(
        self, actor: Identity, permission: Permission, command: str, organisation: str
    ) -> Decision:
        """Decide about one host of an organisation."""
        return decide(self._rules, Request(actor, command, permission, organisation))

    @property
    def path(self) -> Path:
        """The policy's file."""
        return self._path

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        return self._rules

    def would(self, request: Request) -> Decision:
        """Decide about somebody's command without anybody asking for it."""
        return decide(self._rules, request)

    def demand_submit(self, actor: Identity) -> None:
        """Refuse who may not submit jobs.

        Raises:
            PermissionDeniedError: with the rule.
        """
        request = self._submission(actor, "train")
        demand(decide(self._rules, request), request)

    def demand_own_files(self, actor: Identity) -> None:
        """Refuse who may not keep files of his or her own on the server.

        Raises:
            PermissionDeniedError: with the rule.
        """
        request = Request(
            actor, "upload_file", "files", self._organisation, actor.name, actor.organisation
        )
        demand(decide(self._rules, request), request)

    def ever(self, actor: Identity, permission: str, command: str) -> bool:
        """Return whether the actor's role may ever carry out a command, somewhere, of some run."""
        if permission == SESSION_RIGHT:
            return True
        entries = self._rules.get(actor.role, {}) if actor.role else {}
        key = cast(Permission, command if command in entries else permission)
        return bool(entries.get(key))

    def demand_on(
        self,
        actor: Identity,
        permission: Permission,
        command: str,
        submitter: str,
        organisation: str,
    ) -> None:
        """Refuse who has no right on what somebody else has submitted.

        Args:
            actor: who asks.
            permission: what the command needs.
            command: the command.
            submitter: whose it is.
            organisation: theirs.

        Raises:
            PermissionDeniedError: with the rule.
        """
        request = Request(actor, command, permission, self._organisation, submitter, organisation)
        demand(decide(self._rules, request), request)

    def may_see(self, actor: Identity, run: RunView) -> bool:
        """Return whether a run may be listed for somebody."""
        whose = run.submitter, run.submitter_organisation
        request = Request(actor, LIST_RUNS, "view", self._organisation, *whose)
        return decide(self._rules, request).allowed

    def may_view(self, actor: Identity) -> bool:
        """Return whether names of sites and numbers of runs may be shown."""
        return self.decide_at(actor, "view", "check_status", self._organisation).allowed

    def _read(self) -> str:
        return self._path.read_text() if self._path.exists() else ""

    def _parse(self, text: str) -> Rules:
        policy = parse_server_policy(text, str(self._path), self._commands)
        self.allowed_shell_cmds = policy.allowed_shell_cmds
        return rules_of(policy)

    def _run(self, permission: str, args: ForRun) -> int:
        return current_run(self._control, args.run, ended=permission in ("view", "validate"))

    def _submission(self, actor: Identity, permission: Permission) -> Request:
        return Request(
            actor, SUBMIT, permission, self._organisation, actor.name, actor.organisation
        )

    def _requests(
        self, actor: Identity, permission: Permission, command: str, args: object
    ) -> Iterator[Request]:
        command = REVOKE if command == "deny" else command
        if command in SUBMITTING:
            yield self._submission(actor, permission)
        elif command == LIST_RUNS:  # one's own runs at least; it asks about each
            whose = actor.name, actor.organisation
            yield Request(actor, command, permission, self._organisation, *whose)
        elif isinstance(args, ForFiles):
            whose = actor.name, actor.organisation
            if args.source_run is not None:
                source = self._control.run(args.source_run)
                whose = source.submitter, source.submitter_organisation
            yield Request(actor, command, permission, self._organisation, *whose)
        elif isinstance(args, ForRun):
            run = self._control.run(self._run(permission, args))
            yield Request(
                actor,
                command,
                permission,
                self._organisation,
                run.submitter,
                run.submitter_organisation,
            )
        elif isinstance(args, ForTargets):
            organisations = {site.name: site.organisation for site in self._control.sites()}
            targets = resolve(args.targets, organisations)
            hosts = [self._organisation] * targets.server
            hosts += [organisations[site] for site in targets.sites]
            # A host that does not exist is nobody's: who has the right at all is told so.
            for organisation in hosts or [actor.organisation]:
                yield Request(actor, command, permission, organisation)
        else:
            yield Request(actor, command, permission, self._organisation)
