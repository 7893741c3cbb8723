"""`python -m tests.simulation --seeds 0:10000`, `--seed N --story`: search, or tell."""

import argparse
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from tests.simulation.pool import play_all

if TYPE_CHECKING:
    from tests.simulation.history import Told

HASH_SEED = "0"
"""Sets are walked in the order of hashes: it belongs to the seed."""


def main(argv: list[str]) -> int:
    """Play histories; return 1 if something is violated, or a mutation is not noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", default="0:1000", help="FIRST:END, END may be missing")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so long")
    parser.add_argument("--jobs", type=int, default=0, help="processes; default: one a core")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--story", action="store_true", help="tell what happens")
    parser.add_argument("--mutation", default="", help="break the program like this")
    parser.add_argument("--mutations", action="store_true", help="break it in all ways in turn")
    parser.add_argument("--no-shrinking", action="store_true", help="do not look for fewer faults")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a violation")
    options = parser.parse_args(argv)
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *argv])  # noqa: S606

    from tests.simulation import mutations
    from tests.simulation.history import play

    if options.mutations:
        found = {name: mutations.noticed(name) for name in mutations.MUTATIONS}
        for name, what in found.items():
            print(f"{name}: {what or 'NOT NOTICED'}")
        return 0 if all(found.values()) else 1
    if options.mutation:
        mutations.apply(options.mutation)
    if options.seed is not None:
        told = play(options.seed, tell=options.story)
        print("\n".join(told.story))
        print(f"seed {told.seed}: {told.violations or 'nothing is violated'}")
        return 1 if told.violations else 0
    return search(options)


def search(options: argparse.Namespace) -> int:
    """Play seeds until one violates something or time is over, and report."""
    started = time.monotonic()
    counts: Counter[str] = Counter()
    played, failed, virtual, interrupted = 0, [], 0.0, False
    until = started + (options.seconds or options.minutes * 60 or float("inf"))
    histories = play_all(options.seeds, options.jobs, until, options.mutation)
    try:
        for told in histories:
            played += 1
            counts += told.counts
            virtual += told.seconds
            if told.violations:
                failed.append(told.seed)
                _explain(told, options)
                if not options.keep_going:
                    break
    except KeyboardInterrupt:
        interrupted = True
    took = time.monotonic() - started
    histories.close()
    print(f"{played} histories in {took:.1f} s ({played / took * 60:.0f} a minute), ", end="")
    print(f"{virtual / 3600:.1f} virtual hours; violations: {len(failed)} {failed[:20] or ''}")
    for what, number in sorted(counts.items()):
        print(f"  {number:8d}  {what}")
    return 130 if interrupted else 1 if failed else 0


def _explain(told: "Told", options: argparse.Namespace) -> None:
    from tests.simulation.shrink import shrink

    print(f"seed {told.seed}: {told.violations[0]}")
    if not options.no_shrinking:
        fewest = shrink(told.seed, told.faults)
        print(f"  {len(fewest)} of {len(told.faults)} faults are enough:")
        for fault in fewest:
            print(f"    {fault}")
    more = f" --mutation '{options.mutation}'" if options.mutation else ""
    print(f"  replay: python -m tests.simulation --seed {told.seed} --story{more}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
