"""Stands for torchrun where there is no torch: starts ranks in sessions of their own."""

from collections.abc import Sequence

SOURCE = """
import os, subprocess, sys, time
count, argv = int(sys.argv[1]), sys.argv[2:]
ranks = []
for rank in range(count):
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    ranks.append(subprocess.Popen(argv, env={**os.environ, **own}, start_new_session=True))
while any(rank.poll() is None for rank in ranks):
    if any(rank.poll() for rank in ranks):
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.wait()
        sys.exit(1)
    time.sleep(0.01)
sys.exit(any(rank.returncode for rank in ranks))
"""


def fake_torchrun(python: str, processes: int, argv: Sequence[str]) -> list[str]:
    """As `client.ranks.torchrun`; the ranks know their numbers and no address."""
    return [python, "-P", "-c", SOURCE, str(processes), *argv]
