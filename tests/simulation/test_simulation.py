"""Some histories with every test run; `python -m tests.simulation` plays as many as there is time.

They are played in interpreters of their own: the simulated machine is put under the programs by
replacing what they import, and the order of hashes belongs to a seed.
"""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def simulate(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line of the simulation."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def demand_none(arguments: Sequence[str]) -> None:
    found = simulate(*arguments)
    assert found.returncode == 0, found.stdout + found.stderr


def test_fixed_seeds_violate_nothing() -> None:
    demand_none(["--seeds", "0:100000", "--seconds", "7", "--jobs", "1"])


def test_fresh_seeds_violate_nothing() -> None:
    first = random.SystemRandom().randrange(10**6, 10**9)
    demand_none(["--seeds", f"{first}:", "--seconds", "4", "--jobs", "1"])


def test_a_seed_tells_the_same_story_twice() -> None:
    one, other = (simulate("--seed", "6", "--story").stdout for _ in range(2))
    assert one == other
    assert "RunEnded" in one
