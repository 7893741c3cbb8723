"""The launcher, run as it is: by path, without site packages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from flplatform.client.sandbox import LAUNCHER


def argv(*command: str, mounts=(), parent: int | None = None) -> list[str]:
    plan = {"parent": parent or os.getpid(), "mounts": mounts, "devices": [], "folder": "/tmp"}
    return [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(plan), *command]


def sleeping(seconds: str) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] == ["sleep", seconds]
    ]


@pytest.mark.parametrize(
    ("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -11 $$", 139), ("true", 0)]
)
def test_the_status_is_that_of_the_command(script, status):
    assert subprocess.run(argv("/bin/sh", "-c", script)).returncode == status


def test_what_the_command_leaves_is_killed():
    script = "sleep 86301 & setsid sleep 86301 & (env -i setsid sleep 86301 &) ; sleep 0.2; exit 3"
    result = subprocess.run(argv("/bin/sh", "-c", script), capture_output=True, timeout=60)
    assert result.returncode == 3
    assert sleeping("86301") == []


def test_without_mounts_the_users_rights_stay():
    read = ["/bin/grep", "CapEff", "/proc/self/status"]
    rights = [subprocess.check_output(line) for line in (read, argv(*read))]
    assert rights[0] == rights[1]


def test_sigterm_kills_all():
    process = subprocess.Popen(argv("/bin/sh", "-c", "trap '' TERM; setsid sleep 86302 & wait"))
    while not sleeping("86302"):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert sleeping("86302") == []


def test_no_command():
    result = subprocess.run(argv("/nowhere"), capture_output=True, text=True)
    assert result.returncode == 127
    assert result.stderr == "/nowhere: No such file or directory\n"


def test_a_parent_that_is_gone_already():
    assert subprocess.run(argv("/bin/true", parent=1 << 22)).returncode == 125


def test_a_mount_that_fails_is_told():
    mounts = [["read", "/nowhere", "/nowhere"]]
    result = subprocess.run(argv("/bin/true", mounts=mounts), capture_output=True, text=True)
    assert result.returncode == 125
    assert result.stderr.startswith("sandbox: ")


@pytest.mark.may_skip
@pytest.mark.skipif(os.geteuid() != 0, reason="is run by an ordinary user anyway")
def test_an_ordinary_user_gets_the_same():
    """The other tests here run as root; its rights must not be what makes them pass."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or not Path(python).resolve().is_relative_to("/usr"):
        pytest.skip("no interpreter that another user may run")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        launcher = folder / "launcher.py"
        shutil.copy(LAUNCHER, launcher)
        for sub in ("scratch", "kit"):
            (folder / sub).mkdir()
            os.chown(folder / sub, 65534, 65534)
        (folder / "kit" / "key").write_text("secret")
        mounts = [
            ["write", str(folder / "scratch"), "/tmp"],
            ["hide", str(folder / "kit"), str(folder / "kit")],
        ]
        program = (
            "import json, os, subprocess, sys;"
            f"plan = dict(parent=os.getpid(), mounts={mounts!r}, devices=[], folder='/tmp');"
            f"script = 'id -u; ls {folder / 'kit'}; touch /tmp/mine && echo $$';"
            f"sys.exit(subprocess.call([{python!r}, '-I', '-S', {str(launcher)!r},"
            " json.dumps(plan), '/bin/sh', '-c', script]))"
        )
        result = subprocess.run(
            [python, "-I", "-c", program],
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            cwd="/",
        )
        if "unshare: Operation not permitted" in result.stderr:
            pytest.skip("this kernel lets only root make user namespaces")
        assert (result.stdout, result.stderr) == ("65534\n2\n", "")
        assert (folder / "scratch" / "mine").exists()


WITHOUT_DESCRIPTORS = """
import importlib.util, os, resource, signal, subprocess, sys
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
launcher._prctl(launcher.PR_SET_CHILD_SUBREAPER, 1)
look, looked = launcher._descendants, []
limits = resource.getrlimit(resource.RLIMIT_NOFILE)

def without():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3 if len(looked) < 2 else limits[0], limits[1]))
    looked.append(1)
    return look()

launcher._descendants = without
child = subprocess.Popen(["/bin/sh", "-c", "sleep 86304 & exec sleep 86304"])
while len(look()) < 2:
    pass
signal.signal(signal.SIGTERM, launcher._stop)
os.kill(child.pid, signal.SIGKILL)
launcher._wait(child.pid, True)
"""


def test_a_launcher_without_descriptors_looks_until_nothing_is_left():
    done = subprocess.run([sys.executable, "-c", WITHOUT_DESCRIPTORS, LAUNCHER], timeout=60)
    assert done.returncode == 137
    assert sleeping("86304") == []


PASSES_OVER = """
import importlib.util, os, signal, subprocess, sys
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
launcher._prctl(launcher.PR_SET_CHILD_SUBREAPER, 1)
look, looked = launcher._descendants, []

def passing_over():
    looked.append(1)
    return look() if len(looked) > 1 else []

launcher._descendants = passing_over
child = subprocess.Popen(["/bin/sh", "-c", "sleep 86303 & exec sleep 86303"])
while len(look()) < 2:
    pass
signal.signal(signal.SIGTERM, launcher._stop)
os.kill(child.pid, signal.SIGKILL)
launcher._wait(child.pid, True)
"""


def test_what_was_passed_over_is_killed_at_the_next_look():
    """A process whose parent ends while /proc is read seems to be nobody's."""
    done = subprocess.run([sys.executable, "-c", PASSES_OVER, LAUNCHER], timeout=60)
    assert done.returncode == 137
    assert sleeping("86303") == []


ASKED_WHILE_IT_SWEEPS = """
import importlib.util, os, signal, subprocess, sys
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
launcher._prctl(launcher.PR_SET_CHILD_SUBREAPER, 1)
look = launcher._descendants

def asked():
    os.kill(os.getpid(), signal.SIGTERM)
    return look()

launcher._descendants = asked
script = "sleep 86305 & exec sleep 86305"
child = subprocess.Popen(["/bin/sh", "-c", script], stderr=subprocess.DEVNULL)
while len(look()) < 2:
    pass
os.kill(child.pid, signal.SIGKILL)
launcher._wait(child.pid, True)
"""


def test_sigterm_while_it_sweeps_does_not_stop_it():
    """The site may be killed right when the command has ended."""
    command = [sys.executable, "-c", ASKED_WHILE_IT_SWEEPS, LAUNCHER]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (137, b"")
    assert sleeping("86305") == []
