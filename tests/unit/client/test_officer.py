"""What a site tells a security officer, and whom it tells nothing."""

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from flplatform.client.denials import DenialBook
from flplatform.client.officer import Officer, reaches_audit, reaches_can, reaches_policy
from flplatform.client.policy import Policy
from flplatform.client.policy_file import PolicyFile
from flplatform.client.requests import RequestAgent, basic_verbs
from flplatform.client.seen import SeenIds
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.audit import AuditLog, KitSeal, records
from flplatform.security.signing import CommandOrder, DenialOrder, sign_order
from tests.support.federation import provision

ADMINS = {"amy": "project_admin", "lea": "lead@site-1", "mia": "member"}
POLICY = """
byoc: [r:project_admin]
submitters: [o:site]
commands: {shutdown: [none], "*": [any]}
max_examples: 50
filters: [{name: clip, args: {norm: 1}}]
"""
DATASETS = "datasets: {heart: {path: /secret/heart, allow: ['o:site-1']}}\n"


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    federation = provision(tmp_path_factory.mktemp("officer"), admins=ADMINS)
    federation.local("site-1", "policy.yml", POLICY)
    federation.local("site-1", "datasets.yml", DATASETS)
    return federation


@pytest.fixture
def site(federation, tmp_path):
    kit = federation.open("site-1")
    log = AuditLog(tmp_path / "audit.jsonl", "site-1", seal=KitSeal(kit))
    file = PolicyFile(kit.folder / "local" / "policy.yml", kit.local.site_policy)
    book = DenialBook(tmp_path / "denials.json", lambda: kit.trust)
    policy = Policy(kit, "sandbox", book.denials, lambda: file.policy)
    officer = Officer(kit, policy, file, log.path, KitSeal(kit), "sandbox", lambda: {"default": 1})
    kit.state_folder().mkdir(exist_ok=True)
    verbs = [*basic_verbs(policy, lambda _: None, {"sys_info": dict}), *officer.verbs()]
    officer.know(verbs)
    file.load([verb.name for verb in verbs])
    agent = RequestAgent(
        trust=lambda: kit.trust,
        policy=policy,
        seen=SeenIds(tmp_path / "seen.json"),
        runs=None,
        audit=log,
        verbs=verbs,
        denials=book.take,
    )
    yield SimpleNamespace(agent=agent, log=log, federation=federation, number=0)
    log.close()


def ask(site, text, who="amy", body=None) -> pb.SiteReply:
    site.number += 1
    now = datetime.now(UTC)
    order = CommandOrder(
        project="test",
        issued_at=now,
        not_after=now + timedelta(seconds=60),
        id=f"{site.number:032x}",
        argv=tuple(text.split()),
    )
    signed = sign_order(order, site.federation.key(who), site.federation.open(who).chain)
    request = pb.SiteRequest(
        id=str(site.number),
        topic=text.split()[0],
        signed=signed.to_bytes(),
        body=json.dumps(body or {}).encode(),
    )
    return asyncio.run(asyncio.wait_for(site.agent.handle(request), 60))


def told(reply: pb.SiteReply):
    assert reply.status == "ok", reply
    return json.loads(reply.body)


def can(site, user, command, role, organisation="hub", permission="operate", **more):
    body = {"name": user, "role": role, "organisation": organisation, "permission": permission}
    reply = ask(site, f"can {user} {command}", "mia", {**body, **more})
    answer = told(reply)
    return answer["allowed"], answer["rule"]


def test_can_is_what_the_site_would_do(site):
    assert can(site, "ann", "sys_info", "project_admin")[0]
    assert can(site, "ann", "sys_info", "lead") == (False, "role lead: operate = o:site")
    assert can(site, "ann", "sys_info", "lead", "site-1")[0]
    assert can(site, "ann", "shutdown", "project_admin") == (
        False,
        "policy commands: shutdown = none",
    )
    assert can(site, "ann", "submit_job", "lead", "site-1", "train")[0]
    assert can(site, "ann", "submit_job", "lead", "hub", "train") == (
        False,
        "policy submitters = o:site",
    )
    assert can(site, "ann", "byoc", "lead", "site-1", "train") == (
        False,
        "policy byoc = r:project_admin",
    )
    # The right that a verb needs here is the site's own knowledge, whatever the server says.
    assert not can(site, "ann", "sys_info", "member", permission="view")[0]
    assert can(site, "ann", "abort", "lead", "x", "train", submitter="bob")[0] is False


