"""Fewer faults that still violate something: drop one after the other."""

from collections.abc import Sequence

from tests.simulation.faults import Fault
from tests.simulation.history import play


def shrink(seed: int, faults: Sequence[Fault]) -> list[Fault]:
    """Return those of a failing seed's faults of which none can be left out."""
    left = list(faults)
    for fault in faults:
        fewer = [each for each in left if each is not fault]
        if play(seed, fewer).violations:
            left = fewer
    return left
