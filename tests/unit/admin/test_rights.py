import logging

import pytest

from flplatform.core.control import SiteReply
from flplatform.core.errors import ConfigError
from flplatform.core.messages import ModelRef
from tests.support.control import run
from tests.unit.admin.conftest import USERS, Console

YES, NO = 0, 3
LINES = {
    # every command of the admin side            amy  oli  lea  max
    "list_runs": (YES, YES, YES, YES),
    "set_run_number 1": (YES, YES, YES, YES),
    "wait 3": (YES, YES, YES, YES),
    "check_status all": (YES, YES, YES, YES),
    "show_metrics 1": (YES, YES, YES, YES),
    "cross_val 1": (1, 1, 1, 1),  # there is none
    "abort 1": (YES, NO, NO, NO),  # amy's
    "abort 2": (YES, YES, YES, NO),  # lea's, of oli's organisation
    "set_min_clients 1 --run 1": (YES, NO, NO, NO),
    "set_min_clients 1 --run 2": (YES, YES, YES, NO),
    "download_model 1": (YES, NO, NO, NO),
    "download_model 2": (YES, YES, YES, NO),
    "sys_info server": (YES, NO, NO, NO),
    "sys_info client a": (YES, YES, YES, NO),
    "sys_info client b": (YES, NO, NO, NO),
    "shutdown server": (YES, NO, NO, NO),
    "shutdown client a": (YES, YES, YES, NO),
    "restart client b": (YES, NO, NO, NO),
    "restart client a": (YES, YES, YES, NO),
    "remove_client a": (YES, YES, YES, NO),
    "remove_client b": (YES, NO, NO, NO),
    "submit_job x": (1, NO, 1, NO),  # 1: the console's own, but allowed
    "preflight {}": (2, NO, 2, NO),  # 2: no question, but allowed
    "submit": (2, NO, 2, NO),
    "whoami": (YES, YES, YES, YES),
    "ops": (YES, YES, YES, YES),
    "help": (YES, YES, YES, YES),
}


@pytest.fixture
def busy(control):
    control.replies = {"a": SiteReply("ok", {}), "b": SiteReply("ok", {})}
    control.models = {(1, "best"): ModelRef("x", 1), (2, "best"): ModelRef("x", 1)}
    return control


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("place", range(4))
def test_role_by_command(console, busy, line, place):
    busy.run_views = {
        1: run(1),
        2: run(2, submitter="lea", submitter_organisation="a"),
        3: run(3, status="finished", ended="now"),
    }
    reply = console(line, list(USERS)[place])
    assert reply.code == LINES[line][place], reply.items


def test_the_table_has_every_command(console):
    tested = {line.split()[0] for line in LINES}
    local = {"watch", "timeout", "bye", "cancel"}
    assert {view.name for view in console.register.views()} - local == tested


def test_a_target_that_does_not_exist_is_nobodys(console):
    assert console("sys_info client x", "lea").statuses == {"x": "unknown site"}
    assert console("sys_info client x", "max").code == NO


def test_a_refusal_names_the_rule_and_is_in_the_audit(console):
    error = console("shutdown all", "max").error
    assert error["message"] == "max may not shutdown"
    assert error["rule"] == "role member: operate is not granted"
    assert console.records == [("max", "shutdown", "denied", "role member: operate is not granted")]


def policy(console: Console, text: str) -> None:
    console.policy.write_text(text)
    console.rights.reload()


def test_a_changed_policy_is_taken_in(console):
    assert console("sys_info server", "max").code == NO
    policy(console, "roles: {member: {view: any, sys_info: any}}")
    assert console("sys_info server", "max").code == YES
    assert console("shutdown server", "max").code == NO


def test_a_wrong_policy_changes_nothing(console, caplog):
    policy(console, "roles: {member: {sys_info: any}}")
    for wrong in ("roles: {member: {sys_inf: any}}", "roles: [", "roles: {boss: {}}"):
        with caplog.at_level(logging.ERROR):
            policy(console, wrong)
        assert "the old policy stays" in caplog.text
        caplog.clear()
        assert console("sys_info server", "max").code == YES
    policy(console, "")
    assert console("sys_info server", "max").code == NO


def test_a_wrong_policy_stops_the_start(control, tmp_path):
    (tmp_path / "policy.yml").write_text("roles: {member: {sys_inf: any}}")
    with pytest.raises(ConfigError, match="sys_inf"):
        Console(control, tmp_path / "policy.yml")


def test_who_may_view(console):
    assert console.rights.may_view(USERS["max"])
    policy(console, "roles: {member: {view: none}}")
    assert not console.rights.may_view(USERS["max"])
