import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from flplatform.admin.rights import Rights
from flplatform.core.control import SiteReply
from flplatform.core.errors import ConfigError, UnavailableError
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
    "why 1": (1, 1, 1, 1),  # nothing to explain, but allowed
    "why a": (YES, YES, YES, YES),
    "lineage 1": (1, 1, 1, 1),  # there is none
    "taskname": (2, 2, 2, 2),  # several runs are active, but allowed
    "cross_val 1": (1, 1, 1, 1),  # there is none
    "abort all --run 1": (YES, NO, NO, NO),  # amy's
    "abort all --run 2": (YES, YES, YES, NO),  # lea's, of oli's organisation
    "abort client b --run 2": (YES, YES, YES, NO),  # whose the run is, not the site
    "abort_task a --run 1": (YES, YES, YES, NO),
    "abort_task b --run 2": (YES, NO, NO, NO),
    "disable_client a": (YES, YES, YES, NO),
    "disable_client b": (YES, NO, NO, NO),
    "enable_client a": (YES, YES, YES, NO),
    "enable_client b": (YES, NO, NO, NO),
    "delete_run_number 3": (YES, NO, NO, NO),
    "set_timeout 5": (YES, YES, YES, YES),
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
    "dashboard 1": (1, 1, 1, 1),  # 1: the console's own, but allowed
    "dashboard_feed 9": (1, 1, 1, 1),  # there is none
    "submit_job x": (1, NO, 1, NO),  # 1: the console's own, but allowed
    "upload_folder x": (1, NO, 1, NO),
    "stage heart x": (YES, NO, YES, NO),
    "list_jobs": (YES, YES, YES, YES),
    "delete_job heart": (1, NO, 1, NO),  # 1: not staged, but allowed
    "deploy heart all --run 1": (1, NO, NO, NO),  # 1: has begun, but allowed
    "deploy heart all --run 2": (1, NO, 1, NO),
    "start all --run 1": (1, NO, NO, NO),
    "start_mgpu 2 --run 2": (1, 1, 1, NO),
    "start_plan all --run 2": (1, NO, 1, NO),
    "begin --run 2": (2, NO, 2, NO),
    "preflight {}": (2, NO, 2, NO),  # 2: no question, but allowed
    "validate all --run 1": (1, 1, 1, NO),  # 1: the console's own, but allowed
    "validate_plan --run 1": (1, 1, 1, NO),  # 1: no such plan, but allowed
    "validate_begin --run 1": (2, 2, 2, NO),  # 2: no order, but allowed
    "submit": (2, NO, 2, NO),
    "revoke a": (1, 1, NO, NO),  # 1: the console's own, but allowed
    "revoke b": (1, NO, NO, NO),
    "revocation a": (YES, YES, YES, YES),
    "deny a": (2, 2, NO, NO),  # 2: no denial, but allowed
    "deny b": (2, NO, NO, NO),
    "can amy abort --role lead --org a": (YES, YES, YES, YES),
    "certs": (1, 1, 1, 1),  # 1: no kit, but allowed
    "audit": (1, NO, NO, NO),
    "policy": (YES, YES, YES, YES),
    "report_version all": (YES, YES, YES, YES),
    "report_resources client a": (YES, YES, YES, YES),
    "sessions": (YES, YES, YES, YES),
    "passwd": (1, 1, 1, 1),
    "logs 1": (YES, YES, YES, YES),
    "show_errors all": (YES, YES, YES, YES),
    "show_stats all": (YES, YES, YES, YES),
    "reset_errors client a": (YES, YES, YES, NO),
    "reset_errors client b": (YES, NO, NO, NO),
    "prove": (2, 2, 2, 2),  # 2: no password
    "change_password": (2, 2, 2, 2),
    "pwd client a": (YES, YES, YES, NO),
    "ls client b": (YES, NO, NO, NO),
    "ls server": (NO, NO, NO, NO),  # off unless the policy lists it
    "cat client a logs/x": (YES, YES, YES, NO),
    "head client a logs/x": (YES, YES, YES, NO),
    "tail client b logs/x": (YES, NO, NO, NO),
    "grep client a x logs/x": (YES, YES, YES, NO),
    "env client b": (YES, NO, NO, NO),
    "info": (YES, YES, YES, NO),
    "upload_file x": (1, 1, 1, NO),  # 1: the console's own, but allowed
    "announce_file x y 1": (2, 2, 2, NO),  # 2: no digest, but allowed
    "delete_file transfer/x": (1, 1, 1, NO),  # 1: there is none, but allowed
    "download_file runs/1/log.txt": (1, NO, NO, NO),
    "download_file runs/2/log.txt": (1, 1, 1, NO),
    "download_folder runs/1": (1, NO, NO, NO),
    "download_folder transfer": (1, 1, 1, NO),
    "lpwd": (1, 1, 1, 1),
    "lls": (1, 1, 1, 1),
    "lcd": (1, 1, 1, 1),
    "whoami": (YES, YES, YES, YES),
    "ops": (YES, YES, YES, YES),
    "help": (YES, YES, YES, YES),
}


@pytest.fixture
def busy(control):
    control.replies = {"a": SiteReply("ok", {}), "b": SiteReply("ok", {})}
    control.lifecycle.tasks = {"a": ("1/7/train/a",), "b": ("2/7/train/b",)}
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


def test_the_run_that_a_command_is_about_is_at_hand_before_it_is_judged(control):
    rights = Rights(Path("none"), "hub", control)
    control.run_views = {1: run(1, status="finished"), 3: run(3)}
    asyncio.run(rights.prepare("view", SimpleNamespace(run=1)))
    asyncio.run(rights.prepare("view", SimpleNamespace(source_run=3)))
    for nothing in (SimpleNamespace(source_run=None), SimpleNamespace(run=7), SimpleNamespace()):
        asyncio.run(rights.prepare("view", nothing))
    assert control.loaded == [1, 3]


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


def test_what_a_role_can_ever_do(console):
    console.policy.write_text(
        "roles: {member: {view: any, sys_info: [], shutdown: ['o:site']}, lead: {}}\n"
    )
    console.rights.reload()
    may = console.rights.ever
    assert may(USERS["max"], "session", "help")
    assert may(USERS["max"], "view", "check_status")
    assert may(USERS["max"], "operate", "shutdown"), "somewhere: at the own sites"
    assert not may(USERS["max"], "operate", "restart")
    assert not may(USERS["max"], "view", "sys_info")
    assert not may(USERS["lea"], "view", "check_status")
    assert may(USERS["amy"], "operate", "restart")


def test_a_log_that_cannot_be_read_now_is_not_waited_for_where_all_wait(control, monkeypatch):
    async def load(number):
        raise UnavailableError("the database does not answer")

    monkeypatch.setattr(control, "load", load)
    rights = Rights(Path("none"), "hub", control)
    control.run_views = {1: run(1, status="finished")}
    with pytest.raises(UnavailableError):
        asyncio.run(rights.prepare("view", SimpleNamespace(run=1)))
