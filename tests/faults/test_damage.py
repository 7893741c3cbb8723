"""What lies on the disk is damaged while a process is stopped: repaired, or refused by name."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.entrypoints.process import EXIT_CONFIG
from flplatform.files.durable import write_atomic
from tests.faults.conftest import LONG

pytestmark = pytest.mark.timeout(900 if LONG else 300)

ENDED_BY_ITSELF = "a defect ends the process"


def cut(path: Path) -> None:
    """Lose the second half."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


DAMAGES = (cut, flip)
LATER = pytest.mark.faults_long


def begin(federation) -> int:
    """Return a run whose second round waits for site-1."""
    federation.start_all()
    federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=3)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    return run


def starts_or_names(federation, name: str, path: Path, what: str = "") -> bool:
    """Start a process on a damaged file; return whether it serves.

    One that does not must have named the file, or `what`, and not stumbled over it.
    """
    before = len(federation.log_text(name))
    federation.tally.fault(f"damaged file of a {name.split('-')[0]}")
    federation.keep_ports()
    federation._spawn(name)
    ready = federation.kit(name) / "state" / "ready.json"
    federation.wait_for(lambda: ready.exists() or federation.ended(name), f"{name} to decide")
    told = federation.log_text(name)[before:]
    assert ENDED_BY_ITSELF not in told, f"{path.name}:\n{told[-1500:]}"
    if federation.ended(name):
        assert federation.processes.pop(name).wait() == EXIT_CONFIG
        assert (what or path.name.removesuffix(".head")) in told, told
        return False
    federation.wait_ready(name)
    return True


def small_files(federation, name: str) -> list[Path]:
    """Return the files of a state that a start reads."""
    state = federation.kit(name) / "state"
    found = [path for path in state.iterdir() if path.is_file() and path.stat().st_size]
    found += list((state / "runs").glob("*.json"))
    skip = ("events.db-shm", "ready.json", "process.lock")
    return sorted(p for p in found if p.name not in skip and not p.name.endswith(".lock"))


@pytest.mark.parametrize("damage", DAMAGES if LONG else DAMAGES[:1])
@pytest.mark.parametrize("name", ["server", pytest.param("site-1", marks=LATER)])
def test_each_damaged_file_is_repaired_or_named(faulty, name, damage):
    federation = faulty("site-1", "site-2")
    begin(federation)
    assert federation.console("check_status client", "disable_client site-2").returncode == 0
    federation.terminate(name)  # so that the event log is in one file
    files = small_files(federation, name)
    assert len(files) >= 3, files
    problems = []
    for path in [path for path in files if not path.name.endswith("-wal")]:
        whole = path.read_bytes()
        damage(path)
        try:
            if starts_or_names(federation, name, path):
                federation.tally.recovered()
                federation.kill_hard(name)
        except AssertionError as error:
            problems.append(str(error))
        path.write_bytes(whole)
    assert not problems, "\n\n".join(problems)


