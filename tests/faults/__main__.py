"""`python -m tests.faults quick|long|soak`: faults on real processes, and a summary of them.

quick   the set that `make test` runs too
long    hundreds of kills, every call, many seeds; thousands of simulated histories
soak    a fault every five seconds for `--minutes`
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORKERS = "2"
SIMULATED_MINUTES = 3


def main(argv: list[str]) -> int:
    """Run a set; return an exit code, 0 if nothing was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("what", choices=("quick", "long", "soak"))
    parser.add_argument("--seed", type=int, help="of the first schedule; drawn if it is missing")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long a soak goes on")
    options = parser.parse_args(argv)
    seed = options.seed
    if options.what != "quick" and seed is None:
        seed = int.from_bytes(os.urandom(3), "big")
    if options.what == "soak":
        from tests.faults.soak import soak

        return soak(options.minutes, seed)
    if seed is not None:
        os.environ["FAULTS_SEED"] = str(seed)
        print(f"seeds from {seed}", flush=True)
    if options.what == "long":
        os.environ["FAULTS"] = "long"
    import pytest

    folders = [str(HERE)]
    if any(HERE.with_name("simulation").glob("test_*.py")):
        folders.append(str(HERE.with_name("simulation")))
    code = int(pytest.main(["-q", "-n", WORKERS, "--dist", "worksteal", *folders]))
    return code or (simulate(seed) if options.what == "long" else 0)


def simulate(seed: int | None) -> int:
    """Play histories of the simulation on all processors; return an exit code."""
    print(f"simulated histories from seed {seed}, {SIMULATED_MINUTES} minutes", flush=True)
    command = [sys.executable, "-m", "tests.simulation", "--seeds", f"{seed}:"]
    return subprocess.run([*command, "--minutes", str(SIMULATED_MINUTES)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
