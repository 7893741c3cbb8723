from types import SimpleNamespace

import pytest

from flplatform.admin.users import KnownUser
from flplatform.core.access import DenialView
from flplatform.core.control import SiteReply
from flplatform.hci import Sessions
from tests.support.control import run
from tests.unit.admin.conftest import Console

ALLOWED = SiteReply("ok", {"allowed": True, "rule": "policy commands: * = any"})
REFUSED = SiteReply("ok", {"allowed": False, "rule": "policy commands: abort = none"})


class Office(Console):
    """A console whose users are known and whose sessions stay."""

    def parts(self):
        parts = super().parts()
        known = [
            KnownUser(name="lea", password_hash="", role="lead", organisation="a"),
            KnownUser(name="old", password_hash=""),
        ]
        users = SimpleNamespace(users=lambda: known)
        self.sessions = Sessions(idle_s=60, absolute_s=600)
        parts = SimpleNamespace(**{key: getattr(parts, key) for key in parts.__slots__})
        parts.login = SimpleNamespace(users=users)
        parts.users, parts.sessions = users, self.sessions
        parts.audit_source = lambda: None
        return parts


@pytest.fixture
def office(control, tmp_path) -> Office:
    return Office(control, tmp_path / "policy.yml")


def answers(reply):
    return {
        host: (row["cells"].get("answer"), row["cells"].get("rule"))
        for host, row in reply.rows.items()
    }


def test_can_asks_server_and_every_site(office, control):
    control.replies = {"a": ALLOWED, "b": REFUSED}
    reply = office("can lea abort")
    assert answers(reply) == {
        "server": ("allowed", "role lead: train = n:submitter"),
        "a": ("allowed", "policy commands: * = any"),
        "b": ("refused", "policy commands: abort = none"),
    }
    assert reply.code == 0
    assert reply.data("can")["hosts"]["b"] == {
        "allowed": False,
        "rule": "policy commands: abort = none",
    }


def test_can_one_site_about_somebody_else_s_run(office, control):
    control.replies = {"b": REFUSED}
    control.run_views = {3: run(3, submitter="amy", submitter_organisation="hub")}
    reply = office("can lea abort b --run 3")
    assert answers(reply)["server"] == ("refused", "role lead: train = n:submitter")
    assert set(reply.rows) == {"server", "b"}
    assert reply.code == 3  # nobody allows it


def test_can_needs_to_know_the_user(office):
    error = office("can zoe abort").error
    assert "has never signed in" in error["message"]
    assert "--role ROLE --org ORGANISATION" in error["hint"]
    assert "did you mean lea" in office("can leah abort").error["message"]
    assert "has never signed in" in office("can old abort").error["message"]  # nothing known
    reply = office("can zoe shutdown --role org_admin --org a")
    assert answers(reply)["server"] == ("refused", "role org_admin: operate = o:site")


def test_can_knows_byoc_submit_job_and_everybody_s_commands(office, control):
    reply = office("can lea byoc a")
    assert answers(reply)["server"] == ("allowed", "role lead: byoc = any")
    reply = office("can zoe byoc --role org_admin --org a")
    assert answers(reply)["server"] == ("refused", "role org_admin: submit_job = none")
    reply = office("can lea help")
    assert answers(reply) == {"server": ("allowed", "everybody who is signed in")}
    assert control.asked[-1][1] == "can"
    assert len(control.asked) == 2  # nobody was asked about help
    assert "did you mean abort?" in office("can lea abrt").error["hint"]


def test_can_knows_who_is_revoked(office, control):
    control.access.views = [DenialView("lea", "admin", "a", "now", "amy", "")]
    assert answers(office("can lea check_status"))["server"] == ("refused", "revoked by amy")


def test_odd_answers_of_sites_do_no_harm(office, control):
    control.replies = {"a": SiteReply("ok", {"allowed": "yes", "rule": ["x"]})}
    reply = office("can lea abort a")
    assert answers(reply)["a"] == ("refused", "['x']")


def test_sessions_are_listed_for_who_may_operate(office):
    for user in ("lea", "amy"):
        office.sessions.open(
            user=user, role="lead", organisation="a", peer="ipv4:10.0.0.1:9", fingerprint="f"
        )
    table = office("sessions").table
    assert [row[1] for row in table["rows"]] == ["lea", "amy"]
    assert "expires_s" in table["columns"]
    assert [row[1] for row in office("sessions", "lea").table["rows"]] == ["lea"]
    assert table["rows"][0][2:4] == ["lead of a", "10.0.0.1"]  # all of it is in the data
    data = office("sessions").data("sessions")
    assert (data[0]["role"], data[0]["peer"], data[0]["commands"]) == ("lead", "10.0.0.1:9", 0)
    assert 0 < data[0]["expires_s"] <= 60


def test_a_session_is_ended_by_its_user_or_who_may_operate(office):
    made = {}
    for user in ("lea", "amy", "max"):
        _, session = office.sessions.open(
            user=user, role="lead", organisation="a", peer="p", fingerprint="f"
        )
        made[user] = session.id
    reply = office(f"sessions --end {made['amy']}", "lea")
    assert "there is no session" in reply.error["message"]
    question = office(f"sessions --end {made['lea']}", "lea", confirmed=False).question
    assert question == "end the session of lea from p: 0 commands of it are under way. Continue?"
    assert office(f"sessions --end {made['lea']}", "lea").code == 0
    assert office(f"sessions --end {made['max']}").rows[made["max"]]["cells"] == {
        "user": "max",
        "state": "ended",
    }
    assert [session.user for session in office.sessions.live()] == ["amy"]
    assert ("amy", "sessions", "allowed", "") in office.records


def test_passwords_come_with_their_verbs_or_not_at_all(console):
    assert console("prove").code == 2
    assert console("prove", attachment=b'{"password": 1}').code == 2
    assert console("change_password", attachment=b'{"password": "x"}').code == 2
