"""`fl_state replay`: every closed round aggregated again, and compared with what was published."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flplatform.core import events as ev
from flplatform.core.errors import DataLossError, FLError, NotFoundError
from flplatform.core.messages import ModelRef
from flplatform.files.digest import demand_digest
from flplatform.server.aggregation import LostInputError, aggregate_closed
from flplatform.server.upkeep.history import History, RunHistory
from flplatform.server.upkeep.place import Need, Place, ScratchBlobs, needs_of, pool

Outcome = Literal["same", "differs", "freed", "waiting", "error"]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A round that was aggregated again.

    Attributes:
        round: its number; 0 for what is said of the run itself.
        outcome: `freed` if an input is not kept any more, `waiting` if nothing is published yet.
        published: digest of the published model.
        made: digest of the model made now.
        detail: what differs, is missing or went wrong.
    """

    round: int
    outcome: Outcome
    published: str = ""
    made: str = ""
    detail: str = ""


def replay_run(
    place: Place, number: int, round_number: int | None = None, scratch: Path | None = None
) -> Iterator[Replayed]:
    """Aggregate the closed rounds of a run again, or one of them.

    Args:
        place: the state; nothing is written there.
        number: the run's.
        round_number: None for all rounds.
        scratch: folder for one model at a time; the system's for temporary files if None.

    Raises:
        NotFoundError: no such run or round.
        FLError: the log cannot be read.
    """
    history = place.history()
    run, needs = _run_in(history, number), needs_of(history)
    if damaged := [each for each in run.stream.findings if each.problem]:
        text = f"some of its events cannot be had, the first: {damaged[0].what}"
        yield Replayed(0, "error", detail=text)
    events = run.stream.only()
    closed = [event for event in events if isinstance(event, ev.RoundClosed)]
    published = {event.round: event for event in events if isinstance(event, ev.ModelPublished)}
    if round_number is not None:
        closed = [event for event in closed if event.round == round_number]
        if not closed:
            raise NotFoundError(f"run {number} has no closed round {round_number}")
    with tempfile.TemporaryDirectory(prefix="fl_state-", dir=scratch) as folder, pool() as threads:
        blobs = ScratchBlobs(place.blobs.root, Path(folder))
        for event in closed:
            try:
                model, state = aggregate_closed(blobs, event, threads)
            except LostInputError as error:
                yield _without_inputs(place, event, needs, error)
                continue
            except (FLError, OSError) as error:
                yield Replayed(event.round, "error", detail=str(error))
                continue
            yield _compare(blobs, event, published.get(event.round), model, state)


def _without_inputs(
    place: Place, closed: ev.RoundClosed, needs: Mapping[str, Need], error: LostInputError
) -> Replayed:
    """Tell inputs that were freed from those that are lost."""
    inputs = _inputs(closed)
    missing = {digest for digest in inputs.values() if not place.blobs.has(digest)}
    lost = place.lost(missing & needs.keys(), needs)
    if not lost:
        return Replayed(closed.round, "freed", detail=error.message)
    texts = [f"the {name} is lost: {digest}" for name, digest in inputs.items() if digest in lost]
    return Replayed(closed.round, "error", detail="; ".join(texts))


def _compare(
    blobs: ScratchBlobs,
    closed: ev.RoundClosed,
    published: ev.ModelPublished | None,
    model: ModelRef,
    state: ModelRef | None,
) -> Replayed:
    if published is None:
        return Replayed(closed.round, "waiting", made=model.digest, detail="not published yet")
    kept = published.optimizer_state.digest if published.optimizer_state else "none"
    what = [
        f"{name} made now {made}, published {before}"
        for name, made, before in (
            ("model", model.digest, published.model.digest),
            ("optimiser state", state.digest if state else "none", kept),
        )
        if made != before
    ]
    if not what:
        return Replayed(closed.round, "same", published.model.digest, model.digest)
    detail = "; ".join([*what, *_damaged_inputs(blobs, closed)])
    return Replayed(closed.round, "differs", published.model.digest, model.digest, detail)


def _damaged_inputs(blobs: ScratchBlobs, closed: ev.RoundClosed) -> Iterator[str]:
    for name, digest in _inputs(closed).items():
        try:
            demand_digest(blobs.path(digest), digest)
        except DataLossError as error:
            yield f"the {name} is damaged: {error.message}"
        except (FLError, OSError):
            continue


def _inputs(closed: ev.RoundClosed) -> dict[str, str]:
    """Return what a round is made of, by its name in messages."""
    inputs = {f"update of {each.site}": each.digest for each in closed.contributions}
    inputs["base model"] = closed.base.digest
    if closed.optimizer_state:
        inputs["optimiser state before"] = closed.optimizer_state.digest
    return inputs


def run_of(place: Place, number: int) -> RunHistory:
    """Return a run's history.

    Raises:
        NotFoundError: there is no such run.
        FLError: the log cannot be read.
    """
    return _run_in(place.history(), number)


def _run_in(history: History, number: int) -> RunHistory:
    runs = history.runs
    if number not in runs:
        known = f"there are runs {min(runs)} to {max(runs)}" if runs else "there are none"
        raise NotFoundError(f"there is no run {number}", hint=known)
    return runs[number]
