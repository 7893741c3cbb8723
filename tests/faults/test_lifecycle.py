"""Draining, aborts in every phase, poison tasks and old protocols."""

import time

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.faults.proxy import Proxy
from tests.scenarios.test_why import Talk

pytestmark = pytest.mark.timeout(600 if LONG else 300)

ABORT_S = 10.0
"""REL-18: what a run holds is free so long after its abort."""
DRAIN_S = 30.0
"""REL-20: so long may a process take to end when it is asked to."""

BIG = {"rounds": 1, "floats": 1_000_000}


@pytest.mark.faults_long
@pytest.mark.parametrize("name", ["server", "site-1"])
def test_asked_to_end_in_the_middle_of_an_upload(faulty, name):
    federation = faulty("site-1", "site-2")
    federation.start("server")
    with Proxy(federation.ports["fl_port"]) as proxy:
        federation.detours["site-1"] = proxy.port
        federation.redirect()
        federation.start("site-1", "site-2")
        let_go = federation.hold("site-1", 1)
        run = federation.submit("disturbed", **BIG)
        federation.wait_event(run, ev.UpdateAccepted, round=1, site="site-2")
        proxy.change(bytes_s=1_000_000)
        let_go()
        incoming = federation.kit("server") / "state" / "blobs" / "incoming"
        federation.wait_for(
            lambda: any(part.stat().st_size for part in incoming.glob("*.part")), "an upload"
        )
        began = time.monotonic()
        assert federation.terminate(name) == 0
        assert time.monotonic() - began < DRAIN_S
        federation.tally.fault("SIGTERM in an upload")
        proxy.change()
        federation.start(name)
        federation.tally.recovered()
        federation.wait_event(run, ev.RunEnded)
        federation.check_against_calm(run, **BIG)


def deploying(federation) -> int:
    federation.start("server", "site-1")
    federation.arm("site-1", 1, "hold", ("replace",), "start.json")
    name = federation.job("aborted", rounds=3)
    done = federation.console(f"submit_job {name}")
    assert done.returncode == 0, done.stdout + done.stderr
    federation.wait_for(lambda: federation.fired("site-1"), "the site to take the run on")
    return federation.run_of(name)


def training(federation) -> int:
    federation.start_all()
    federation.hold("site-1", 2)
    run = federation.submit("aborted", rounds=3)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    return run


def spooling(federation) -> int:
    federation.start_all()
    federation.arm("site-1", 1, "hold", ("rename",), "spool/entries")
    run = federation.submit("aborted", rounds=3)
    federation.wait_for(lambda: federation.fired("site-1"), "a result to be spooled")
    return run


def uploading(federation) -> int:
    federation.start_all()
    let_go = federation.hold("site-1", 1)
    run = federation.submit("aborted", rounds=3, floats=2000)
    federation.wait_event(run, ev.UpdateAccepted, round=1, site="site-2")
    federation.arm("server", 1, "hold", ("replace",), ".part")
    let_go()
    federation.wait_for(lambda: federation.fired("server"), "an upload to be nearly whole")
    return run


def aggregating(federation) -> int:
    federation.start_all()
    federation.arm("server", 1, "hold", ("fsync",), "-blob")
    run = federation.submit("aborted", rounds=3)
    federation.wait_for(lambda: federation.fired("server"), "the aggregation to be nearly done")
    return run


def validating(federation) -> int:
    federation.start_all()
    federation.arm("site-1", 1, "hold", ("rename",), "validate.global")
    run = federation.submit("aborted", rounds=1)
    federation.wait_for(lambda: federation.fired("site-1"), "a model to be validated")
    return run


LATER = pytest.mark.faults_long


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(deploying, marks=LATER),
        *(pytest.param(each, marks=LATER) for each in (training, spooling, uploading, validating)),
        aggregating,
    ],
)
def test_abort_in_every_phase(faulty, phase):
    federation = faulty("site-1", "site-2") if phase is not deploying else faulty("site-1")
    run = phase(federation)
    began = time.monotonic()
    first = federation.ask(f"abort all --run {run}")
    assert first["ok"], first
    ended = federation.wait_event(run, ev.RunEnded)
    assert ended.status == "aborted"
    federation.tally.fault(f"abort while {phase.__name__}")
    for name in ("server", *federation.processes):
        federation.disarm(name)
    if phase is deploying:
        told = f"run {run} was given up before it began here: aborted"
        federation.wait_for(lambda: told in federation.log_text("site-1"), told)
    for site in federation.sites:
        folder = federation.kit(site) / "state" / "runs"
        federation.wait_for(
            lambda site=site, folder=folder: (
                not federation.run_processes(site) and not any(folder.glob("run-*"))
            ),
            f"{site} to let go of the run",
        )
    took = time.monotonic() - began
    assert took < ABORT_S + 30, f"{took:.1f} s"  # with a console's start, on a busy machine
    again = federation.ask(f"abort all --run {run}")
    assert "aborted" in str(again), again
    federation.check(run, status="aborted")
    next_job = federation.job("next", rounds=1, min_clients=1)
    follows = federation.console(f"submit_job {next_job} --sites site-1")
    assert follows.returncode == 0, follows.stdout + follows.stderr
    federation.check_ended("next")


def test_a_poison_task_fails_alone(faulty):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    (federation.gate / "site-2-1-crash").touch()
    run = federation.submit("poison", rounds=3, min_clients=1)
    failed = federation.wait_event(run, ev.TaskFailed, site="site-2")
    assert "exit status 9" in failed.error, failed
    federation.tally.fault("run process ends in every try", 3)
    federation.wait_event(run, ev.RunEnded)
    later = [e.site for e in federation.events(run) if isinstance(e, ev.UpdateAccepted)]
    assert later.count("site-1") == 3
    assert later.count("site-2") == 2, "only its poisoned task is lost"
    assert federation.log_text("site-2").count("crashed (") == 3
    federation.check(run)


def test_another_protocol_is_refused_with_both_versions(faulty):
    federation = faulty("site-1", "site-2")
    federation.variables["site-1"] = {"FLP_FAULTS_PROTOCOL": "2"}
    federation.start_all()
    told = "this server speaks protocol 1, the site 2"
    federation.wait_for(lambda: told in federation.log_text("site-1"), "the site to hear it")
    federation.tally.fault("another protocol")
    console = Talk(federation)
    try:
        console.until(lambda found: told in str(found), "the protocols", "site-1")
    finally:
        console.close()
    assert not federation.ended("site-1"), "it may be the server that is installed anew"
