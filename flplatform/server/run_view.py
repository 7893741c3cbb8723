"""A run as operators see it."""

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from flplatform.algorithms.workflows import RunState
from flplatform.core.control import RunView
from flplatform.core.errors import FLError
from flplatform.security.signing import Signed, StartOrder
from flplatform.server.ledger import RunSummary
from flplatform.server.run_actor import RunActor


def run_view(summary: RunSummary, actor: RunActor | None) -> RunView:
    """Return a run's view; without its decider or its events only what its summary tells."""
    view = RunView(
        run=summary.run,
        name=summary.name,
        submitter=summary.submitter,
        submitted=summary.submitted,
        status=summary.status,
        reason=summary.reason,
        ended=summary.ended,
        round=summary.round,
        rounds=summary.rounds,
        targets=summary.sites,
        submitter_organisation=summary.organisation,
        source_run=summary.source_run,
    )
    if actor is None:
        return view
    state = actor.state
    waiting: set[str] = {site for site, tasks in actor.tasks.items() if tasks}
    phase, accepted, results = _progress(state)
    tasks, settled = _settled(state)
    if state.step < 0:
        waiting, accepted = set(state.awaited), set(state.deployed)
    now = asyncio.get_running_loop().time()
    return replace(
        view,
        status=state.status,
        reason=state.ended.reason if state.ended else "",
        ended=actor.times[-1] if state.ended else "",
        round=state.round,
        rounds=state.job.rounds,
        min_clients=state.min_clients,
        targets=state.targets,
        waiting=tuple(sorted(waiting)),
        accepted=tuple(sorted(accepted - waiting)),
        answers={site: _answer(state, site) for site in state.targets},
        timers={wake: at - now for wake, at in actor.wakes_at.items()},
        model_digest=state.model.digest,
        best_round=state.best_round,
        submitter_organisation=state.opened.submitter_organisation,
        metric=state.job.watch.metric if state.job.watch else "",
        mode=state.job.watch.mode if state.job.watch else "max",
        phase=phase,
        results=results,
        tasks=tasks,
        settled=settled,
        gpus={
            site: gpus[site]
            for site in state.targets
            if site in (gpus := _gpus_of(state.order_of(site)))
        },
    )


@lru_cache(maxsize=256)
def _gpus_of(order: str) -> Mapping[str, int]:
    """Return what a signed start order, base64, says of processes at its sites; none if nothing.

    It was verified when it came.
    """
    try:
        payload = Signed.from_bytes(base64.b64decode(order)).payload
        return StartOrder.model_validate_json(payload).gpus
    except (FLError, ValueError):  # of a log that this release did not write
        return {}


def _progress(state: RunState) -> tuple[str, set[str], int]:
    """Return what is open, whose results it has, and how many."""
    phase, accepted, results = "", set[str](), 0
    if state.open_round:
        phase, accepted = "round", set(state.open_round.accepted)
        results = len(accepted)
    for stage, gather in state.gathers.items():
        if not gather.closed:
            phase = stage
            accepted |= {task_id.site for task_id in gather.results}
            results += len(gather.results)
    return phase, accepted, results


def _settled(state: RunState) -> tuple[int, int]:
    """Return how many tasks the latest gathering has, and how many of them are settled."""
    if not state.gathers:
        return 0, 0
    gather = list(state.gathers.values())[-1]
    tasks = len(gather.opened.participants) * max(1, len(gather.opened.models))
    return tasks, len(gather.results) + len(gather.failed)


def _answer(state: RunState, site: str) -> str:
    if site in state.withdrawn:
        return state.withdrawn[site].reason
    answer = state.answers.get(site)
    if answer is None:
        return "…"
    return "ok" if answer.accepted else f"declined: {answer.rule or 'error'}: {answer.reason}"
