from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.config import Role, ServerPolicy, SitePolicy
from flplatform.core.errors import ConfigError, PermissionDeniedError
from flplatform.security.authz import (
    DEFAULT_RULES,
    PERMISSIONS,
    ROLES,
    Permission,
    Request,
    Rules,
    decide,
    decide_at_site,
    decide_dataset,
    decide_job,
    demand,
    holds,
    parse_server_policy,
    parse_site_policy,
    rules_of,
)
from flplatform.security.identity import Identity

COMMANDS = ("abort", "start", "submit_job", "cat")


def person(role: Role, name: str = "amy", organisation: str = "a") -> Identity:
    return Identity("p", "admin", organisation, name, role, "f" * 64, 1, datetime.now(UTC))


def ask(
    role: Role,
    permission: Permission = "train",
    command: str = "abort",
    *,
    site: str = "s",
    submitter: str = "eve",
    of: str = "e",
) -> Request:
    return Request(person(role), command, permission, site, submitter, of)


NAMES, ORGANISATIONS = st.sampled_from(["amy", "bob"]), st.sampled_from(["a", "b", "c"])
CONDITIONS = st.lists(
    st.sampled_from(
        ["any", "none", "o:site", "o:submitter", "n:submitter"]
        + ["n:amy", "n:bob", "o:a", "o:b", "r:lead", "r:member", "x:y", "n:", ""]
    ),
    max_size=3,
).map(tuple)
RULES = st.dictionaries(
    st.sampled_from(ROLES),
    st.dictionaries(st.sampled_from(COMMANDS + PERMISSIONS), CONDITIONS, max_size=4),
)
REQUESTS = st.builds(
    Request,
    st.builds(person, st.sampled_from(ROLES), NAMES, ORGANISATIONS),
    st.sampled_from(COMMANDS),
    st.sampled_from(PERMISSIONS),
    ORGANISATIONS,
    NAMES,
    ORGANISATIONS,
)


def truths_of(request: Request) -> set[str]:
    """Reference: every condition that is true of a request, as a set."""
    actor = request.actor
    truths = {"any", f"n:{actor.name}", f"o:{actor.organisation}", f"r:{actor.role}"}
    if actor.organisation == request.site_organisation:
        truths.add("o:site")
    if actor.organisation == request.submitter_organisation:
        truths.add("o:submitter")
    if actor.name == request.submitter:
        truths.add("n:submitter")
    return truths


def by_reference(table: dict[str, tuple[str, ...]], keys: list[str], request: Request) -> bool:
    """Reference: the first key that the table has decides; no key, no right."""
    for key in keys:
        if key in table:
            return bool(truths_of(request) & set(table[key]))
    return False


@given(RULES, REQUESTS)
def test_roles_decide_as_the_reference_does(
    rules: dict[Role, dict[str, tuple[str, ...]]], request: Request
) -> None:
    assert request.actor.role
    table = rules.get(request.actor.role, {})
    expected = by_reference(table, [request.command, request.permission], request)
    assert decide(rules, request).allowed == expected


@given(
    RULES,
    st.dictionaries(st.sampled_from((*COMMANDS, *PERMISSIONS, "*")), CONDITIONS, max_size=4),
    REQUESTS,
)
def test_sites_decide_as_the_reference_does_and_only_narrow(
    rules: dict[Role, dict[str, tuple[str, ...]]],
    commands: dict[str, tuple[str, ...]],
    request: Request,
) -> None:
    policy = SitePolicy.model_construct(commands=commands)
    own = by_reference(commands, [request.command, request.permission, "*"], request)
    allowed = decide_at_site(policy, request, rules).allowed
    assert allowed == (own and decide(rules, request).allowed)


