"""What a security officer may ask of a site: its policy, its audit, what it has, whom it admits."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flplatform.client.policy import Policy
from flplatform.client.policy_file import PolicyFile
from flplatform.client.verbs import Asked, Body, SiteVerb, targets
from flplatform.core.config import Isolation, Name, PersonName, Role
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.strict import FromNewer, parse_json
from flplatform.files.inventory import resources, versions
from flplatform.security.audit import Seal, verify
from flplatform.security.audit_query import AuditQuestion, answer
from flplatform.security.authz import Permission, Request
from flplatform.security.identity import Identity
from flplatform.security.kit import Kit


class CanBody(FromNewer):
    """Whose right the server asks about; a hypothetical actor, believed because nothing follows."""

    name: PersonName
    role: Role
    organisation: Name
    permission: Permission
    submitter: str = ""
    submitter_organisation: str = ""


def named_sites(argv: Sequence[str], first: int, options: Sequence[str]) -> list[str]:
    """Return the words after the first positional ones, and those of `--site`.

    Args:
        argv: the command's words.
        first: how many positional words come before names of sites.
        options: the options that take a value.
    """
    positional, sites, words = [], [], iter(argv[1:])
    for word in words:
        name, given, value = word.partition("=")
        if name in options:
            value = value if given else next(words, "")
            if name == "--site":
                sites += value.split(",")
        elif not word.startswith("-"):
            positional.append(word)
    return positional[first:] + sites


def reaches_can(argv: Sequence[str], site: str) -> bool:
    """`can USER COMMAND [SITE…]` means every site, or those named."""
    named = named_sites(argv, 2, ("--role", "--org", "--run"))
    return not named or site in named


def reaches_audit(argv: Sequence[str], site: str) -> bool:
    """`audit --site SITE…` means those named, `audit --verify` alone means every site."""
    options = ("--site", "--user", "--since", "--action", "--decision", "--order", "--last")
    named = named_sites(argv, 0, options)
    return site in named or (not named and "--verify" in argv[1:])


def reaches_policy(argv: Sequence[str], site: str) -> bool:
    """`policy` means every site, `policy TARGET` as everywhere."""
    return len(argv) == 1 or targets(argv, site)


class Officer:
    """Answers for one site.

    Args:
        kit: the site's verified kit.
        policy: judges hypothetical actors.
        policy_file: the policy in force.
        audit: the current file of the site's audit.
        seal: checks the audit's checkpoints.
        isolation: the best level of this host.
        busy: returns how many runs are at work in each environment.
    """

    def __init__(
        self,
        kit: Kit,
        policy: Policy,
        policy_file: PolicyFile,
        audit: Path,
        seal: Seal,
        isolation: Isolation,
        busy: Callable[[], Mapping[str, int]],
    ) -> None:
        self._kit = kit
        self._policy = policy
        self._policy_file = policy_file
        self._audit = audit
        self._seal = seal
        self._isolation = isolation
        self._busy = busy
        self._permissions: dict[str, Permission] = {}

    def verbs(self) -> list[SiteVerb]:
        """Return the verbs."""
        return [
            SiteVerb("can", "view", self._can, reaches=reaches_can),
            SiteVerb("audit", "operate", self._tell_audit, reaches=reaches_audit),
            SiteVerb("policy", "view", self._tell_policy, reaches=reaches_policy),
            SiteVerb("report_resources", "view", self._resources),
            SiteVerb("report_version", "view", self._versions),
        ]

    def know(self, verbs: Sequence[SiteVerb]) -> None:
        """Learn the whole table: what each verb needs here."""
        self._permissions = {verb.name: verb.permission for verb in verbs}

    async def _can(self, asked: Asked) -> Body:
        body = parse_json(CanBody, asked.body, "can")
        if len(asked.order.argv) < 3:
            raise InvalidArgumentError("names no command", field="can")
        user, command = asked.order.argv[1:3]
        if user != body.name:
            raise InvalidArgumentError(f"is about {user!r:.80}, not {body.name!r}", field="can")
        actor = Identity(
            project=self._kit.identity.project,
            kind="admin",
            organisation=body.organisation,
            name=body.name,
            role=body.role,
            fingerprint="",
            serial=0,
            not_after=asked.signer.not_after,
        )
        decision = self._policy.would(
            Request(
                actor=actor,
                command=command,
                permission=self._permissions.get(command, body.permission),
                site_organisation=self._kit.identity.organisation,
                submitter=body.submitter or body.name,
                submitter_organisation=body.submitter_organisation or body.organisation,
            )
        )
        return {"allowed": decision.allowed, "rule": decision.rule}

    async def _tell_audit(self, asked: Asked) -> Body:
        if "--verify" in asked.order.argv[1:]:
            head = await asyncio.to_thread(verify, self._audit, self._seal)
            return {"records": head.seq, "hash": head.hash}
        question = parse_json(AuditQuestion, asked.body, "audit")
        found = await asyncio.to_thread(answer, self._audit, question)
        return {"records": found.records, "note": found.note}

    async def _tell_policy(self, _: Asked) -> Body:
        """Tell rules and names; where datasets lie is nobody's business elsewhere."""
        rules, local = self._policy_file.policy, self._kit.local
        return {
            "minimum_isolation": rules.minimum_isolation,
            "isolation": self._isolation,
            "allow_foreign_code_unsandboxed": rules.allow_foreign_code_unsandboxed,
            "submitters": list(rules.submitters),
            "byoc": list(rules.byoc),
            "commands": {key: list(value) for key, value in rules.commands.items()},
            "datasets": {key: list(each.allow) for key, each in local.datasets.datasets.items()},
            "filters": [_short(item.name, item.args) for item in rules.filters],
            "max_examples": rules.max_examples,
            "allowed_shell_cmds": list(rules.allowed_shell_cmds),
        }

    async def _resources(self, _: Asked) -> Body:
        facts = await asyncio.to_thread(resources, self._kit.state_folder())
        busy = self._busy()
        environments = {
            name: {"max_runs": each.max_runs, "in_use": busy.get(name, 0), "gpus": list(each.gpus)}
            for name, each in self._kit.local.environments.environments.items()
        }
        return {**facts, "isolation": self._isolation, "environments": environments}

    async def _versions(self, _: Asked) -> Body:
        return await asyncio.to_thread(versions)


def _short(name: str, args: Mapping[str, Any]) -> str:
    return f"{name} {json.dumps(dict(args))}"[:200] if args else name
