"""What a site allows, and by which rule it refuses."""

from datetime import UTC, datetime
from typing import Any

import pytest

from flplatform.client.policy import Plan, Policy
from flplatform.client.requests import basic_verbs
from flplatform.client.verbs import targets
from flplatform.core.config import (
    Dataset,
    Datasets,
    Environment,
    Environments,
    SiteConfig,
    SitePolicy,
)
from flplatform.core.errors import PermissionDeniedError
from flplatform.security.authz import Request
from flplatform.security.denials import Denial
from flplatform.security.identity import Identity
from flplatform.security.kit import Kit, Local


def person(name: str, role: Any = "project_admin", organisation: str = "hub") -> Identity:
    kind: Any = "admin" if role else "site"
    end = datetime(2100, 1, 1, tzinfo=UTC)
    return Identity("test", kind, organisation, name, role, "ab" * 32, 1, end)


AMY = person("amy")
OLA = person("ola", "org_admin", "clinic")
OTTO = person("otto", "org_admin", "elsewhere")
LEA = person("lea", "lead", "clinic")
MIA = person("mia", "member", "clinic")
FAST = Environment(python="/opt/python", max_runs=3)
GPU, FEW = Environment(gpus=(0, 2)), Environment(max_processes=3)


@pytest.fixture
def site(tmp_path):
    """Return a site's policy for what its owner wrote."""
    (tmp_path / "table.csv").write_text("1")
    config = SiteConfig(
        project="test", name="site-1", organisation="clinic", servers=("localhost:1",)
    )
    datasets = {
        "table": Dataset(path="table.csv", allow=("any",)),
        "mine": Dataset(path=str(tmp_path / "table.csv"), allow=("n:submitter", "r:lead")),
        "secret": Dataset(path="table.csv", allow=("o:site",)),
        "gone": Dataset(path="no/such/file", allow=("any",)),
    }

    def make(isolation: Any = "sandbox", **fields: Any) -> Policy:
        local = Local(
            site_policy=SitePolicy(**fields),
            datasets=Datasets(datasets=datasets),
            environments=Environments(environments={"fast": FAST, "gpu": GPU, "few": FEW}),
        )
        identity = person("site-1", "", "clinic")
        trust: Any = None
        return Policy(Kit(tmp_path, identity, config, trust, local), isolation)

    return make


def check(policy: Policy, submitter=AMY, author=None, code=True, processes=1, **fields: Any):
    asked = {"data": (), "environment": "default"} | fields
    return policy.check_job(
        submitter, author or submitter, has_code=code, processes=processes, **asked
    )


def refused(rule: str, policy: Policy, *people: Identity, **fields: Any) -> str:
    with pytest.raises(PermissionDeniedError) as error:
        check(policy, *people, **fields)
    assert rule in error.value.rule
    return str(error.value)


# ---- jobs


def test_what_a_job_gets(site, tmp_path):
    plan = check(site(), data=("table", "mine"), environment="fast")
    table = tmp_path / "table.csv"
    assert plan == Plan({"table": table, "mine": table}, FAST, "sandbox")
    assert check(site(), code=False) == Plan({}, Environment(), "sandbox")
    assert check(site(), LEA).isolation == "sandbox"


def test_processes(site):
    policy = site()
    most = {"gpu": 2, "few": 3, "default": 8}
    for name, count in most.items():
        assert check(policy, environment=name, processes=count).processes == count
    text = refused("environments.yml: gpus", policy, environment="gpu", processes=3)
    assert "3 processes" in text
    assert "2 GPUs" in text
    refused("max_processes = 3", policy, environment="few", processes=4)
    refused("max_processes = 8", policy, processes=9)


def test_roles_of_submitters(site):
    refused("role member: train is not granted", site(), MIA)
    refused("role org_admin: submit_job = none", site(), OLA)
    refused("role site: train is not granted", site(), person("site-2", ""))


def test_submitters(site):
    refused("policy submitters = o:site", site(submitters=("o:site",)), AMY)
    assert check(site(submitters=("o:site",)), LEA)
    refused("policy submitters = none", site(submitters=()), AMY)


