from types import SimpleNamespace

import pytest

from flplatform.core.control import SiteReply
from tests.support.control import site
from tests.unit.admin.conftest import SIGNED

OK = SiteReply("ok", {"text": "line 1\nline 2\n", "cut": ""})


@pytest.fixture
def console(console, tmp_path, monkeypatch):
    """A server whose policy allows everything, with one log and one run's metrics."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("started\nan error\n")
    (tmp_path / "state" / "metrics").mkdir(parents=True)
    (tmp_path / "state" / "metrics" / "run-7.jsonl").write_text("{}\n")
    (tmp_path / "state" / "events.db").write_text("secret")
    kit = SimpleNamespace(
        folder=tmp_path,
        state_folder=lambda: tmp_path / "state",
        identity=SimpleNamespace(project="heart", name="server"),
    )
    module = console.register.find("ls").handler.__self__
    monkeypatch.setattr(module, "_kit", kit)
    allow(console, "pwd, ls, cat, head, tail, grep, env")
    return console


def allow(console, commands):
    console.policy.write_text(f"allowed_shell_cmds: [{commands}]\n")
    console.rights.reload()


@pytest.mark.parametrize("command", ["pwd", "ls", "cat", "head", "tail", "grep", "env"])
def test_every_command_is_off_unless_the_policy_lists_it(console, command):
    operands = {"grep": "x logs/a", "pwd": "", "env": ""}.get(command, "logs/a")
    allow(console, "")
    reply = console(f"{command} server {operands}")
    assert reply.statuses == {"server": "refused rule policy allowed_shell_cmds = none"}
    assert reply.code == 3


def test_a_changed_policy_counts_at_once_and_a_wrong_one_not(console):
    allow(console, "ls")
    assert console("cat server logs/server.log").code == 3
    assert console("ls server").code == 0
    allow(console, "rm")
    assert console("ls server").code == 0
    allow(console, "")
    assert console("ls server").code == 3


def test_what_the_server_shows(console):
    assert console("pwd server").text == "/\n"
    assert console("ls server -R").data("output")["server"].splitlines() == [
        "/:", "logs/", "runs/", "", "logs:", "server.log", "", "runs:", "7/", "",
        "runs/7:", "metrics.jsonl",
    ]  # fmt: skip
    reply = console("grep server -n error logs/server.log")
    assert reply.text == "2:an error\n"
    assert reply.rows["server"]["cells"] == {"lines": 1, "cut": None}
    assert console("tail server -n 1 logs/server.log").text == "an error\n"
    assert "FLP_PROJECT=heart\n" in console("env server").text


@pytest.mark.parametrize(
    "path",
    ["state/events.db", "../state/events.db", "logs/../state/events.db", "/etc/passwd",
     "startup/participant.key", "runs/7/../../state", "policy.yml"],
)  # fmt: skip
def test_what_the_server_does_not_show(console, path):
    assert console(["cat", "server", path]).code == 2


def test_errors_are_rows(console):
    assert console("cat server logs/none").statuses["server"].startswith("unknown there is no")
    assert console("cat server logs").statuses["server"].startswith("unknown logs is a folder")
    assert console("grep server -E (a logs/server.log").statuses["server"].startswith("error")


def test_sites_carry_it_out_themselves_one_row_each(console, control):
    control.replies = {
        "a": OK,
        "b": SiteReply("refused", message="ls is off here", rule="policy allowed_shell_cmds = cat"),
    }
    reply = console("ls client a b c logs")
    assert control.asked == [(("a", "b"), "ls", SIGNED)]
    assert reply.statuses == {
        "c": "unknown site",
        "a": "ok",
        "b": "refused rule policy allowed_shell_cmds = cat: ls is off here",
    }
    assert reply.rows["a"]["cells"] == {"lines": 2, "cut": None}
    assert reply.data("output") == {"a": "line 1\nline 2\n"}
    assert reply.code == 1


def test_several_answers_have_headings(console, control):
    control.replies = {"a": OK, "b": OK}
    assert console("tail client logs/site.log").text.count("── ") == 2
    assert "── server ──\nstarted" in console("head all logs/server.log").text


def test_a_silent_site_is_a_row(console):
    assert console("ls client a").statuses["a"].startswith("no_reply")


def test_a_site_that_is_gone_is_not_waited_for(console, control):
    control.site_views = [site("a"), site("b", state="away", last_seen_s=90.0)]
    control.replies = {"a": OK}
    reply = console("ls client")
    assert [asked for asked, *_ in control.asked] == [("a",)]
    assert reply.statuses["b"].startswith("no_reply (lost")


def test_an_answer_that_is_none_is_bounded_text(console, control):
    control.replies = {"a": SiteReply("ok", {"text": ["x"], "cut": {"y": 1}}), "b": SiteReply("ok")}
    reply = console("ls client")
    assert reply.data("output") == {"a": "['x']", "b": ""}


@pytest.mark.parametrize(("user", "code"), [("amy", 0), ("oli", 0), ("lea", 0), ("max", 3)])
def test_roles_are_asked_first(console, control, user, code):
    control.replies = {"a": OK, "b": OK}
    assert console("ls client a", user).code == code
    if user in ("oli", "lea"):
        assert console("ls client b", user).code == 3
        assert console("ls server", user).code == 3


def test_every_look_is_in_the_audit(console):
    console("cat server logs/server.log")
    assert ("amy", "cat", "allowed", "") in console.records


@pytest.mark.parametrize(
    "line", ["ls", "ls a", "cat server", "cat client a", "head server logs/x -n -1", "rm server x",
             "ls server --all", "grep server x", "pwd server logs"],
)  # fmt: skip
def test_lines_that_do_not_fit(console, line):
    assert console(line).code == 2
