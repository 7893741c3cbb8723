"""What a server may make a site do: what an admin signed, once, and nothing else."""

import asyncio
import dataclasses
import errno
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from flplatform.client import requests as module
from flplatform.client import seen
from flplatform.client.policy import Policy
from flplatform.client.requests import RequestAgent, basic_verbs
from flplatform.client.seen import SeenIds
from flplatform.client.site_runs import SiteRuns
from flplatform.client.spool import Spool
from flplatform.client.verbs import SiteVerb, everyone
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.audit import AuditLog, records
from flplatform.security.signing import CommandOrder, Signed, StartOrder, sign_order
from tests.support.federation import provision

ADMINS = {
    "amy": "project_admin",
    "ola": "org_admin@site-1",
    "mia": "member",
    "rex": "project_admin",
}
DIGEST = "5" * 64
BODY = {"run": 3, "digest": f"blake3:{DIGEST}", "size": 10}
ASKED = {"job": "tiny", "has_code": True, "data": [], "environment": "default", "sites": ["site-1"]}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Keys and certificates of everybody who might sign, a rogue federation's admin included."""
    folder = tmp_path_factory.mktemp("requests")
    federation = provision(folder / "own", admins=ADMINS)
    foreign = provision(folder / "foreign", admins=("eve",), project="other")
    found = {
        name: (home.key(name), home.open(name).chain)
        for home, name in [*((federation, name) for name in (*ADMINS, "site-2")), (foreign, "eve")]
    }
    federation.revoke("rex")
    return SimpleNamespace(federation=federation, signers=found)


class Runs:
    """A `Starter` that takes everything."""

    def __init__(self):
        self.accepted = []
        self.answers = {}

    async def accept(self, signed, order, submitter, body, record):
        record()
        self.accepted.append((submitter.name, order.submission_id, body.run))
        self.answers[signed, body] = {"isolation": "none"}
        return self.answers[signed, body]

    def recorded(self, signed, body):
        return self.answers.get((signed, body))


@pytest.fixture
def site(people, tmp_path):
    """A site's agent with real kit, policy, memory of ids and audit."""
    kit = people.federation.open("site-1")
    kit = dataclasses.replace(kit, folder=tmp_path)
    site = SimpleNamespace(kit=kit, runs=Runs(), stops=[], folder=tmp_path, number=0)
    site.audit = AuditLog(tmp_path / "audit.jsonl", "site-1")

    def agent(facts=None, **fields) -> RequestAgent:
        policy = Policy(kit, "sandbox")
        facts = facts or {"sys_info": lambda: {"cpus": 2}, "check_status": lambda: {"runs": []}}
        return RequestAgent(
            **{
                "trust": lambda: kit.trust,
                "policy": policy,
                "seen": SeenIds(tmp_path / "seen.json"),
                "runs": site.runs,
                "audit": site.audit,
                "verbs": basic_verbs(policy, site.stops.append, facts),
            }
            | fields
        )

    site.agent = agent
    site.notes = lambda: [
        (note["actor"], note["action"], note["decision"])
        for note in records(tmp_path / "audit.jsonl")
    ]
    yield site
    site.audit.close()


def window(start_s: float = 0, end_s: float = 60) -> dict[str, datetime]:
    now = datetime.now(UTC)
    return {
        "issued_at": now + timedelta(seconds=start_s),
        "not_after": now + timedelta(seconds=end_s),
    }


def command(people, text="shutdown all", who="amy", number=1, project="test", **times) -> Signed:
    argv = tuple(text.split(maxsplit=1) if text.startswith("preflight") else text.split())
    order = CommandOrder(project=project, id=f"{number:032x}", argv=argv, **window(**times))
    return sign_order(order, *people.signers[who])


def start(people, who="amy", sites=("site-1",), digest=DIGEST, **times) -> Signed:
    order = StartOrder(
        project="test", submission_id="c" * 32, job_digest=digest, sites=sites, **window(**times)
    )
    return sign_order(order, *people.signers[who])