def test_can_is_about_whom_was_signed(site):
    body = {"name": "ann", "role": "lead", "organisation": "a", "permission": "view"}
    reply = ask(site, "can bob sys_info", "mia", body)
    assert reply.status == "error"
    assert ask(site, "can ann", "mia", body).status == "error"


def test_the_policy_tells_names_but_no_paths(site):
    reply = ask(site, "policy", "mia")
    answer = told(reply)
    assert answer["byoc"] == ["r:project_admin"]
    assert answer["commands"] == {"shutdown": ["none"], "*": ["any"]}
    assert answer["datasets"] == {"heart": ["o:site-1"]}
    assert answer["filters"] == ['clip {"norm": 1}']
    assert (answer["max_examples"], answer["minimum_isolation"]) == (50, "none")
    assert b"secret" not in reply.body


def test_the_audit_is_for_who_may_operate(site):
    site.log.record({"name": "zoe"}, "start", "allowed")
    reply = ask(site, "audit --site site-1", "mia")
    assert (reply.status, reply.rule) == ("refused", "role member: operate is not granted")
    answer = told(ask(site, "audit --site site-2,site-1", "lea", {"last": 5}))
    assert [record["actor"] for record in answer["records"]] == ["mia", "zoe"]
    assert answer["records"][0]["details"] == {"order": f"{1:032x}"}  # the signed order's id
    assert told(ask(site, "audit --verify", "amy"))["records"] == 2
    assert ask(site, "audit --site site-1", "amy", {"last": 10**9}).status == "error"


def test_reports(site):
    answer = told(ask(site, "report_resources all", "mia"))
    assert answer["environments"]["default"] == {"max_runs": 1, "in_use": 1, "gpus": []}
    assert answer["isolation"] == "sandbox"
    assert answer["cpus"] >= 1
    versions = told(ask(site, "report_version client site-1", "mia"))
    assert {"flplatform", "python", "grpc", "protobuf", "numpy", "os"} == set(versions)


@pytest.mark.parametrize(
    ("reaches", "text", "expected"),
    [
        (reaches_can, "can amy abort", True),
        (reaches_can, "can amy abort here there", True),
        (reaches_can, "can amy abort there", False),
        (reaches_can, "can amy abort --role here", True),
        (reaches_can, "can amy abort --role lead there", False),
        (reaches_can, "can --org=x amy abort there", False),
        (reaches_audit, "audit", False),
        (reaches_audit, "audit --verify", True),
        (reaches_audit, "audit --verify --site there", False),
        (reaches_audit, "audit --site there,here", True),
        (reaches_audit, "audit --site=here", True),
        (reaches_audit, "audit --user here", False),
        (reaches_policy, "policy", True),
        (reaches_policy, "policy server", False),
        (reaches_policy, "policy client here", True),
    ],
)
def test_whom_the_signed_words_reach(reaches, text, expected):
    assert reaches(text.split(), "here") == expected


def test_a_revoked_signer_is_refused_here(site):
    now = datetime.now(UTC)
    denial = DenialOrder(
        project="test",
        issued_at=now,
        not_after=now + timedelta(seconds=60),
        name="lea",
        kind="admin",
    )
    amy = site.federation.key("amy"), site.federation.open("amy").chain
    text = base64.b64encode(sign_order(denial, *amy).to_bytes()).decode()
    request = pb.SiteRequest(id="d", topic="denials", body=json.dumps({"orders": [text]}).encode())
    reply = asyncio.run(site.agent.handle(request))
    assert told(reply) == {"news": 1, "refused": []}
    reply = ask(site, "sys_info client site-1", "lea")
    assert (reply.status, reply.rule) == ("refused", "revoked")
    assert can(site, "lea", "sys_info", "lead", "site-1") == (False, "revoked by amy")
    noted = [(note["action"], note["decision"]) for note in records(site.log.path)]
    assert noted == [("denials", "carried"), ("sys_info", "refused")]
