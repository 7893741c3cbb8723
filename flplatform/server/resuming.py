"""Runs of the process before: gone on with, or left as they are until their logs can be read."""

import asyncio
import logging
from collections.abc import Callable

from flplatform.core.errors import FLError, ResourceExhaustedError, UnavailableError
from flplatform.files.threads import in_thread
from flplatform.server.background import Background
from flplatform.server.ledger import Ledger
from flplatform.server.run_actor import RETRY_S, RunActor

log = logging.getLogger(__name__)

PASSING = (UnavailableError, ResourceExhaustedError)
"""Errors of reading after which the same may be read later."""

UNREADABLE = "unreadable"
"""Status of a run whose log this release cannot go on with; nothing is done to it."""


class Resuming:
    """Takes up every run that has not ended. Lives on the event loop.

    Args:
        ledger: which runs there are.
        load: reads a run; blocks, in any thread.
        take_up: goes on with one.
        background: carries through what must not be left half done.

    Attributes:
        unreadable: why runs stay as they are, by number.
    """

    def __init__(
        self,
        ledger: Ledger,
        load: Callable[[int], RunActor],
        take_up: Callable[[RunActor], None],
        background: Background,
    ) -> None:
        self._ledger = ledger
        self._load = load
        self._take_up = take_up
        self._background = background
        self.unreadable: dict[int, str] = {}

    def begin(self) -> None:
        """Take up what can be read now; come back to the rest if that may pass."""
        for summary in self._ledger.summaries():
            if summary.ended or summary.deleted or summary.run in self._ledger.shelf.prepared:
                continue
            try:
                self._take_up(self._load(summary.run))
            except FLError as error:
                self._leave(summary.run, error)

    def _leave(self, run: int, error: FLError) -> None:
        """Leave a run whose log cannot be read as it is: for good, or until it can be."""
        log.error("run %d stays as it is: %s", run, error)
        self.unreadable[run] = str(error)
        self._ledger.note(run, status=UNREADABLE, reason=str(error))
        if isinstance(error, PASSING):
            self._background.later(self._return_to(run))

    async def _return_to(self, run: int) -> None:
        actor: RunActor | None = None
        while actor is None:
            await asyncio.sleep(RETRY_S)
            try:
                actor = await in_thread(self._load, run)
            except PASSING as error:
                log.debug("run %d stays as it is: %s", run, error)
            except FLError as error:
                self._leave(run, error)
                return
        del self.unreadable[run]
        self._take_up(actor)
