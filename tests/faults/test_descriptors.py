"""No descriptor is left, for real: connections and files take them all, and give them back."""

import os
import random
import socket
import time
from contextlib import ExitStack, contextmanager

import psutil
import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from workspaces.running import Federation

pytestmark = pytest.mark.timeout(600 if LONG else 300)

SPARE = 20
"""Descriptors that a process may open beyond those that it needs when nothing is going on."""
MORE = 40
"""Connections beyond what is spare: some wait in the kernel."""


def start(federation, name: str) -> None:
    """Start all, one of them without what could inject faults: that opens files itself."""
    spawn = federation._spawn

    def spawn_one(each: str) -> None:
        if each == name:
            Federation._spawn(federation, each)
        else:
            spawn(each)

    federation._spawn = spawn_one
    federation.start_all()


def process(federation, name: str) -> psutil.Process:
    return psutil.Process(federation.processes[name].pid)


def limit(federation, name: str, most: int) -> None:
    """Let a participant that runs open so many files, connections among them."""
    found = process(federation, name)
    found.rlimit(psutil.RLIMIT_NOFILE, (most, found.rlimit(psutil.RLIMIT_NOFILE)[1]))


@contextmanager
def crowd(port: int, count: int):
    """Hold connections to a port of this machine, and say nothing."""
    with ExitStack() as held:
        for _ in range(count):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        yield


def none_left(federation, name: str) -> None:
    """Wait until a participant has opened all that it may."""
    found = process(federation, name)
    most = found.rlimit(psutil.RLIMIT_NOFILE)[0]
    federation.wait_for(lambda: found.num_fds() >= most - 1, f"{name} to have {most} files open")


MISSING = ("Too many open files", "no file descriptor is left")
"""What the log says, one or the other."""


def says_what_is_missing(federation, name: str) -> None:
    federation.wait_for(
        lambda: any(text in federation.log_text(name) for text in MISSING),
        f"{name} to say what is missing",
    )


def finish(federation, run: int, name: str, digest: bool = LONG) -> None:
    """See to it that everything is as if nothing had been."""
    federation.wait_event(run, ev.RunEnded)
    federation.tally.recovered()
    assert not federation.ended(name)
    if not digest:
        federation.check(run)
        return
    federation.check_against_calm(run, rounds=4)


@pytest.mark.parametrize(
    "port", ["fl_port", pytest.param("admin_port", marks=pytest.mark.faults_long)]
)
def test_a_crowd_at_the_server(faulty, port):
    """Results are refused and come again; what was accepted stays; newcomers get their turn."""
    federation = faulty("site-1", "site-2")
    start(federation, "server")
    let_go = federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=4)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    found = process(federation, "server")
    base, most = found.num_fds(), found.rlimit(psutil.RLIMIT_NOFILE)[0]
    limit(federation, "server", base + SPARE)
    with crowd(federation.ports[port], SPARE + MORE):
        federation.tally.fault(f"a crowd at the server's {port}")
        none_left(federation, "server")
        let_go()
        says_what_is_missing(federation, "server")
    federation.wait_for(lambda: found.num_fds() <= base + 5, "the crowd to be gone")
    limit(federation, "server", most)
    finish(federation, run, "server")


def test_a_site_that_may_open_nothing_more(faulty):
    """Its result waits with it until something can be opened."""
    federation = faulty("site-1", "site-2")
    start(federation, "site-1")
    let_go = federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=4)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    few = process(federation, "site-1").num_fds()
    most = process(federation, "site-1").rlimit(psutil.RLIMIT_NOFILE)[0]
    limit(federation, "site-1", few)
    federation.tally.fault("a site without descriptors")
    let_go()
    says_what_is_missing(federation, "site-1")
    limit(federation, "site-1", most)
    finish(federation, run, "site-1")


@pytest.mark.faults_long
def test_crowds_come_and_go(faulty):
    """At whatever a server does just then, a descriptor may be missing."""
    federation = faulty("site-1", "site-2")
    start(federation, "server")
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(1 << 24)))
    federation.tally.seeds.append(seed)
    draw = random.Random(seed)
    federation.pace(0.1)
    run = federation.submit("disturbed", rounds=40, floats=20_000)
    found = process(federation, "server")
    most = found.rlimit(psutil.RLIMIT_NOFILE)[0]
    federation.wait_event(run, ev.RoundOpened, round=2)
    base = found.num_fds()
    while not federation.over(run):
        limit(federation, "server", base + draw.randrange(SPARE))
        with crowd(federation.ports["fl_port"], SPARE + MORE):
            federation.tally.fault("a crowd at the server's fl_port")
            until = time.monotonic() + draw.random()
            federation.wait_for(lambda u=until: time.monotonic() > u, "a while")
        limit(federation, "server", most)
        at = len(federation.events(run))
        federation.wait_for(
            lambda at=at: len(federation.events(run)) > at or federation.over(run),
            "the run to go on",
            "server",
        )
    federation.pace(0.0)
    federation.tally.recovered()
    job = federation.job("calm", rounds=40, floats=20_000)
    done = federation.console(f"submit_job {job} --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    federation.check(run, federation.final_digest(federation.run_of("calm")))
