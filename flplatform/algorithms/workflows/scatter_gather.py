"""Scatter and gather: rounds of training, each aggregated once (FedAvg, McMahan et al. 2017).

A round's participants are frozen when it opens. It closes when all of them answered or are
excused, or when quorum and `wait_after_min_s` have passed, or at its deadline, and never below
`min_clients`. Each train task first validates the model it received, so the model of round r is
scored in round r+1 and the last one by a closing task.
"""

from math import isfinite
from typing import Final

from flplatform.algorithms.recipes import recipe_of
from flplatform.algorithms.workflows.draft import Draft, Timers, gather_pending
from flplatform.algorithms.workflows.state import OpenRound, RunState
from flplatform.core.events import (
    DeadlineExtended,
    ModelScored,
    RoundClosed,
    RoundOpened,
    Target,
)
from flplatform.core.messages import LAST_OWNER, TRAIN, ModelRef, Task, TaskId, task_seed
from flplatform.core.workflow import Aggregate, Instruction, Offer, Wake

SCORE: Final = "score"


def quorum_wake(state: RunState) -> Wake:
    """Return the wait for enough sites to open the next round."""
    return Wake(f"quorum/{state.round + 1}", state.job.quorum_wait_s)


def quorum_lost(draft: Draft, fired: Timers) -> bool:
    """End the run if the wait for enough sites is over; return whether it did."""
    state = draft.state
    if not fired.has(quorum_wake(state)) or len(draft.usable) >= state.min_clients:
        return False
    draft.end(
        "failed",
        f"only {len(draft.usable)} of {state.min_clients} needed sites were there for "
        f"{state.job.quorum_wait_s:g} s (quorum_wait_s)",
    )
    return True


def pending(state: RunState) -> list[Instruction]:
    """Return what the step needs done now."""
    current = state.open_round
    if current is None:
        if _rounds_left(state):
            return [quorum_wake(state)]
        return gather_pending(state, SCORE)
    if current.closed:
        return [Aggregate(current.closed)]
    number, model = current.opened.round, current.opened.model
    wire = state.wires.get(max(state.models))
    instructions: list[Instruction] = [
        Offer(
            Task(
                TaskId(state.run, number, TRAIN, site),
                task_seed(state.job.seed, number, TRAIN, site),
                ModelRef(model.digest, model.size),
                state.job.codec,
                ModelRef(wire.digest, wire.size) if wire else None,
                state.job.codec_down if wire else "none",
            )
        )
        for site in current.unsettled
    ]
    if len(current.accepted) >= state.min_clients:
        instructions.append(_wait_wake(state, current))
    instructions.append(_deadline_wake(state, current))
    return instructions


def advance(draft: Draft, fired: Timers) -> bool:
    """Go on as far as possible; return whether the step is done."""
    state = draft.state
    if state.open_round is not None:
        _close(draft, state.open_round, fired)
        return False
    if not _rounds_left(state):
        return _score_last(draft, fired)
    if not quorum_lost(draft, fired) and len(draft.usable) >= state.min_clients:
        draft.emit(RoundOpened(round=state.round + 1, participants=draft.usable, model=state.model))
    return False


def _rounds_left(state: RunState) -> bool:
    return state.round - state.step_first_round < state.job.rounds


def _wait_wake(state: RunState, current: OpenRound) -> Wake:
    # The quorum is part of the id: a changed quorum waits anew.
    return Wake(f"wait/{current.opened.round}/{state.min_clients}", state.job.wait_after_min_s)


def _deadline_wake(state: RunState, current: OpenRound) -> Wake:
    suffix = "/extended" if current.extended else ""
    return Wake(f"deadline/{current.opened.round}{suffix}", state.job.round_deadline_s)


def _close(draft: Draft, current: OpenRound, fired: Timers) -> None:
    """Close the round if it may close, extend it once, or end the run if it never can close."""
    state = draft.state
    if current.closed:
        return
    number = current.opened.round
    waiting = [site for site in current.unsettled if site in draft.roster.usable]
    late = fired.has(_deadline_wake(state, current))
    if len(current.accepted) >= state.min_clients:
        if not waiting:
            reason = "all participants answered"
        elif fired.has(_wait_wake(state, current)):
            reason = "quorum and wait_after_min_s"
        elif late:
            reason = "deadline"
        else:
            return
        _emit_closed(draft, current, reason)
    elif current.possible < state.min_clients:
        failures = "; ".join(f"{site}: {item.error}" for site, item in current.failed.items())
        draft.end("failed", f"round {number} cannot reach quorum {state.min_clients}: {failures}")
    elif late and state.job.on_deadline == "extend" and not current.extended:
        draft.emit(DeadlineExtended(round=number))
    elif late:
        draft.end(
            "aborted",
            f"the deadline of round {number} passed with {len(current.accepted)} of "
            f"{state.min_clients} needed updates; missing: {', '.join(current.unsettled)} "
            f"(on_deadline: {state.job.on_deadline})",
            by="workflow",
        )


def _emit_closed(draft: Draft, current: OpenRound, reason: str) -> None:
    state = draft.state
    job = state.job
    aggregator = recipe_of(job).aggregator
    contributions = tuple(
        Target(
            site=site,
            digest=update.digest,
            size=update.size,
            weight=aggregator.weight_of(site, update.examples),
        )
        for site, update in sorted(current.accepted.items())
    )
    draft.emit(
        RoundClosed(
            round=current.opened.round,
            reason=reason,
            contributions=contributions,
            stragglers=current.unsettled,
            base=current.opened.model,
            aggregator=job.aggregator.name,
            aggregator_args=dict(job.aggregator.args),
            optimizer_state=state.optimizer_state,
            updates=job.updates,
            optimizer=job.optimizer.name if job.optimizer else "",
            optimizer_args=dict(job.optimizer.args) if job.optimizer else {},
        )
    )
    reports = [
        (update.received, update.received_examples)
        for _, update in sorted(current.accepted.items())
    ]
    _score(draft, current.opened.round - 1, reports)


def _score(draft: Draft, number: int, reports: list[tuple[dict[str, float], int]]) -> None:
    watch = draft.state.job.watch
    if watch is None or number in draft.state.scores:
        return
    scored = [(values[watch.metric], n) for values, n in reports if watch.metric in values and n]
    examples = sum(n for _, n in scored)
    if not examples:
        return
    score = sum(value * n for value, n in scored) / examples
    if not isfinite(score):  # values near the largest float can overflow the sum
        return
    best = draft.state.best_round
    better = best is None or watch.better(score, draft.state.scores[best])
    draft.emit(ModelScored(round=number, score=score, examples=examples, best=better))


def _score_last(draft: Draft, fired: Timers) -> bool:
    """Have the last model scored by a closing task; return whether that is done."""
    state = draft.state
    if state.job.watch is None or state.round in state.scores:
        return True
    gather = state.gathers.get(SCORE)
    if gather is None or gather.opened.round != state.round:
        draft.open_gather("score", draft.usable, {LAST_OWNER: state.model})
    if not draft.close_gather("score", fired):
        return False
    results = draft.state.gathers[SCORE].results
    reports = [(results[key].metrics, results[key].examples) for key in sorted(results)]
    _score(draft, state.round, reports)
    return True
