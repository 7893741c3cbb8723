"""`logs`: the lines of this site's run logs, for whom signed command and policy allow.

A command that follows opens a subscription: from then on new lines are pushed to the server, each
as it is written, until the run has ended here, nobody listens any more, or an hour has passed.
"""

import asyncio
import json
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from flplatform.client.run_log import Entry, mark, tail
from flplatform.client.verbs import Asked, Body, SiteVerb, Submitter
from flplatform.core.errors import FLError, NotFoundError, ResourceExhaustedError
from flplatform.core.logs import MAX_FOLLOW_S, LogsWanted, earliest, stamp
from flplatform.core.strict import FromNewer, parse_json
from flplatform.security.identity import Identity

log = logging.getLogger(__name__)

MAX_SUBSCRIPTIONS = 16
MAX_TAIL_BYTES = 256 << 10
"""Of the lines in one reply."""

MAX_QUEUE_BYTES = 256 << 10
"""Of the lines of one subscription that wait to be sent; further ones are dropped and counted."""

MAX_BATCH_BYTES = 64 << 10
COALESCE_S = 0.1
"""A line waits so long for others to go with it."""

KEEP_ALIVE_S = 4.0
"""Without a line an empty batch is sent: the server learns that this site is there, the site
whether anybody listens."""


class LogsBody(FromNewer):
    """What the server adds to a signed `logs`."""

    subscription: str = Field("", pattern=r"^([0-9a-f]{32})?$")
    after: str = Field("", max_length=24)
    """Time of the last line that the server has; lines of that time are sent again."""


class _Subscription:
    """Lines of one run on their way to the server."""

    def __init__(self, run: int, grep: str) -> None:
        self.run = run
        self.over = False
        self.wanted = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._grep = grep
        self._queue: deque[tuple[Entry, int]] = deque()
        self._bytes = 0
        self._dropped = 0

    def put(self, time: str, who: str, texts: Sequence[str]) -> None:
        """Take lines that match, as far as there is room."""
        for text in texts:
            if self._grep not in text:
                continue
            entry = (time, who, text)
            size = len(json.dumps(entry))
            if self._bytes + size > MAX_QUEUE_BYTES:
                self._dropped += 1
                continue
            if self._dropped:
                self._note_dropped(time)
            self._queue.append((entry, size))
            self._bytes += size
        self.wanted.set()

    def end(self) -> None:
        """Send what is left, and then nothing more."""
        self.over = True
        self.wanted.set()

    def take(self) -> list[Entry]:
        """Return the next lines to send; none if there are none."""
        batch: list[Entry] = []
        size = 0
        while self._queue and (not batch or size + self._queue[0][1] <= MAX_BATCH_BYTES):
            entry, each = self._queue.popleft()
            batch.append(entry)
            size += each
        self._bytes -= size
        if not self._queue:
            self.wanted.clear()
            if self._dropped:
                self._note_dropped(stamp(datetime.now(UTC)))
                return batch + self.take()
            if self.over:
                self.wanted.set()
        return batch

    @property
    def empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._queue

    def _note_dropped(self, time: str) -> None:
        """Say how many lines are missing at this place."""
        entry = (time, "log", f"… {self._dropped} lines dropped")
        self._queue.append((entry, 0))
        self._dropped = 0