def ask(agent, topic, signed, body=b"{}", request_id="r1") -> pb.SiteReply:
    data = signed.to_bytes() if isinstance(signed, Signed) else signed
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    request = pb.SiteRequest(id=request_id, topic=topic, signed=data, body=body)
    reply = asyncio.run(asyncio.wait_for(agent.handle(request), 60))
    assert reply.request_id == request_id
    return reply


def refused(reply, rule, text="") -> None:
    assert (reply.status, reply.rule) == ("refused", rule), reply
    assert text in reply.message
    assert reply.body == b""


# ---- what is done


def test_commands_are_obeyed(people, site):
    agent = site.agent()
    for number, (verb, who, body) in enumerate(
        [
            ("sys_info", "ola", {"cpus": 2}),
            ("check_status", "mia", {"runs": []}),
            ("shutdown", "ola", {}),
            ("restart", "amy", {}),
        ]
    ):
        signed = command(people, f"{verb} client site-1", who, number)
        reply = ask(agent, verb, signed, request_id=str(number))
        assert (reply.status, json.loads(reply.body)) == ("ok", body), reply
    assert site.stops == [False, True]
    assert site.notes() == [("ola", "shutdown", "allowed"), ("amy", "restart", "allowed")]


def test_start_and_its_repetition(people, site):
    agent, signed = site.agent(), start(people)
    assert json.loads(ask(agent, "start", signed, BODY).body) == {"isolation": "none"}
    assert ask(agent, "start", signed, BODY, "r2").status == "ok"
    assert site.runs.accepted == [("amy", "c" * 32, 3)]
    assert site.notes() == [("amy", "start", "allowed")]


def test_preflight(people, site):
    agent = site.agent()
    reply = ask(agent, "preflight", command(people, f"preflight {json.dumps(ASKED)}"))
    assert (reply.status, json.loads(reply.body)) == ("ok", {"isolation": "sandbox"})
    text = f"preflight {json.dumps(ASKED | {'data': ['heart']})}"
    reply = ask(agent, "preflight", command(people, text, number=2), request_id="r2")
    refused(reply, "datasets.yml: heart is missing")
    for number, (gpus, status) in enumerate(
        [({"site-1": 8}, "ok"), ({"site-1": 9}, "refused"), ({"site-2": 9}, "ok")], start=10
    ):
        text = f"preflight {json.dumps(ASKED | {'gpus': gpus})}"
        reply = ask(agent, "preflight", command(people, text, number=number), request_id=text)
        assert reply.status == status
    text = f"preflight {json.dumps(ASKED | {'processes': 9})}"
    reply = ask(agent, "preflight", command(people, text, number=13), request_id="r13")
    refused(reply, "environments.yml: max_processes = 8")
    for number, text in enumerate(("preflight", "preflight {}", "preflight []"), start=3):
        reply = ask(agent, "preflight", command(people, text, number=number), request_id=text)
        assert reply.status == "error"


# ---- who signed


@pytest.mark.parametrize("topic", ["start", "shutdown"])
def test_unsigned(site, topic):
    body = BODY if topic == "start" else b"{}"
    refused(ask(site.agent(), topic, b"", body), "unsigned", f"{topic} came without a signature")
    assert site.notes() == [("unverified", topic, "refused")]


@pytest.mark.parametrize("topic", ["start", "shutdown"])
@pytest.mark.parametrize(
    ("who", "text"),
    [
        ("site-2", "is a site, not a admin"),
        ("eve", "is not of project 'test'"),
        ("rex", "it is revoked"),
    ],
)
def test_signed_by_nobody_who_may(people, site, topic, who, text):
    signed = start(people, who) if topic == "start" else command(people, who=who)
    refused(ask(site.agent(), topic, signed, BODY), "signature", text)
    assert site.notes() == [("unverified", topic, "refused")]
    assert (site.runs.accepted, site.stops) == ([], [])


