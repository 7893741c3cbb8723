"""A run's state at its site: what the job's code keeps, and the best local model.

    <n>/user/              `context.state_dir`, as the last accepted train task left it
    <n>/best.safetensors   the best local model so far; the last one if the job watches no metric
    <n>/best.json          its round, metrics and examples
    <n>/base.safetensors   the model that the last accepted train task began from

where `<n>` counts the accepted train tasks; the highest is current, and never written again. The
job's code gets copies of its own folder and never sees the others: they are kept by the parent,
and a best model that stays the best is linked, not copied, from one number to the next.
"""

from pathlib import Path
from typing import Literal

from flplatform.client.box import Box, link
from flplatform.client.frames import RESULT_FILE, STATE_FOLDER
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.job import Watch
from flplatform.core.strict import Strict, parse_json
from flplatform.files.durable import private_dir, write_atomic

USER_STATE = "user"
BEST_MODEL = "best.safetensors"
BEST_SCORE = "best.json"
BASE_MODEL = "base.safetensors"


class LocalScore(Strict):
    """`best.json`: what a local model came to on its site's own data."""

    version: Literal[1] = 1
    round: int
    metrics: dict[str, float]
    examples: int


def current_state(folder: Path) -> Path | None:
    """Return the current one of the numbered states in a run's state folder."""
    if not folder.is_dir():
        return None
    numbers = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()]
    return folder / str(max(numbers)) if numbers else None


def collect(
    box: Box,
    work: Path,
    current: Path | None,
    watch: Watch | None,
    score: LocalScore,
    max_model_bytes: int,
    max_state_bytes: int,
) -> None:
    """Copy what a train task left in the box to `work`: its model, and the state to commit.

    Args:
        box: what the job's code could write.
        work: an empty folder that it cannot.
        current: the state that the task started from, if there is one.
        watch: what makes a model the best; without it the newest is.
        score: of the trained model.
        max_model_bytes: most that the model may take.
        max_state_bytes: most that the user's state may take.

    Raises:
        InvalidArgumentError: something odd lies there, or the score lacks the watched metric.
        ResourceExhaustedError: a limit is exceeded.
        OSError: the disk is full.
    """
    if watch is not None and watch.metric not in score.metrics:
        raise InvalidArgumentError("is missing", field=f"local[{watch.metric!r}]")
    box.collect_model(work / RESULT_FILE, max_model_bytes)
    state = private_dir(work / STATE_FOLDER)
    box.collect_state(state / USER_STATE, max_state_bytes)
    best = _best_score(current)
    if (
        current is None
        or best is None
        or watch is None
        or watch.better(score.metrics[watch.metric], best.metrics[watch.metric])
    ):
        (state / BEST_MODEL).hardlink_to(work / RESULT_FILE)
        write_atomic(state / BEST_SCORE, score.model_dump_json().encode())
    else:
        (state / BEST_MODEL).hardlink_to(current / BEST_MODEL)
        (state / BEST_SCORE).hardlink_to(current / BEST_SCORE)


def submit(current: Path | None, work: Path) -> LocalScore | None:
    """Put the best local model into `work` and return its score, or None if there is none.

    What it is compared with before it is sent comes with it, see `base_of`.

    Raises:
        ConfigError: its score is damaged.
    """
    score = _best_score(current)
    if current is not None and score is not None:
        (work / RESULT_FILE).hardlink_to(current / BEST_MODEL)
        if (current / BASE_MODEL).exists():  # a release before this one kept none
            (work / BASE_MODEL).hardlink_to(current / BASE_MODEL)
    return score


def base_of(work: Path, model: Path | None) -> Path | None:
    """Return what a task's result is compared with: its model, or what `submit` has brought.

    The model stays with the state that the task leaves, if it leaves one.

    Args:
        work: what the task has left.
        model: what it was given.

    Raises:
        OSError: the disk refused; the same call again goes on from there.
    """
    if model is None:
        return work / BASE_MODEL if (work / BASE_MODEL).exists() else None
    if (work / STATE_FOLDER).is_dir():
        kept = work / STATE_FOLDER / BASE_MODEL
        kept.unlink(missing_ok=True)
        link(model, kept)
    return model


def _best_score(current: Path | None) -> LocalScore | None:
    if current is None or not (current / BEST_SCORE).exists():
        return None
    path = current / BEST_SCORE
    return parse_json(LocalScore, path.read_bytes(), str(path))
