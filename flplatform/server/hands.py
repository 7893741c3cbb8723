"""`RunHands`: what carries out the decisions of all runs; see `run_actor.Hands`."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from flplatform.core import events as ev
from flplatform.core.messages import ModelRef
from flplatform.core.ports import BlobStore
from flplatform.core.workflow import Aggregated, Deploy, Roster
from flplatform.files.threads import in_thread
from flplatform.server.aggregation import aggregate_closed
from flplatform.server.background import Background
from flplatform.server.client_manager import ClientManager
from flplatform.server.relay import Reply, RequestRelay
from flplatform.server.retention import Retention
from flplatform.server.run_actor import RunActor
from flplatform.server.wire import make_wire

T = TypeVar("T")

MAKERS = 2
"""Aggregations and encodings at a time: each has the threads for aggregation, or one, to itself,
and commands need some of those that are left."""


class RunHands:
    """Reaches sites, blobs and threads for every run. Lives on the event loop.

    Args:
        blobs: where models and packages are.
        retention: keeps what no log names yet, and frees what none has named.
        background: frees it.
        clients: who is there.
        relay: carries the signed start to the sites.
        workers: threads for aggregation.
        notify: called with the sites whose open tasks have changed.
        heard: called with a run and what has just become durable of it, in order.
    """

    def __init__(
        self,
        blobs: BlobStore,
        retention: Retention,
        background: Background,
        clients: ClientManager,
        relay: RequestRelay,
        workers: Executor,
        notify: Callable[[set[str]], None],
        heard: Callable[[RunActor, Sequence[ev.Event]], None],
    ) -> None:
        self._blobs = blobs
        self._retention = retention
        self._background = background
        self._making = asyncio.Semaphore(MAKERS)
        self._clients = clients
        self._relay = relay
        self._workers = workers
        self._notify = notify
        self._heard = heard

    def roster(self) -> Roster:
        """Return the sites as they are now."""
        return self._clients.roster()

    def stood_still_s(self) -> float:
        """Return for how long this server has stood still since its start, in all."""
        return self._clients.stood_still_s()

    def deploy(self, item: Deploy, opened: ev.RunOpened) -> "asyncio.Future[Reply]":
        """Carry a signed start to its site."""
        body: Mapping[str, Any] = {
            "run": opened.run,
            "digest": opened.job_blob.digest,
            "size": opened.job_blob.size,
        }
        signed = base64.b64decode(item.order)
        return self._relay.post(item.site, "start", signed=signed, body=body)

    async def aggregate(self, closed: ev.RoundClosed) -> tuple[ModelRef, ModelRef | None]:
        """Compute and store model and optimiser state of a closed round, from the event alone."""
        return await self._in_turn(self._aggregate(closed))

    def _aggregate(self, closed: ev.RoundClosed) -> Callable[[], tuple[ModelRef, ModelRef | None]]:
        return partial(aggregate_closed, self._blobs, closed, self._workers)

    async def _in_turn(self, work: Callable[[], T]) -> T:
        async with self._making:
            return await in_thread(work)

    @asynccontextmanager
    async def make(self, closed: ev.RoundClosed, codec_down: str) -> AsyncIterator[Aggregated]:
        """Compute and store what a closed round comes to, and keep it within the context.

        What no log names when the context ends is freed.
        """
        async with self._kept(self._aggregate(closed)) as (model, state):
            assert model is not None
            async with self.encode(model, codec_down) as wire:
                yield Aggregated(closed.round, model, state, wire)

    @asynccontextmanager
    async def encode(self, model: ModelRef, codec: str) -> AsyncIterator[ModelRef | None]:
        """Make and store what sites download instead of a model, and keep it within the context.

        That is nothing for the codec `none`; see `make_wire`. It is freed as what `make` makes.
        """
        if codec == "none":
            yield None
            return

        async with self._kept(lambda: (make_wire(self._blobs, model, codec),)) as (wire,):
            yield wire

    @asynccontextmanager
    async def _kept(
        self, make: Callable[[], Sequence[ModelRef | None]]
    ) -> AsyncIterator[Sequence[ModelRef | None]]:
        """Keep what a thread makes; what was freed just then, as another run's, is made again."""
        made: list[ModelRef | None] = []

        def work() -> None:
            made[:] = make()  # known also when nobody waits for it any more

        try:
            while True:
                await self._in_turn(work)
                digests = [blob.digest for blob in made if blob]
                with self.hold(*digests):
                    if all(map(self._blobs.has, digests)):
                        yield made
                        return
        except GeneratorExit:  # there is no loop any more: the next process makes the same
            made.clear()
            raise
        finally:
            if made:
                over = {blob.digest for blob in made if blob}
                self._background.later(self._retention.free(over))

    def hold(self, *digests: str) -> AbstractContextManager[None]:
        """Keep blobs that no log names yet."""
        return self._retention.hold(*digests)

    def tasks_changed(self, sites: set[str]) -> None:
        """Tell waiting sites that their open tasks have changed."""
        self._notify(sites)

    def appended(self, actor: RunActor, events: Sequence[ev.Event]) -> None:
        """Pass on what has become durable."""
        self._heard(actor, events)
