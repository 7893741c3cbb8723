import json
from datetime import UTC, datetime

import pytest

from flplatform.admin.modules.audit import AuditModule, since
from flplatform.core.control import SiteReply
from flplatform.core.errors import InvalidArgumentError
from flplatform.hci import AdminServer, CommandRegister
from flplatform.security.audit import AuditLog
from tests.unit.admin.conftest import NOW, SIGNED, Console


class WithAudit(Console):
    """A console whose server has an audit."""

    def __post_init__(self):
        super().__post_init__()
        self.path = self.policy.with_name("audit.jsonl")
        log = AuditLog(self.path, "server")
        given = json.dumps({"targets": ["all"], "run": 3, "reason": None})
        details = {"order": "5" * 32, "arguments": given}
        log.record({"name": "amy"}, "abort", "allowed", details=details)
        log.record({"name": "bob"}, "shutdown", "denied", reason="role member")
        log.close()
        module = AuditModule(self.parts().hosts, lambda: (self.path, None))
        self.register = CommandRegister([module])
        self.server = AdminServer(self.register, self.rights, self)


@pytest.fixture
def console(control, tmp_path):
    return WithAudit(control, tmp_path / "policy.yml")


RECORD = {
    "time": "2999-01-01T00:00:00+00:00",
    "actor": "amy",
    "action": "abort",
    "decision": "allowed",
    "details": {"order": "5" * 32},
}


def test_the_server_s_own_audit(console):
    reply = console("audit --user amy")
    assert reply.statuses == {"server": "ok"}
    ((time, *rest),) = reply.table["rows"]
    assert rest == ["server", "amy", "abort", "all run=3", "allowed", "55555555"]
    assert reply.table["columns"][4] == "target"
    assert time.endswith("+00:00")
    assert [record["actor"] for record in reply.data("audit")["server"]] == ["amy"]
    assert len(console("audit --last 1").table["rows"]) == 1
    assert console("audit --decision denied").table["rows"][0][2] == "bob"
    assert console("audit --order 5555").data("audit")["server"][0]["action"] == "abort"


def test_sites_are_asked_for_theirs_and_one_table_is_made(console, control):
    control.replies = {"a": SiteReply("ok", {"records": [RECORD, "odd", 3], "note": ""})}
    reply = console("audit --site a,b")
    assert reply.statuses == {"a": "ok", "b": "no_reply after 10.0 s", "server": "ok"}
    assert control.asked == [(("a", "b"), "audit", SIGNED)]
    hosts = [row[1] for row in reply.table["rows"]]
    assert hosts == ["server", "server", "a"]  # in the order of time
    orders = {row[1]: row[-1] for row in reply.table["rows"] if row[3] == "abort"}
    assert orders == {"server": "55555555", "a": "55555555"}  # one id on both ends


def test_refusals_that_were_summed_up_are_said_as_such(console, control):
    summed = {"times": "6610", "first": "2024-05-01T10:00:00+00:00", "last": "later"}
    record = RECORD | {"reason": "the call has no token", "details": summed}
    odd = RECORD | {"reason": "x", "details": {"times": ["y" * 2000]}}
    once = RECORD | {"reason": "z", "details": summed | {"times": "1"}}
    control.replies = {"a": SiteReply("ok", {"records": [record, odd, once], "note": ""})}
    rows = console("audit --site a --action abort").table["rows"]
    reasons = [row[6] for row in rows if row[1] == "a"]
    assert reasons[0] == "6610 times since 2024-05-01T10:00:00+00:00: the call has no token"
    assert len(reasons[1]) < 300
    assert reasons[2] == "z"


def test_an_org_admin_sees_the_own_site_s(console, control):
    control.replies = {"a": SiteReply("ok", {"records": [RECORD]})}
    reply = console("audit --site a,b", "oli")
    assert reply.rows["a"]["status"] == "ok"
    assert reply.rows["server"]["status"] == reply.rows["b"]["status"] == "refused"
    assert console("audit", "oli").code == 3


def test_verify_names_where_the_chain_breaks(console, control):
    control.replies = {
        "a": SiteReply("ok", {"records": 9, "hash": "f" * 64}),
        "b": SiteReply("error", message="audit.jsonl:7: this record was changed or cut"),
    }
    reply = console("audit --verify")
    assert reply.rows["server"]["cells"]["records"] == 2
    assert reply.rows["a"]["cells"] == {"state": "whole", "records": 9, "hash": "f" * 16}
    assert reply.statuses["b"] == "error audit.jsonl:7: this record was changed or cut"
    assert reply.code == 1
    console.path.write_bytes(console.path.read_bytes().replace(b"shutdown", b"shutdawn"))
    reply = console("audit --verify --site a")
    assert "audit.jsonl:2: this record was changed or cut" in reply.statuses["server"]
    assert "was changed" in console("audit").statuses["server"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("2h", "2024-05-01T10:00:00+00:00"),
        ("30m", "2024-05-01T11:30:00+00:00"),
        ("2024-05-01T12:00", "2024-05-01T12:00:00+00:00"),
        ("2024-05-01T12:00+02:00", "2024-05-01T10:00:00+00:00"),
        ("2024-05-01", "2024-05-01T00:00:00+00:00"),
    ],
)
def test_since(text, expected):
    assert since(text, NOW) == expected


@pytest.mark.parametrize("text", ["2", "2 weeks", "yesterday", "999999999d", "-2h"])
def test_since_when(text):
    with pytest.raises(InvalidArgumentError):
        since(text, datetime.now(UTC))


def test_what_is_too_much_is_refused(console):
    assert console("audit --last 1001").error["field"] == "--last"
