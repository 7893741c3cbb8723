"""`RunHands`: what carries out the decisions of all runs; see `run_actor.Hands`."""

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from flplatform.core import events as ev
from flplatform.core.messages import ModelRef
from flplatform.core.ports import BlobStore
from flplatform.core.workflow import Deploy, Roster
from flplatform.server.aggregation import aggregate_closed
from flplatform.server.client_manager import ClientManager
from flplatform.server.relay import Reply, RequestRelay
from flplatform.server.run_actor import RunActor
from flplatform.server.wire import make_wire


class RunHands:
    """Reaches sites, blobs and threads for every run. Lives on the event loop.

    Args:
        blobs: where models and packages are.
        clients: who is there.
        relay: carries the signed start to the sites.
        workers: threads for aggregation.
        notify: called with the sites whose open tasks have changed.
        heard: called with a run and what has just become durable of it, in order.
    """

    def __init__(
        self,
        blobs: BlobStore,
        clients: ClientManager,
        relay: RequestRelay,
        workers: Executor,
        notify: Callable[[set[str]], None],
        heard: Callable[[RunActor, Sequence[ev.Event]], None],
    ) -> None:
        self._blobs = blobs
        self._clients = clients
        self._relay = relay
        self._workers = workers
        self._notify = notify
        self._heard = heard

    def roster(self) -> Roster:
        """Return the sites as they are now."""
        return self._clients.roster()

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
        return await asyncio.to_thread(aggregate_closed, self._blobs, closed, self._workers)

    async def encode(self, model: ModelRef, codec: str) -> ModelRef:
        """Make and store what sites download instead of a model; see `make_wire`."""
        return await asyncio.to_thread(make_wire, self._blobs, model, codec)

    def tasks_changed(self, sites: set[str]) -> None:
        """Tell waiting sites that their open tasks have changed."""
        self._notify(sites)

    def appended(self, actor: RunActor, events: Sequence[ev.Event]) -> None:
        """Pass on what has become durable."""
        self._heard(actor, events)
