import pytest

from flplatform.admin.modules.reports import ReportsModule
from flplatform.core.control import SiteReply
from flplatform.files.inventory import read_gpus
from flplatform.hci import AdminServer, CommandRegister
from tests.unit.admin.conftest import Console

SITE = {
    "minimum_isolation": "sandbox",
    "isolation": "sandbox",
    "submitters": ["o:site"],
    "byoc": ["none"],
    "commands": {"*": ["any"], "shutdown": []},
    "datasets": {"heart": ["any"]},
    "filters": ["clip"],
    "allowed_shell_cmds": ["ls"],
    "max_examples": 50,
    "allow_foreign_code_unsandboxed": True,
}


@pytest.fixture
def console(control, tmp_path):
    console = Console(control, tmp_path / "policy.yml")
    module = ReportsModule(console.parts().hosts, console.rights, lambda: tmp_path)
    console.register = CommandRegister([module])
    console.server = AdminServer(console.register, console.rights, console)
    return console


def tables(reply):
    return {item["name"]: item["rows"] for item in reply.items if item["type"] == "table"}


def test_policy_of_server_and_sites(console, control):
    control.replies = {"a": SiteReply("ok", SITE)}
    console.policy.write_text("roles: {member: {view: [none]}}\n")
    console.rights.load(["policy"])
    reply = console("policy")
    assert reply.statuses == {"server": "ok", "a": "ok", "b": "no_reply after 2.0 s"}
    assert reply.rows["server"]["cells"]["file"].endswith("policy.yml")
    roles = tables(reply)["server roles"]
    assert ["member", "view", "none", "policy.yml"] in roles
    assert ["lead", "operate", "o:site", "default"] in roles
    assert tables(reply)["policy of a"] == [
        ["submitters", "", "o:site"],
        ["byoc", "", "none"],
        ["command", "*", "any"],
        ["command", "shutdown", "none"],
        ["dataset", "heart", "any"],
        ["filter", "clip", ""],
        ["shell", "ls", ""],
        ["foreign code", "may run without a sandbox", ""],
        ["max_examples", "50", ""],
    ]
    assert reply.data("policy")["a"] == SITE
    assert list(console("policy server").rows) == ["server"]
    assert "TARGET is server, client" in console("policy a").error["message"]


def test_reports_of_all(console, control):
    body = {
        "cpus": 8,
        "memory_bytes": 100,
        "gpus": [{"name": "H200"}, {"name": "H200"}],
        "environments": {"default": {"max_runs": 2, "in_use": 1}},
        "isolation": "sandbox",
    }
    control.replies = {"a": SiteReply("ok", body), "b": SiteReply("error", message="odd")}
    reply = console("report_resources all")
    cells = reply.rows["a"]["cells"]
    assert (cells["cpus"], cells["gpus"], cells["environments"]) == (8, "2 H200", "default 1/2")
    assert reply.rows["server"]["cells"]["disk_bytes"] > 0
    assert reply.data("resources")["a"] == body
    control.replies = {"a": SiteReply("ok", {"flplatform": "0.1", "python": "3.11"})}
    reply = console("report_version all")
    assert reply.rows["a"]["cells"]["python"] == "3.11"
    assert reply.rows["server"]["cells"]["grpc"]


@pytest.mark.parametrize("body", [{}, {"gpus": 3, "environments": [1], "cpus": "x"}, SITE])
def test_odd_reports_do_no_harm(console, control, body):
    control.replies = {"a": SiteReply("ok", body)}
    for line in ("report_resources client a", "report_version client a", "policy client a"):
        assert console(line).statuses == {"a": "ok"}


def test_the_lines_of_the_gpu_tool():
    text = "0, NVIDIA H200, 143771, 12, 3\n1, NVIDIA H200, [N/A], 0, [N/A]\nno devices\n"
    first, second = read_gpus(text)
    assert first == {
        "index": 0,
        "name": "NVIDIA H200",
        "memory_bytes": 143771 << 20,
        "memory_used_bytes": 12 << 20,
        "busy_percent": 3,
    }
    assert (second["memory_bytes"], second["busy_percent"]) == (None, None)
    assert read_gpus("") == []
