"""Views as JSON: everything but what only a granted download may tell."""

from dataclasses import asdict
from typing import Any

from flplatform.core.control import RoundMetrics, RunView

DIGEST_CHARS = 19
"""Enough of a digest to recognise it; the whole of it is what `download_model` grants."""


def of_run(run: RunView) -> dict[str, Any]:
    """Return a run's view."""
    return asdict(run) | {"model_digest": run.model_digest[:DIGEST_CHARS]}


def of_round(each: RoundMetrics) -> dict[str, Any]:
    """Return what is known of a round's model."""
    return asdict(each) | {"digest": each.digest[:DIGEST_CHARS]}
