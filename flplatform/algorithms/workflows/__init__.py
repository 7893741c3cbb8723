"""Workflows: pure functions over a run's events."""

from flplatform.algorithms.workflows.run import classify, decide, evolve, pending, replay
from flplatform.algorithms.workflows.state import Gather, OpenRound, RunState

__all__ = [
    "Gather",
    "OpenRound",
    "RunState",
    "classify",
    "decide",
    "evolve",
    "pending",
    "replay",
]
