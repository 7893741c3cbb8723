"""May they? Pure functions; what no rule allows is refused.

Two policies speak. The *roles* (role x command or category -> conditions) hold on the server and
again at every site; a *site's own policy* narrows them there. Conditions are alternatives:

    any | none | o:site | o:submitter | n:submitter | n:NAME | o:ORGANISATION | r:ROLE
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from flplatform.core.config import Role, ServerPolicy, SitePolicy, parse_yaml
from flplatform.core.errors import ConfigError, PermissionDeniedError
from flplatform.security.identity import Identity

Permission = Literal["train", "operate", "view", "validate", "shell", "files", "byoc"]
PERMISSIONS: tuple[Permission, ...] = get_args(Permission)
ROLES: tuple[Role, ...] = get_args(Role)
Conditions = tuple[str, ...]
Rules = Mapping[Role, Mapping[str, Conditions]]

_ALL: dict[str, Conditions] = dict.fromkeys(PERMISSIONS, ("any",))
DEFAULT_RULES: Rules = {
    "project_admin": _ALL,
    "org_admin": {
        "train": ("o:submitter",),
        "submit_job": ("none",),
        "operate": ("o:site",),
        "view": ("any",),
        "validate": ("any",),
        "shell": ("o:site",),
        "files": ("o:submitter",),
    },
    "lead": {
        "train": ("n:submitter",),
        "revoke": ("none",),
        "operate": ("o:site",),
        "view": ("any",),
        "validate": ("any",),
        "shell": ("o:site",),
        "files": ("n:submitter",),
        "byoc": ("any",),
    },
    "member": {"view": ("any",)},
}


@dataclass(frozen=True, slots=True)
class Request:
    """Who wants what, where.

    Attributes:
        actor: whom the certificate names, on a site the signer of the order.
        command: the console verb, or `byoc`.
        permission: the category the command declares.
        site_organisation: organisation of the host that would act (the server's, for itself).
        submitter: name of the run's submitter; of a new submission, the actor.
        submitter_organisation: theirs.
    """

    actor: Identity
    command: str
    permission: Permission
    site_organisation: str = ""
    submitter: str = ""
    submitter_organisation: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether, and by which rule."""

    allowed: bool
    rule: str


def holds(condition: str, request: Request) -> bool:
    """Return whether one condition is true of the request; an unknown one never is."""
    actor = request.actor
    match condition:
        case "any":
            return True
        case "o:site":
            return bool(actor.organisation) and actor.organisation == request.site_organisation
        case "o:submitter":
            return bool(actor.organisation) and actor.organisation == request.submitter_organisation
        case "n:submitter":
            return bool(actor.name) and actor.name == request.submitter
    prefix, _, value = condition.partition(":")
    claims = {"n": actor.name, "o": actor.organisation, "r": actor.role}
    return bool(value) and claims.get(prefix) == value


def decide(rules: Rules, request: Request) -> Decision:
    """Decide by role: the command's own entry if there is one, else its category's."""
    role = request.actor.role
    entries = rules.get(role, {}) if role else {}
    key = request.command if request.command in entries else request.permission
    return _judge(f"role {role or request.actor.kind}: {key}", entries.get(key), request)


def decide_at_site(policy: SitePolicy, request: Request, rules: Rules = DEFAULT_RULES) -> Decision:
    """Decide at a site: the roles first, then the site's own `commands`.

    There a command beats its category, which beats `*`.
    """
    decision = decide(rules, request)
    if not decision.allowed:
        return decision
    keys = (request.command, request.permission, "*")
    key = next((key for key in keys if key in policy.commands), "*")
    return _judge(f"policy commands: {key}", policy.commands.get(key), request)


def decide_job(
    policy: SitePolicy, request: Request, foreign_code: bool, rules: Rules = DEFAULT_RULES
) -> Decision:
    """Decide at a site whether a submission may run: submitter, and code that came with it."""
    decision = decide(rules, request)
    if decision.allowed:
        decision = _judge("policy submitters", policy.submitters, request)
    if decision.allowed and foreign_code:
        decision = decide(rules, _as_byoc(request))
        if decision.allowed:
            decision = _judge("policy byoc", policy.byoc, request)
    return decision


def decide_validation(
    policy: SitePolicy,
    request: Request,
    author: Identity,
    foreign_code: bool,
    rules: Rules = DEFAULT_RULES,
) -> Decision:
    """Decide at a site whether a run's models may be validated there, by that run's own code.

    The policy's own entry for `validate` decides. A policy without one takes it for a
    submission: then its `submitters` count, too. Code needs the right of its author.
    """
    decision = decide_at_site(policy, request, rules)
    if "validate" not in policy.commands:
        for actor in (request.actor, author):
            if decision.allowed:
                whose = replace(request, actor=actor)
                decision = _judge("policy submitters", policy.submitters, whose)
    if decision.allowed and foreign_code:
        code = _as_byoc(replace(request, actor=author))
        decision = decide(rules, code)
        if decision.allowed:
            decision = _judge("policy byoc", policy.byoc, code)
    return decision


def decide_dataset(name: str, allow: Conditions, request: Request) -> Decision:
    """Decide at a site whether the submitter may use a dataset."""
    return _judge(f"dataset {name}: allow", allow, request)


def demand(decision: Decision, request: Request) -> None:
    """Turn a refusal into an error.

    Raises:
        PermissionDeniedError: with the rule.
    """
    if not decision.allowed:
        raise PermissionDeniedError(
            f"{request.actor.name} may not {request.command}", rule=decision.rule
        )


def _as_byoc(request: Request) -> Request:
    return Request(
        actor=request.actor,
        command="byoc",
        permission="byoc",
        site_organisation=request.site_organisation,
        submitter=request.submitter,
        submitter_organisation=request.submitter_organisation,
    )


def _judge(where: str, conditions: Conditions | None, request: Request) -> Decision:
    if conditions is None:
        return Decision(False, f"{where} is not granted")
    allowed = any(holds(condition, request) for condition in conditions)
    return Decision(allowed, f"{where} = {', '.join(conditions) or 'none'}")


# ----------------------------------------------------------------------------------- policies


def rules_of(policy: ServerPolicy) -> Rules:
    """Return the defaults with the roles that the policy states put in their place."""
    return {**DEFAULT_RULES, **policy.roles}


def parse_server_policy(text: str, source: str, commands: Collection[str]) -> ServerPolicy:
    """Parse a server's `local/policy.yml`; `commands` are the verbs that exist.

    Raises:
        ConfigError: every problem, an unknown command among them; keep the old policy then.
    """
    policy = parse_yaml(ServerPolicy, text, source)
    keys = [(f"roles.{role}", key) for role, entries in policy.roles.items() for key in entries]
    _check_keys(keys, source, {*commands, *PERMISSIONS})
    return policy


def parse_site_policy(text: str, source: str, commands: Collection[str]) -> SitePolicy:
    """Parse a site's `local/policy.yml`; `commands` are the verbs that exist.

    Raises:
        ConfigError: every problem, an unknown command among them; keep the old policy then.
    """
    policy = parse_yaml(SitePolicy, text, source)
    _check_keys(
        [("commands", key) for key in policy.commands], source, {*commands, *PERMISSIONS, "*"}
    )
    return policy


def _check_keys(keys: list[tuple[str, str]], source: str, known: set[str]) -> None:
    problems = tuple(
        f"{source}: {where}.{key}: no such command or permission"
        for where, key in keys
        if key not in known
    )
    if problems:
        hint = f"permissions: {', '.join(PERMISSIONS)}"
        raise ConfigError(f"{source} names what does not exist", problems=problems, hint=hint)
