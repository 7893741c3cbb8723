"""Where global models come from, read from the log; and the proof, by aggregating again."""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator, Mapping

from flplatform.algorithms.workflows import RunState
from flplatform.core import events as ev
from flplatform.core.errors import FLError, NotFoundError
from flplatform.core.lineage import Lineage, Origin, RoundLineage, Share, Verified
from flplatform.core.messages import TRAIN, TaskId
from flplatform.security.identity import identity_of
from flplatform.security.signing import Signed
from flplatform.server.aggregation import LostInputError
from flplatform.server.run_actor import RunActor
from flplatform.server.runs import Runs

MAX_ORIGINS = 20
"""Runs behind a run that are named."""


class Lineages:
    """Implements `core.lineage.LineageControl`; lives on the event loop.

    Args:
        runs: the runs, their logs and blobs.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._turn = asyncio.Lock()

    def lineage(self, number: int, round_number: int | None = None) -> Lineage:
        """Return the models of a run, or one of them with the chain of its bases.

        Raises:
            NotFoundError: no such run, or no such model.
        """
        actor = self._runs.view(number)
        state, opened = actor.state, actor.state.opened
        rounds = rounds_of(actor)
        if round_number is not None:
            rounds = _chain(state, rounds, round_number)
        start = opened.job.initial_model
        return Lineage(
            run=number,
            job=opened.job.name,
            job_digest=opened.job_blob.digest,
            submitter=opened.submitter,
            submitter_organisation=opened.submitter_organisation,
            signer=_signer(opened),
            submitted=actor.times[0],
            metric=opened.job.watch.metric if opened.job.watch else "",
            initial_model=opened.initial_model.digest,
            initial_from=f"model {start.round} of run {start.run}"
            if start.run
            else start.file or start.function,
            origins=tuple(self._origins(opened)),
            rounds=tuple(rounds),
        )

    def _origins(self, opened: ev.RunOpened) -> Iterator[Origin]:
        """Follow model 0 from run to run; a run starts from earlier ones only."""
        for _ in range(MAX_ORIGINS):
            number, digest = opened.job.initial_model.run, opened.initial_model.digest
            if not 0 < number < opened.run:
                return
            try:
                earlier = self._runs.view(number).state
            except FLError:
                return  # deleted, or of another server
            found = [at for at, blob in earlier.models.items() if blob.digest == digest]
            yield Origin(number, found[0] if found else None, digest, earlier.opened.submitter)
            opened = earlier.opened

    async def verify(self, number: int, rounds: tuple[int, ...]) -> AsyncIterator[Verified]:
        """Aggregate closed rounds again and compare, one after the other, whoever asks.

        Raises:
            NotFoundError: no such run.
        """
        actor = self._runs.view(number)
        closed = {event.round: event for event in actor.events if isinstance(event, ev.RoundClosed)}
        for at in rounds:
            published = actor.state.models.get(at)
            if at in closed and published is not None:
                async with self._turn:  # whoever may look must not load the server at will
                    verified = await self._verify(closed[at], published.digest)
                yield verified

    async def _verify(self, closed: ev.RoundClosed, published: str) -> Verified:
        try:
            model, state = await self._runs.hands.aggregate(closed)
            made = {state.digest} if state else set()
            await self._runs.retention.free(made | ({model.digest} - {published}))
        except LostInputError as error:
            return Verified(closed.round, "freed", detail=error.message)
        except FLError as error:
            return Verified(closed.round, "error", detail=str(error))
        result = "same" if model.digest == published else "differs"
        return Verified(closed.round, result, model.digest)


def rounds_of(actor: RunActor) -> list[RoundLineage]:
    """Return how each closed round of a run became a model, in order."""
    state = actor.state
    updates: dict[tuple[int, str], ev.UpdateAccepted] = {}
    failed: dict[int, dict[str, str]] = {}
    published: dict[int, str] = {}
    closed: list[ev.RoundClosed] = []
    for event, time in zip(actor.events, actor.times, strict=True):
        match event:
            case ev.UpdateAccepted():
                updates[event.round, event.site] = event
            case ev.TaskFailed():
                task_id = TaskId.parse(event.task_id)
                if task_id.kind == TRAIN:
                    failed.setdefault(task_id.round, {})[event.site] = event.error
            case ev.ModelPublished():
                published[event.round] = time
            case ev.RoundClosed():
                closed.append(event)
    bases = {blob.digest: at for at, blob in sorted(state.models.items(), reverse=True)}
    return [
        RoundLineage(
            round=event.round,
            base=event.base.digest,
            base_round=bases.get(event.base.digest, 0),
            shares=_shares(event, updates),
            stragglers=dict.fromkeys(event.stragglers, "no update before the round closed")
            | {site: f"failed: {error}" for site, error in failed.get(event.round, {}).items()},
            aggregator=event.aggregator,
            aggregator_args=event.aggregator_args,
            reason=event.reason,
            optimizer=event.optimizer,
            optimizer_args=event.optimizer_args,
            model=state.models[event.round].digest if event.round in state.models else "",
            score=state.scores.get(event.round),
            best=event.round == state.best_round,
            published=published.get(event.round, ""),
        )
        for event in closed
    ]


def _shares(
    closed: ev.RoundClosed, updates: Mapping[tuple[int, str], ev.UpdateAccepted]
) -> tuple[Share, ...]:
    total = sum(item.weight for item in closed.contributions) or 1.0
    return tuple(
        Share(
            site=item.site,
            share=item.weight / total,
            weight=item.weight,
            digest=item.digest,
            examples=updates[closed.round, item.site].examples,
            metrics=updates[closed.round, item.site].metrics,
        )
        for item in closed.contributions
    )


def _chain(state: RunState, rounds: list[RoundLineage], number: int) -> list[RoundLineage]:
    """Return the rounds that led to one model, oldest first.

    Raises:
        NotFoundError: there is no such model.
    """
    if number not in state.models:
        raise NotFoundError(
            f"run {state.run} has no global model of round {number}",
            hint=f"it has rounds 0 to {max(state.models)}",
        )
    by_number = {each.round: each for each in rounds}
    chain: list[RoundLineage] = []
    while number in by_number:
        chain.append(by_number[number])
        # Equal models have equal digests: the base is always of an earlier round.
        number = min(by_number[number].base_round, number - 1)
    return chain[::-1]


def _signer(opened: ev.RunOpened) -> str:
    """Return whose certificate the start order carries; it was verified when it was submitted."""
    try:
        signed = Signed.from_bytes(base64.b64decode(opened.order))
        return identity_of(signed.certificate).name
    except (FLError, ValueError):
        return ""