class SiteLogs:
    """Reads and follows the logs of this site's runs. Lives on the event loop.

    Args:
        folder: where the logs are.
        send: brings a batch to the server, whatever the connection does meanwhile; raises
            NotFoundError if nobody listens any more, another FLError if the server refuses it.
        over: run → whether it was accepted here and has ended.
        submitter: run → who submitted it, as far as this site knows.
        follow_s: how long a log is followed.
        keep_alive_s: pause after which an empty batch is sent.
    """

    def __init__(
        self,
        folder: Path,
        send: Callable[[bytes], Awaitable[None]],
        over: Callable[[int], bool],
        submitter: Callable[[int], Submitter],
        *,
        follow_s: float = MAX_FOLLOW_S,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._folder = folder
        self._send = send
        self._over = over
        self._submitter = submitter
        self._follow_s = follow_s
        self._keep_alive_s = keep_alive_s
        self._subscriptions: dict[str, _Subscription] = {}

    def verb(self) -> SiteVerb:
        """Return the verb; it only reads, so the same order may come again while it is fresh."""
        return SiteVerb(
            "logs",
            "view",
            self._logs,
            repeatable=True,
            reaches=lambda argv, site: LogsWanted.of(argv).reaches(site),
            submitter=self._submitter_of,
        )

    def publish(self, run: int, time: str, who: str, texts: Sequence[str]) -> None:
        """Hear of lines as they are written."""
        for subscription in self._subscriptions.values():
            if subscription.run == run and not subscription.over:
                subscription.put(time, who, texts)

    def ended(self, run: int) -> None:
        """Hear that a run has ended here and writes nothing more."""
        for subscription in self._subscriptions.values():
            if subscription.run == run:
                subscription.end()

    async def close(self) -> None:
        """End all subscriptions at once."""
        tasks = [each.task for each in self._subscriptions.values() if each.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _submitter_of(self, _signer: Identity, argv: Sequence[str]) -> Submitter:
        return self._submitter(LogsWanted.of(argv).run)

    async def _logs(self, asked: Asked) -> Body:
        wanted = LogsWanted.of(asked.order.argv)
        body = parse_json(LogsBody, asked.body or b"{}", "logs")
        follow = wanted.follow and body.subscription and not self._over(wanted.run)
        if follow and body.subscription in self._subscriptions:
            return {"lines": [], "following": True}
        # Both in one go: what is written from here on is pushed, what was before is read.
        path = self._folder / f"run-{wanted.run}.log"
        end = mark(path)
        if end is None and not follow:
            raise NotFoundError(f"no log of run {wanted.run} here")
        if follow:
            self._subscribe(body.subscription, wanted)
        if end is None:
            return {"lines": [], "following": True}
        since = earliest(wanted.since, datetime.now(UTC))
        lines, cut = await asyncio.to_thread(
            tail,
            path,
            end,
            lines=wanted.lines,
            max_bytes=MAX_TAIL_BYTES,
            earliest=max(since, body.after),
            grep=wanted.grep,
        )
        return {"lines": lines, "cut": cut, "following": bool(follow)}

    def _subscribe(self, key: str, wanted: LogsWanted) -> None:
        if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
            raise ResourceExhaustedError(
                f"{MAX_SUBSCRIPTIONS} logs are being followed here", rule="max_subscriptions"
            )
        subscription = _Subscription(wanted.run, wanted.grep)
        self._subscriptions[key] = subscription
        task = asyncio.create_task(self._push(key, subscription), name=f"follow run {wanted.run}")
        subscription.task = task
        task.add_done_callback(lambda _: self._subscriptions.pop(key, None))

    async def _push(self, key: str, subscription: _Subscription) -> None:
        life = secrets.token_hex(4)  # numbers of batches begin anew with every life
        number = 0
        try:
            async with asyncio.timeout(self._follow_s):
                while True:
                    number += 1
                    await self._pause(subscription)
                    batch = subscription.take()
                    done = subscription.over and subscription.empty
                    await self._send(_encoded(key, life, number, batch, "run" if done else ""))
                    if done:
                        break
        except TimeoutError:
            ended = f"{self._follow_s:g} s are over"
            await self._last(_encoded(key, life, number + 1, [], ended))
        except NotFoundError:
            log.debug("nobody follows run %d any more", subscription.run)
        except FLError as error:
            log.warning("following run %d ends: %s", subscription.run, error)

    async def _pause(self, subscription: _Subscription) -> None:
        """Wait for lines, and then for those that come with them."""
        try:
            async with asyncio.timeout(self._keep_alive_s):
                await subscription.wanted.wait()
        except TimeoutError:
            return
        if not subscription.over:
            await asyncio.sleep(COALESCE_S)

    async def _last(self, batch: bytes) -> None:
        try:
            async with asyncio.timeout(self._keep_alive_s):
                await self._send(batch)
        except (FLError, TimeoutError) as error:
            log.debug("the end of a log could not be told: %s", error)


def _encoded(key: str, life: str, number: int, lines: list[Entry], ended: str) -> bytes:
    batch = {"subscription": key, "life": life, "number": number, "lines": lines, "ended": ended}
    return json.dumps(batch).encode()
