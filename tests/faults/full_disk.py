"""`python -m tests.faults.full_disk WHO FOLDER`: a federation one of whose disks gets full.

It must run where it may mount: `unshare -Urm`, see `test_full_disk.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

from flplatform.core import events as ev
from tests.faults.federations import Faulty
from tests.scenarios.test_why import Talk, cause_of

ROUNDS = 3
FLOATS = 100_000
DISK_BYTES = 24 << 20


def fill(ballast: Path, leave: int) -> None:
    """Take all space of a file system but so many bytes."""
    status = os.statvfs(ballast.parent)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)


def main(who: str, folder: Path) -> None:
    """Fill the disk in a round, see that it is told, make room, and see that the run goes on."""
    federation = Faulty(folder, ("site-1", "site-2"))
    disk = federation.kit(who) / "state"
    disk.mkdir(mode=0o700)
    small = ["-o", f"size={DISK_BYTES},mode=0700"]
    subprocess.run(["mount", "-t", "tmpfs", *small, "none", disk], check=True)
    try:
        federation.start_all()
        let_go = federation.hold("site-1", 2)
        run = federation.submit("disturbed", rounds=ROUNDS, floats=FLOATS)
        federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
        before = federation.events(run)
        fill(disk / "ballast", leave=16_384)
        let_go()
        console = Talk(federation)
        console.until(
            lambda found: cause_of(found, "site-1") in ("disk_full", "refused", "retrying"),
            "a full disk",
            str(run),
        )
        console.close()
        assert federation.events(run)[: len(before)] == before
        assert not federation.over(run), federation.events(run)[-1]
        (disk / "ballast").unlink()
        federation.wait_event(run, ev.RunEnded)
        federation.check_against_calm(run, rounds=ROUNDS, floats=FLOATS)
    finally:
        print(federation.log_text("server")[-2000:], federation.log_text("site-1")[-2000:])
        federation.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
