"""`python -m tests.faults.full_start WHO FOLDER`: `start.sh` on a disk that is full.

It must run where it may mount: `unshare -Urm`, see `test_full_disk.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.federations import Faulty
from tests.faults.full_disk import fill
from tests.scenarios.conftest import ROOT

DISK_BYTES = 24 << 20
WAITS = "cannot start yet: the disk is full"
DEADLINE_S = 60.0


class Supervised:
    """A kit on a disk of its own, run by its `start.sh`, whose output lies elsewhere."""

    def __init__(self, kit: Path, output: Path) -> None:
        self.kit, self.output = kit, output
        self.ready = kit / "state" / "ready.json"
        variables = {
            "FLP_PYTHON": sys.executable,
            "FLP_BACKOFF_MS": "1",
            "FLP_MAX_CRASHES": "2",  # the kill is one: another would be the end
            "PYTHONPATH": str(ROOT),
        }
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [kit / "startup" / "start.sh"],
                env=os.environ | variables,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
            )

    def text(self) -> str:
        """Return what it has printed."""
        return self.output.read_text(errors="replace")

    def wait(self, what: str, count: int = 1) -> None:
        """Wait until it has said something so often."""
        until = time.monotonic() + DEADLINE_S
        while self.text().count(what) < count:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, f"{what!r} is missing in: {self.text()}"
            time.sleep(0.05)

    def status(self) -> str:
        """Return what `start.sh --status` says."""
        command = [self.kit / "startup" / "start.sh", "--status"]
        return subprocess.run(command, capture_output=True, text=True).stdout


def main(who: str, folder: Path) -> None:
    """Start on a full disk, for the first time and after a kill, and make room each time."""
    federation = Faulty(folder, ("site-1",))
    kit = federation.kit(who)
    copy = folder / "copy"
    kit.rename(copy)
    kit.mkdir(mode=0o700)
    small = ["-o", f"size={DISK_BYTES},mode=0700"]
    subprocess.run(["mount", "-t", "tmpfs", *small, "none", kit], check=True)
    subprocess.run(["cp", "-a", f"{copy}/.", kit], check=True)
    ballast = kit / "ballast"
    fill(ballast, leave=0)
    run = Supervised(kit, folder / "printed.txt")
    try:
        run.wait("cannot start yet: ")  # the script itself: it cannot note its number
        assert "0 KiB are free on the disk" in run.text(), run.text()
        os.truncate(ballast, ballast.stat().st_size - 4096)
        run.wait(WAITS)  # the program, which was never started before
        ballast.unlink()
        run.wait(" INFO    ready: ")
        pid = json.loads(run.ready.read_bytes())["pid"]
        while (kit / "daemon.pid").read_text() != f"{run.process.pid}\n{pid}\n":
            assert run.process.poll() is None
        fill(ballast, leave=0)
        before = run.text().count(WAITS)
        os.kill(pid, signal.SIGKILL)
        if who == "server":  # it writes as it starts; a site that has all it needs does not
            run.wait(WAITS, before + 1)
            assert not run.ready.exists()
            assert "0 KiB are free on the disk" in run.status()
        ballast.unlink()
        run.wait(" INFO    ready: ", 2)
        assert run.text().count("exit code") == 1, "only the kill is a crash"
    finally:
        run.process.terminate()
        run.process.wait(timeout=DEADLINE_S)
        print(run.text()[-6000:])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