def test_the_author_counts_like_the_submitter(site):
    policy = site(submitters=("n:amy",))
    refused("policy submitters = n:amy", policy, AMY, person("ann"))
    refused("policy submitters = n:amy", policy, person("ann"), AMY)
    refused("role member: train is not granted", site(), AMY, MIA)
    refused("role lead: train = n:submitter", site(), AMY, LEA)
    # Who refuses is the submitter first, in every process.
    assert "ola may not" in refused("role org_admin", site(), OLA, MIA)


def test_byoc(site):
    policy = site(byoc=("o:site",))
    refused("policy byoc = o:site", policy)
    assert check(policy, code=False)
    assert check(policy, LEA)
    refused("policy byoc = n:amy", site(byoc=("n:amy",)), AMY, person("ann"))


def test_minimum_isolation(site):
    rule = "policy minimum_isolation = sandbox"
    refused(rule, site("none", minimum_isolation="sandbox"), code=False)
    assert check(site("sandbox", minimum_isolation="sandbox"))


def test_foreign_code_without_a_sandbox(site):
    text = refused("policy allow_foreign_code_unsandboxed = false", site("none"))
    assert "code of hub" in text
    assert check(site("none"), code=False).isolation == "none"
    assert check(site("none"), LEA).isolation == "none"
    assert check(site("none", allow_foreign_code_unsandboxed=True)).isolation == "none"
    # Whose code it is says its author, not who submits it.
    refused(
        "allow_foreign_code_unsandboxed", site("none"), person("ada", organisation="clinic"), AMY
    )
    assert check(site("none"), AMY, person("ada", organisation="clinic"))


def test_unknown_environment(site):
    text = refused("environments.yml", site(), environment="slow")
    assert "'slow'" in text
    assert "known: default, fast" in text


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("else", "datasets.yml: else is missing"),
        ("secret", "dataset secret: allow = o:site"),
        ("gone", "datasets.yml: gone"),
    ],
)
def test_datasets(site, name, rule):
    refused(rule, site(), data=("table", name))
    refused(rule, site(), data=(name, "table"), code=False)


def test_a_dataset_is_for_its_submitter(site):
    assert check(site(), LEA, data=("secret",))
    refused(
        "dataset secret: allow", site(), AMY, person("ada", organisation="clinic"), data=("secret",)
    )


# ---- commands


VERBS = {verb.name: verb for verb in basic_verbs(None, None, {})}


def command(policy: Policy, actor: Identity, text: str) -> None:
    argv = text.split()
    policy.check_command(actor, argv, VERBS[argv[0]])


def denied(rule: str, policy: Policy, actor: Identity, text: str) -> None:
    with pytest.raises(PermissionDeniedError) as error:
        command(policy, actor, text)
    assert rule in error.value.rule


@pytest.mark.parametrize("verb", ["check_status", "sys_info", "shutdown", "restart"])
def test_targets_are_signed(site, verb):
    for text in ("", " server", " client site-2", " client site-10", " site-1", " -all"):
        denied("signed targets", site(), AMY, verb + text)
    for text in (" all", " client", " client site-1", " client site-2 site-1"):
        command(site(), AMY, verb + text)


def test_roles_of_commands(site):
    command(site(), MIA, "check_status all")
    denied("role member: operate is not granted", site(), MIA, "sys_info all")
    denied("role member: train is not granted", site(), MIA, "preflight {}")
    denied("role site: view", site(), person("site-2", ""), "check_status all")
    for verb in ("shutdown", "restart", "sys_info"):
        command(site(), OLA, f"{verb} all")
        command(site(), LEA, f"{verb} client site-1")
        denied("role org_admin: operate = o:site", site(), OTTO, f"{verb} all")
    command(site(), LEA, "preflight {}")
    command(site(), AMY, "preflight {}")