def test_a_damaged_event_log_is_refused_by_name(faulty):
    federation = faulty("site-1", "site-2")
    begin(federation)
    federation.terminate("server")  # so that all is in the one file
    path = federation.kit("server") / "state" / "events.db"
    with closing(sqlite3.connect(path)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek(size)
        file.write(os.urandom(size))
    assert not starts_or_names(federation, "server", path)


@pytest.mark.faults_long
def test_no_server_starts_whose_bars_may_be_lost(faulty):
    federation = faulty("site-1", "site-2")
    begin(federation)
    assert federation.console("disable_client site-2").returncode == 0
    federation.terminate("server")
    path = federation.kit("server") / "state" / "events.db"
    with closing(sqlite3.connect(path)) as database, database:
        lost = database.execute("DELETE FROM events WHERE stream = 'federation' AND seq = 1")
        assert lost.rowcount == 1
    assert not starts_or_names(federation, "server", path, "federation: event 1 is missing")


@pytest.mark.faults_long
@pytest.mark.parametrize("damage", [cut, pytest.param(Path.unlink, marks=LATER)])
def test_a_damaged_result_in_the_spool_is_made_again(faulty, damage):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    federation.arm("site-1", 1, "killed", ("rename",), "spool/entries")
    run = federation.submit("disturbed", rounds=3)
    federation.wait_for(lambda: federation.ended("site-1"), "the site to die with a result")
    (entry,) = (federation.kit("site-1") / "state" / "spool" / "entries").iterdir()
    damage(entry / "result.safetensors")
    federation.tally.fault("damaged spool")
    federation.revive("site-1")
    assert f"{entry.name} is dropped, its task will be done again" in federation.log_text("site-1")
    federation.wait_event(run, ev.RunEnded)
    federation.check_against_calm(run, rounds=3)


@pytest.mark.faults_long
def test_a_run_that_cannot_be_resumed_is_named(faulty):
    federation = faulty("site-1", "site-2")
    run = begin(federation)
    federation.kill("site-1")
    cut(federation.kit("site-1") / "state" / "runs" / f"run-{run}" / "start.json")
    federation.tally.fault("damaged run of a site")
    federation.start("site-1")
    assert f"run-{run} is not resumed" in federation.log_text("site-1")
    failed = federation.wait_event(run, ev.TaskFailed, site="site-1")
    assert f"does not have run {run}" in failed.error
    assert federation.wait_event(run, ev.RunEnded).status == "failed"
    federation.check(run, status="failed")


@pytest.mark.faults_long
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_package_that_a_site_has_lost_is_fetched_again(faulty, damage):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    let_go = federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=3)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    federation.kill("site-1")
    (opened,) = [e for e in federation.events(run) if isinstance(e, ev.RunOpened)]
    blobs = federation.kit("site-1") / "state" / "blobs"
    damage(blobs / opened.job_blob.digest.partition(":")[2])
    federation.tally.fault("damaged run of a site")
    federation.start("site-1")
    assert f"run {run} waits, try 1 failed" in federation.log_text("site-1")
    let_go()
    federation.wait_event(run, ev.RunEnded)
    federation.check_against_calm(run, rounds=3)


@pytest.mark.faults_long
@pytest.mark.parametrize("what", ["update", "model"])
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_damaged_blob_of_the_server_never_counts(faulty, what, damage):
    """It is found before anything is computed of it: the run waits until it is put back."""
    federation = faulty("site-1", "site-2")
    run = begin(federation)
    federation.kill("server")
    kind = ev.UpdateAccepted if what == "update" else ev.RoundOpened
    (event,) = [e for e in federation.events(run) if isinstance(e, kind) and e.round == 2]
    digest = event.digest if what == "update" else event.model.digest
    path = federation.kit("server") / "state" / "blobs" / digest.partition(":")[2]
    whole = path.read_bytes()
    damage(path)
    federation.tally.fault(f"damaged {what} of the server")
    (federation.gate / "site-1-2-train").unlink()
    assert starts_or_names(federation, "server", path)
    told = "aggregate/2 waits until it is mended: "
    federation.wait_for(lambda: told in federation.log_text("server"), told)
    why = str(federation.ask(f"why {run}"))
    assert "a model that is lost or damaged at the server" in why
    assert path.name in why
    write_atomic(path, whole, 0o444)
    federation.tally.recovered()
    federation.wait_event(run, ev.RunEnded)
    federation.check_against_calm(run, rounds=3)


@pytest.mark.faults_long
def test_a_damaged_model_of_a_site_is_fetched_again(faulty):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    done = federation.console(f"submit_job {federation.job('calm', rounds=3)} --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    digest = federation.final_digest(federation.run_of("calm"))
    federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=3)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    federation.kill("site-1")
    (event,) = [e for e in federation.events(run) if isinstance(e, ev.RoundOpened) and e.round == 2]
    flip(federation.kit("site-1") / "state" / "blobs" / event.model.digest.partition(":")[2])
    federation.tally.fault("damaged model of a site")
    (federation.gate / "site-1-2-train").unlink()
    federation.start("site-1")
    federation.wait_event(run, ev.RunEnded)
    federation.check(run, digest)
