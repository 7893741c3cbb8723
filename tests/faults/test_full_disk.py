"""A disk that is really full, and descriptors that run out.

A full table of processes is out of reach: filling it would hit everything else on this machine.
What comes of it at a site, a run process that cannot be started, is an error of starting like
others (`tests/unit/client`).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flplatform.core import events as ev
from tests.scenarios.conftest import ROOT

pytestmark = pytest.mark.timeout(330)

LATER = pytest.mark.faults_long


@pytest.fixture
def short():
    """A folder short enough for the sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="flf-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def on_a_small_disk(module, who, folder):
    """Play a module of `tests.faults` where it may mount."""
    probe = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs none "$1"', "sh", folder]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no user namespaces here: a small file system cannot be mounted")
    command = ["unshare", "-Urm", sys.executable, "-m", f"tests.faults.{module}", who, folder / "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("who", ["server", pytest.param("site-1", marks=LATER)])
def test_a_disk_that_is_full_for_a_while(short, tally, who):
    tally.fault("full disk")
    on_a_small_disk("full_disk", who, short)
    tally.runs += 1
    tally.recovered()


@pytest.mark.parametrize("who", ["server", pytest.param("site-1", marks=LATER)])
def test_a_disk_that_is_full_at_the_start(short, tally, who):
    """For the first time, and after a kill: no crash, and it goes on by itself."""
    tally.fault("full disk at the start", 2)
    on_a_small_disk("full_start", who, short)
    for _ in range(2):
        tally.recovered()


@LATER
@pytest.mark.parametrize("name", ["server", "site-1"])
def test_no_descriptors_for_a_while(faulty, name):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    let_go = federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=4)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    federation.arm(name, 1, "EMFILE", ("open",), "incoming", times=2)
    federation.tally.fault("EMFILE", 2)
    let_go()
    federation.wait_for(lambda: federation.fired(name), "descriptors to be missing")
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    federation.disarm(name)
    federation.check_against_calm(run, rounds=4)