def test_revoked_since_the_site_was_started(people, site, tmp_path):
    home = shutil.copytree(people.federation.folder, tmp_path / "copy")
    federation = dataclasses.replace(people.federation, folder=home)
    kit = federation.open("site-1")
    trust = [kit.trust]
    agent = site.agent(trust=lambda: trust[0])
    assert ask(agent, "shutdown", command(people)).status == "ok"
    federation.revoke("amy")
    trust[0] = kit.reload_trust()
    refused(ask(agent, "shutdown", command(people, number=2), request_id="r2"), "signature")


@pytest.mark.parametrize("topic", ["start", "shutdown"])
def test_garbage(people, site, topic):
    good = start(people) if topic == "start" else command(people)
    other = command(people, number=9) if topic == "start" else start(people)
    flipped = bytes([good.payload[0] ^ 1]) + good.payload[1:]
    agent = site.agent()
    bad = {
        "payload": dataclasses.replace(good, payload=flipped),
        "signature": dataclasses.replace(good, signature=b"\x30" + bytes(70)),
        "empty": dataclasses.replace(good, signature=b""),
        "certificate": dataclasses.replace(good, certificate=people.signers["mia"][1]),
        "none": dataclasses.replace(good, certificate=b"x"),
        "domain": other,
    }
    for name, signed in bad.items():
        refused(ask(agent, topic, signed, BODY, name), "signature")
    for name, data in (("text", b"x"), ("json", b"{}"), ("long", b"[" * (3 << 20))):
        assert ask(agent, topic, data, BODY, name).status == "error"
    assert (site.runs.accepted, site.stops) == ([], [])
    assert ask(agent, topic, good, BODY).status == "ok"


def test_another_project_in_the_order(people, site):
    refused(ask(site.agent(), "shutdown", command(people, project="other")), "project")


# ---- what was signed


def test_another_verb(people, site):
    agent = site.agent()
    signed = command(people, "check_status all")
    refused(ask(agent, "shutdown", signed), "signed verb", "amy signed 'check_status'")
    assert site.stops == []
    # It was not used up by that.
    assert ask(agent, "check_status", signed, request_id="r2").status == "ok"


def test_another_target(people, site):
    agent = site.agent()
    refused(ask(agent, "shutdown", command(people, "shutdown client site-2")), "signed targets")
    reply = ask(agent, "shutdown", command(people, "shutdown server"), request_id="r2")
    refused(reply, "signed targets")
    assert site.stops == []


def test_not_allowed_by_role(people, site):
    reply = ask(site.agent(), "shutdown", command(people, who="mia"))
    refused(reply, "role member: operate is not granted")
    assert site.notes() == [("mia", "shutdown", "refused")]


@pytest.mark.parametrize("topic", ["shell", "", "Start", "submit_job", "stop"])
def test_unknown_topic(people, site, topic):
    agent = site.agent()
    refused(ask(agent, topic, command(people, f"{topic or 'x'} all")), _rule_of(topic))
    refused(ask(agent, topic, b"", request_id="r2"), "unsigned")


def _rule_of(topic: str) -> str:
    return "closed verb table" if topic else "signed verb"


# ---- once, and in time


def test_a_replayed_command(people, site):
    agent, signed = site.agent(), command(people)
    assert ask(agent, "shutdown", signed).status == "ok"
    refused(ask(agent, "shutdown", signed, request_id="r2"), "single use")
    restarted = site.agent()
    refused(ask(restarted, "shutdown", signed, request_id="r1"), "single use")
    again = command(people)  # signed anew, the same id
    refused(ask(restarted, "shutdown", again, request_id="r3"), "single use")
    assert site.stops == [False]


