"""A name is revoked while real processes are at work, and what the server then withholds."""

import shutil

import pytest

from workspaces.running import ADMIN, Federation

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]

AMY = "amy@example.org"


@pytest.fixture
def running(federation):
    folder = federation("site-1").folder  # for its temporary folder
    admins = {ADMIN: "project_admin", AMY: "project_admin"}
    with Federation(folder / "f", {"site-1": {}, "site-2": {}}, admins, heartbeat_s=0.5) as made:
        yield made


def states(answer):
    return {row["target"]: row["cells"].get("state") for row in answer["rows"]}


def test_a_revoked_name_is_refused_everywhere_until_it_is_undone(running):
    running.start_all()
    running.wait_for(lambda: running.ask("check_status client", AMY)["ok"], "the sites to register")
    answer = running.ask(f"revoke {AMY} --reason left")
    assert answer["ok"], str(answer)[:3000]
    assert states(answer) == {"server": "revoked", "site-1": "revoked", "site-2": "revoked"}
    done = running.console("check_status all", admin=AMY)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"was revoked by {ADMIN}" in done.stderr

    answer = running.ask("revoke site-2")
    assert states(answer) == {"server": "revoked", "site-1": "revoked"}, answer
    running.wait_for(
        lambda: "site-2 was revoked by" in running.output("site-2"), "site-2 to be refused"
    )

    # A server that has lost the denial, or hides it, does not make the site forget it.
    running.kill("site-1")
    running.kill("site-2")
    running.terminate("server")
    shutil.rmtree(running.kit("server") / "state")
    (running.kit("server") / "log-id").unlink()  # or it would not begin anew
    running.start("server", "site-1")

    def answer_to_amy() -> str:
        (row,) = running.ask("sys_info client site-1", admin=AMY)["rows"]
        return f"{row['status']} {row['detail']}"

    running.wait_for(lambda: answer_to_amy().startswith("refused"), "site-1 to register")
    assert f"{AMY} was revoked by {ADMIN}" in answer_to_amy()
    assert states(running.ask(f"revoke --kind admin --undo {AMY}"))["site-1"] == "undone"
    assert answer_to_amy().startswith("ok")
