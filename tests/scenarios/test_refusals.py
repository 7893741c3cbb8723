"""What must be refused, each by name, while the rest goes on."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from flplatform.core import events as ev
from provisioning.provision import revoke
from workspaces.running import ADMIN, Federation

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]


def start(running, kind: str, kit) -> subprocess.CompletedProcess[str]:
    """Run an entry point that is expected to refuse."""
    command = [sys.executable, "-m", f"flplatform.entrypoints.{kind}", str(kit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_tampered_kit_does_not_start(federation):
    running = federation("site-1")
    script = running.kit("site-1") / "startup" / "fed_client.json"
    script.write_text(script.read_text().replace("site-1-org", "evil-org"))
    done = start(running, "client", running.kit("site-1"))
    assert done.returncode == 78
    assert "fed_client.json" in done.stderr
    assert not (running.kit("site-1") / "state" / "ready.json").exists()


def test_loose_key_does_not_start(federation):
    running = federation("site-1")
    (running.kit("site-1") / "startup" / "participant.key").chmod(0o644)
    done = start(running, "client", running.kit("site-1"))
    assert done.returncode == 78
    assert "participant.key" in done.stderr


def test_broken_local_file_names_line_and_key(federation):
    running = federation("site-1")
    running.local("site-1", "policy.yml", "submiters: [any]\nminimum_isolation: maybe\n")
    done = start(running, "client", running.kit("site-1"))
    assert done.returncode == 78
    assert "policy.yml:1" in done.stderr
    assert "did you mean 'submitters'" in done.stderr
    assert "policy.yml:2" in done.stderr


def test_revoked_site_is_refused_and_the_rest_goes_on(federation):
    running = federation("site-1", "site-2")
    revoke(running.folder, "site-2")
    running.start("server")
    running.start("site-1")
    running._spawn("site-2")
    audit = running.kit("server") / "state" / "audit.jsonl"
    running.wait_for(
        lambda: (
            running.processes["site-2"].poll() is not None
            or (audit.exists() and "is revoked" in audit.read_text())
        ),
        "the revoked site to be refused",
    )
    running.steps_job(min_clients=1)
    done = running.console("submit_job steps --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    opened = running.wait_event(1, ev.RunOpened)
    assert opened.sites == ("site-1",)


def test_foreign_federation_is_refused(federation):
    running, other = federation("site-1"), federation("site-1")
    running.start("server")
    other.ports = running.ports
    other.local("site-1", "overrides.yml", other._servers("fl_port"))
    other.local(ADMIN, "overrides.yml", other._servers("admin_port"))
    other._spawn("site-1")
    other.wait_for(lambda: "cannot register" in other.output("site-1"), "a refusal", "site-1")
    done = other.console("check_status all")
    assert done.returncode == 4
    assert running.ask("check_status server")["ok"]


def test_wrong_password(federation):
    running = federation("site-1")
    running.start("server")
    wrong = running.folder / "wrong.txt"
    wrong.write_text("not the passphrase\n")
    wrong.chmod(0o600)
    secret = running.passphrase_file()
    kept = secret.read_text()
    secret.write_text(wrong.read_text())
    done = running.console("check_status server")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "passphrase" in done.stderr
    secret.write_text(kept)
    assert running.ask("check_status server")["ok"]


def test_policy_that_says_no_is_a_row_with_its_rule(federation):
    running = federation("site-1", "site-2")
    running.local("site-2", "policy.yml", "byoc: [none]\n")
    running.start_all()
    running.steps_job(min_clients=1, rounds=1)
    done = running.console("submit_job steps --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byoc" in done.stdout
    assert running.wait_event(1, ev.RunEnded).status == "finished"


def test_unmapped_data_declines(federation):
    running = federation("site-1", "site-2")
    running.local("site-2", "datasets.yml", "")
    running.start_all()
    running.steps_job(min_clients=1, rounds=1)
    done = running.console("submit_job steps --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "datasets.yml: gate is missing" in done.stdout


def test_bad_job_file_lists_every_problem(federation):
    running = federation("site-1")
    running.start_all()
    running.steps_job()
    job = running.kit(ADMIN) / "transfer" / "steps" / "job.yml"
    job.write_text(job.read_text().replace("rounds: 2", "rounds: many\nround: 3"))
    done = running.console("submit_job steps")
    assert done.returncode == 2
    assert "rounds" in done.stderr
    assert "round: unknown key" in done.stderr


def test_member_may_look_but_not_submit(federation):
    folder_of = federation("site-1")  # for its temporary folder
    with Federation(
        folder_of.folder / "second",
        {"site-1": {}},
        {ADMIN: "project_admin", "mia@example.org": "member"},
    ) as running:
        running.start_all()
        assert running.ask("check_status all", admin="mia@example.org")["ok"]
        done = running.console("shutdown server", admin="mia@example.org")
        assert done.returncode == 3
        assert "rule" in done.stderr + done.stdout
        assert running.processes["server"].poll() is None


def test_unknown_command_and_wrong_argument(federation):
    running = federation("site-1")
    running.start("server")
    done = running.console("chek_status all")
    assert done.returncode == 2
    assert "check_status" in done.stderr
    done = running.console("set_min_clients three")
    assert done.returncode == 2
    assert "usage" in (done.stderr + done.stdout).lower()


def test_graceful_restart_of_the_server_is_asked_for(federation):
    running = federation("site-1")
    running.start_all()
    assert running.ask("restart server")["ok"]
    assert running.processes["server"].wait(timeout=60) == 75


def test_copied_kit_of_a_living_site_cannot_use_its_token(federation):
    """A second process with the same kit takes over: one site, one slot."""
    running = federation("site-1")
    running.start_all()
    copy = running.folder / "kits" / "copy"
    shutil.copytree(running.kit("site-1"), copy, ignore=shutil.ignore_patterns("state", "logs"))
    before = datetime.now(UTC)
    process = subprocess.Popen(
        [sys.executable, "-m", "flplatform.entrypoints.client", str(copy)],
        stderr=subprocess.DEVNULL,
    )
    try:
        running.wait_for((copy / "state" / "ready.json").exists, "the copy to serve")
        status = running.ask("check_status all")
        assert [row["target"] for row in status["rows"]] == ["server", "site-1"]
        assert datetime.now(UTC) > before
    finally:
        process.terminate()
        process.wait(timeout=60)