def test_a_verb_that_may_come_again_does_so_only_while_its_order_is_fresh(people, site):
    acted = []

    async def act(asked):
        acted.append(asked.request_id)
        return {}

    def agent():
        return site.agent(verbs=[SiteVerb("logs", "view", act, reaches=everyone, repeatable=True)])

    signed = command(people, "logs 3")
    for number, each in enumerate((agent(), agent())):  # the second is a process of its own
        assert ask(each, "logs", signed, request_id=f"r{number}").status == "ok"
    assert acted == ["r0", "r1"]
    stale = command(people, "logs 3", start_s=-200, end_s=-100)
    refused(ask(agent(), "logs", stale), "not after")
    refused(ask(agent(), "shutdown", signed), "signed verb")


@pytest.mark.parametrize("topic", ["start", "shutdown"])
def test_expired(people, site, topic):
    times = {"start_s": -200, "end_s": -100}
    signed = start(people, **times) if topic == "start" else command(people, **times)
    reply = ask(site.agent(), topic, signed, BODY)
    refused(reply, "not after", "by the signer's clock, but this clock says")


@pytest.mark.parametrize("topic", ["start", "shutdown"])
def test_a_clock_in_the_future(people, site, topic):
    times = {"start_s": 3600, "end_s": 3660}
    signed = start(people, **times) if topic == "start" else command(people, **times)
    here = datetime.now(UTC)
    reply = ask(site.agent(), topic, signed, BODY)
    refused(reply, "clocks within 30 s")
    there = json.loads(signed.payload)["issued_at"][:16]
    assert there in reply.message
    assert any(
        (here + timedelta(seconds=n)).isoformat(timespec="seconds") in reply.message
        for n in range(10)
    )


def test_a_little_skew_is_nothing(people, site):
    agent = site.agent()
    assert ask(agent, "shutdown", command(people, start_s=20)).status == "ok"
    late = command(people, number=2, start_s=-60, end_s=-10)
    assert ask(agent, "shutdown", late, request_id="r2").status == "ok"


# ---- start, held against what was signed


@pytest.fixture
def real_runs(site):
    async def fetch(blob):
        raise AssertionError("nothing is downloaded for what was not signed")

    def make() -> SiteRuns:
        policy = Policy(site.kit, "sandbox")
        spool = Spool(site.kit.state_folder() / "spool")

        async def stop_tasks(run):
            raise AssertionError("nothing has begun")

        return SiteRuns(
            site.kit, policy, fetch, spool, stop_tasks, lambda: site.kit.trust, lambda *_: None
        )

    return make


def test_a_start_of_another_package(people, site, real_runs):
    agent = site.agent(runs=real_runs())
    reply = ask(agent, "start", start(people), BODY | {"digest": "blake3:" + "6" * 64})
    refused(reply, "signed job digest")
    assert site.notes() == [("amy", "start", "refused")]


def test_a_start_for_others(people, site, real_runs):
    reply = ask(site.agent(runs=real_runs()), "start", start(people, sites=("site-2",)), BODY)
    refused(reply, "signed targets", "does not name site-1")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        BODY | {"run": "3"},
        BODY | {"run": 3.5},
        {"run": 3, "size": 10},
        b'{"run": 3, "run": 4, "digest": "x", "size": 1}',
        b"\xff",
    ],
)
def test_a_malformed_start(people, site, body):
    assert ask(site.agent(), "start", start(people), body).status == "error"
    assert site.runs.accepted == []


# ---- replies


def test_a_request_is_carried_out_once(people, site):
    agent = site.agent()
    signed = command(people).to_bytes()
    request = pb.SiteRequest(id="r1", topic="shutdown", signed=signed)

    async def twice():
        replies = await asyncio.gather(agent.handle(request), agent.handle(request))
        return [*replies, await agent.handle(request)]

    replies = asyncio.run(twice())
    assert [reply.status for reply in replies] == ["ok"] * 3
    assert site.stops == [False]