TABLE: dict[Role, dict[Permission, str]] = {
    "project_admin": dict.fromkeys(PERMISSIONS, "always"),
    "org_admin": {
        "train": "own org's run",
        "operate": "own site",
        "view": "always",
        "validate": "always",
        "shell": "own site",
        "files": "own org's run",
    },
    "lead": {
        "train": "own run",
        "operate": "own site",
        "view": "always",
        "validate": "always",
        "shell": "own site",
        "files": "own run",
        "byoc": "always",
    },
    "member": {"view": "always"},
}
SITUATIONS: dict[str, dict[str, str]] = {
    "stranger": {},
    "own site": {"site": "a"},
    "own org's run": {"of": "a"},
    "own run": {"submitter": "amy"},
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("permission", PERMISSIONS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_default_matrix(role: Role, permission: Permission, situation: str) -> None:
    expected = TABLE[role].get(permission, "never") in ("always", situation)
    request = ask(role, permission, **SITUATIONS[situation])
    assert decide(DEFAULT_RULES, request).allowed == expected


def test_a_command_beats_its_category() -> None:
    own = ask("org_admin", "train", "submit_job", submitter="amy", of="a")
    assert decide(DEFAULT_RULES, own).rule == "role org_admin: submit_job = none"
    assert not decide(DEFAULT_RULES, own).allowed


def test_sites_and_servers_have_no_role_and_no_right() -> None:
    site = Identity("p", "site", "a", "s", "", "f", 1, datetime.now(UTC))
    decision = decide(DEFAULT_RULES, Request(site, "check_status", "view"))
    assert (decision.allowed, decision.rule) == (False, "role site: view is not granted")


def test_empty_organisations_never_match() -> None:
    nobody = Identity("p", "admin", "", "", "lead", "f", 1, datetime.now(UTC))
    for condition in ("o:site", "o:submitter", "n:submitter", "n:", "o:"):
        assert not holds(condition, Request(nobody, "x", "view"))


def test_a_refusal_names_the_rule() -> None:
    request = ask("member", "train", "start")
    with pytest.raises(PermissionDeniedError, match="amy may not start") as caught:
        demand(decide(DEFAULT_RULES, request), request)
    assert caught.value.rule == "role member: train is not granted"
    allowed = ask("member", "view", "check_status")
    demand(decide(DEFAULT_RULES, allowed), allowed)


@pytest.mark.parametrize(
    ("policy", "role", "code", "rule"),
    [
        (SitePolicy(), "lead", True, None),
        (SitePolicy(byoc=("none",)), "lead", True, "policy byoc = none"),
        (SitePolicy(byoc=("none",)), "lead", False, None),
        (SitePolicy(submitters=("o:site",)), "lead", False, "policy submitters = o:site"),
        (SitePolicy(submitters=()), "lead", False, "policy submitters = none"),
        (SitePolicy(), "org_admin", False, "role org_admin: submit_job = none"),
        (SitePolicy(), "member", False, "role member: train is not granted"),
    ],
)
def test_jobs(policy: SitePolicy, role: Role, code: bool, rule: str | None) -> None:
    request = ask(role, "train", "submit_job", submitter="amy", of="a")
    decision = decide_job(policy, request, foreign_code=code)
    assert decision.allowed == (rule is None)
    if rule:
        assert decision.rule == rule


def test_code_needs_the_role_s_right_too() -> None:
    rules: Rules = {"lead": {"train": ("any",)}}
    decision = decide_job(SitePolicy(), ask("lead", command="submit_job"), True, rules)
    assert decision.rule == "role lead: byoc is not granted"


def test_datasets() -> None:
    assert decide_dataset("heart", ("o:a",), ask("lead")).allowed
    decision = decide_dataset("heart", ("o:b",), ask("lead"))
    assert (decision.allowed, decision.rule) == (False, "dataset heart: allow = o:b")


def test_a_policy_replaces_the_roles_that_it_names() -> None:
    text = "roles:\n  member: {view: any, cat: o:site}\n"
    policy = parse_server_policy(text, "local/policy.yml", COMMANDS)
    rules = rules_of(policy)
    assert rules["member"] == {"view": ("any",), "cat": ("o:site",)}
    assert rules["lead"] == DEFAULT_RULES["lead"]
    assert rules_of(ServerPolicy()) == DEFAULT_RULES


@pytest.mark.parametrize(
    "text",
    [
        "roles: {king: {view: any}}",
        "roles: {member: {veiw: any}}",
        "roles: {member: {view: 1}}",
        "roles: {member: {view: everybody}}",
        "roles: {member: {'*': any}}",
        "rolse: {}",
        "roles:",
    ],
)
def test_a_wrong_server_policy_is_refused_whole(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_server_policy(text, "local/policy.yml", COMMANDS)


def test_a_site_policy_may_name_what_exists() -> None:
    text = "commands: {'*': any, abort: o:site, shell: none}"
    assert parse_site_policy(text, "local/policy.yml", COMMANDS).commands["abort"] == ("o:site",)
    with pytest.raises(ConfigError, match=r"commands\.abrot: no such command or permission"):
        parse_site_policy("commands: {abrot: any}", "local/policy.yml", COMMANDS)