def test_the_owner_narrows_commands(site):
    policy = site(commands={"shutdown": ("o:site",), "operate": ("n:amy",), "*": ("r:member",)})
    denied("policy commands: shutdown = o:site", policy, AMY, "shutdown all")
    command(policy, OLA, "shutdown all")
    command(policy, AMY, "restart all")
    denied("policy commands: operate = n:amy", policy, OLA, "restart all")
    denied("policy commands: * = r:member", policy, AMY, "check_status all")
    command(policy, MIA, "check_status all")
    denied("role member", site(commands={"shutdown": ("any",)}), MIA, "shutdown all")
    denied("policy commands: * is not granted", site(commands={}), AMY, "check_status all")


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("check_status all", True),
        ("check_status client", True),
        ("check_status client site-1", True),
        ("check_status client site-2 site-1", True),
        ("check_status --json client site-1", True),
        ("check_status client --json", True),
        ("check_status", False),
        ("check_status server", False),
        ("check_status server site-1", False),
        ("check_status client site-2", False),
        ("check_status client site-1x", False),
        ("check_status client SITE-1", False),
        ("check_status site-1 client", False),
        ("check_status --all", False),
        ("all client", True),
        ("client", False),
    ],
)
def test_the_grammar_of_targets(text, reached):
    assert targets(text.split(), "site-1") is reached


# ---- who is revoked


def denial(name: str, organisation: str = "", kind: Any = "admin") -> Denial:
    at = datetime(2024, 5, 1, tzinfo=UTC)
    return Denial(name, kind, organisation, False, at, "zoe", "left", b"")


def test_nothing_of_a_revoked_name_runs_here(site):
    policy = site()
    check(policy, LEA, AMY)
    policy._denials.add(denial("lea"))
    for people in ((LEA,), (AMY, LEA), (LEA, AMY)):  # signed or written
        assert "lea was revoked by zoe" in refused("revoked", policy, *people)
    check(policy, AMY)
    (verb,) = [verb for verb in basic_verbs(policy, lambda _: None, {}) if verb.name == "shutdown"]
    with pytest.raises(PermissionDeniedError) as caught:
        policy.check_command(LEA, ("shutdown", "all"), verb)
    assert caught.value.rule == "revoked"
    assert not policy.would(Request(LEA, "check_status", "view")).allowed


def test_an_org_admin_s_denial_ends_at_the_organisation(site):
    policy = site()
    policy._denials.add(denial("lea", "elsewhere"))
    check(policy, LEA)
    policy._denials.add(denial("lea", "clinic"))
    refused("revoked", policy, LEA)


# ---- validation


def test_who_may_validate_need_not_be_allowed_to_train(site):
    for person_, code in ((OLA, True), (LEA, True)):
        plan = check(site(), person_, AMY, code=code, purpose="validate")
        assert plan.purpose == "validate"
    refused("role org_admin: submit_job = none", site(), OLA, AMY)
    refused("role member: validate is not granted", site(), MIA, AMY, purpose="validate")


def test_a_site_may_allow_validation_and_refuse_training_or_the_reverse(site):
    only = {"submitters": (), "commands": {"*": ("any",), "validate": ("any",)}}
    assert check(site(**only), OLA, AMY, purpose="validate")
    refused("policy submitters = none", site(**only), AMY)
    none = {"commands": {"*": ("any",), "validate": ()}}
    refused("policy commands: validate = none", site(**none), OLA, AMY, purpose="validate")
    assert check(site(**none), AMY)


def test_a_policy_that_does_not_speak_of_validation_takes_it_for_a_submission(site):
    policy = site(submitters=("n:amy",))
    refused("policy submitters = n:amy", policy, OLA, AMY, purpose="validate")
    refused("policy submitters = n:amy", policy, AMY, LEA, purpose="validate")
    assert check(policy, AMY, purpose="validate")


def test_the_code_that_validates_needs_its_author_s_right(site):
    policy = site(byoc=("n:amy",))
    assert check(policy, OLA, AMY, purpose="validate")
    refused("policy byoc = n:amy", policy, AMY, LEA, purpose="validate")
    refused("role org_admin: byoc is not granted", site(), AMY, OLA, purpose="validate")
    assert check(site(), AMY, OLA, code=False, purpose="validate")
    refused("dataset secret: allow = o:site", site(), AMY, data=("secret",), purpose="validate")


def test_what_validating_would_need(site):
    request = Request(OLA, "validate", "validate", "clinic", "ola", "clinic")
    assert site().would(request).allowed
    assert site(submitters=()).would(request).rule == "policy submitters = none"