def test_an_impatient_asker_does_not_end_the_work(people, site):
    async def play():
        gate = asyncio.Event()

        async def accept(*_):
            await gate.wait()
            return {"isolation": "none"}

        agent = site.agent(runs=SimpleNamespace(accept=accept, recorded=lambda *_: None))
        data = json.dumps(BODY).encode()
        request = pb.SiteRequest(id="r1", topic="start", signed=start(people).to_bytes(), body=data)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(agent.handle(request), 0.05)
        gate.set()
        return await agent.handle(request)

    assert asyncio.run(play()).status == "ok"


def test_replies_are_remembered_within_bounds(people, site, monkeypatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    agent = site.agent()
    for number in range(5):
        ask(agent, "shutdown", b"", request_id=str(number))
    assert list(agent._replies) == ["2", "3", "4"]


# ---- what goes wrong here


def broken(*_, **__):
    raise OSError("the disk with the secret path is full")


def test_without_an_audit_nothing_happens(people, site, monkeypatch):
    agent = site.agent()
    monkeypatch.setattr(site.audit, "record", broken)
    replies = [
        ask(agent, "shutdown", command(people)),
        ask(agent, "restart", command(people, "restart all", number=2), request_id="r2"),
        ask(agent, "start", start(people), BODY, "r3"),
    ]
    for reply in replies:
        assert (reply.status, reply.message) == ("error", "internal error at the site")
    assert (site.runs.accepted, site.stops) == ([], [])
    refused(ask(agent, "shutdown", b"", request_id="r4"), "unsigned")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_and_whoever_looks_is_answered(people, site, monkeypatch, caplog):
    """The id of a look counts once even so, and is on the disk as soon as there is room."""
    agent = site.agent()
    with monkeypatch.context() as patch:
        patch.setattr(seen, "write_atomic", full)
        look = command(people, "check_status all")
        assert ask(agent, "check_status", look).status == "ok"
        refused(ask(agent, "check_status", look, request_id="r2"), "single use")
        for number, text in enumerate(("sys_info all", "shutdown all"), start=2):
            signed = command(people, text, number=number)
            reply = ask(agent, text.split()[0], signed, request_id=text)
            assert (reply.status, reply.rule) == ("error", "disk")
            assert "the disk is full (rule: disk); free some" in reply.message
    assert site.stops == []
    assert "Traceback" not in caplog.text
    assert (
        ask(
            agent, "check_status", command(people, "check_status all", number=4), request_id="r4"
        ).status
        == "ok"
    )
    reply = ask(site.agent(), "check_status", look, request_id="r5")
    refused(reply, "single use")


def test_a_command_that_finds_no_room_for_its_record_is_not_obeyed(
    people, site, monkeypatch, caplog
):
    """The disk takes a part of the record; whoever asked reads that it is full."""
    agent, write = site.agent(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:100]))
        reply = ask(agent, "shutdown", command(people))
    assert (reply.status, reply.rule) == ("error", "disk")
    assert "the disk is full" in reply.message
    assert site.stops == []
    assert "Traceback" not in caplog.text
    assert ask(agent, "shutdown", command(people, number=2), request_id="r2").status == "ok"


def test_without_a_memory_of_ids_nothing_happens(people, site):
    reply = ask(site.agent(seen=SimpleNamespace(use=broken)), "shutdown", command(people))
    assert (reply.status, reply.message) == ("error", "internal error at the site")
    assert site.stops == []
    assert site.notes() == [("amy", "shutdown", "failed")]


@pytest.mark.parametrize("fact", [broken, lambda: {"cpus": object()}])
def test_a_defect_tells_nothing(people, site, fact):
    agent = site.agent(facts={"sys_info": fact})
    reply = ask(agent, "sys_info", command(people, "sys_info all"))
    expected = pb.SiteReply(request_id="r1", status="error", message="internal error at the site")
    assert reply == expected
    assert site.notes() == [("amy", "sys_info", "failed")]
