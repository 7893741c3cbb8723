"""Requests from the server side to sites, and their replies: one place for every module.

A site fetches its requests by a waiting call. Handing out is not delivery: a request stays in the
outbox until the site names it as received, and until its reply came or its caller gave up.
"""

import asyncio
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Never

from flplatform.core.errors import NotFoundError
from flplatform.rpc.v1 import federated_pb2 as pb

MAX_OUTBOX = 1000
MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 32
"""Of a reply's lists and objects."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A site's answer: status `ok`, `error` or `refused`, or `no_reply` from the relay itself."""

    status: str
    body: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    rule: str = ""


@dataclass(slots=True)
class _Box:
    requests: dict[str, pb.SiteRequest] = field(default_factory=dict)
    received: dict[str, pb.SiteRequest] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class RequestRelay:
    """Outboxes and reply waiters of all sites. Lives on the event loop."""

    def __init__(self) -> None:
        self._closing = False
        self._boxes: dict[str, _Box] = {}
        self._waiters: dict[tuple[str, str], asyncio.Future[Reply]] = {}
        self.posted = 0
        self.returned: Callable[[str], None] = lambda _: None
        """Told of each site that has registered, perhaps as a new process."""

    @property
    def outstanding(self) -> int:
        """Requests without a reply yet."""
        return len(self._waiters)

    def post(
        self, site: str, topic: str, *, signed: bytes = b"", body: Mapping[str, Any] | None = None
    ) -> "asyncio.Future[Reply]":
        """Put a request into a site's outbox; cancel the future to take it back."""
        request = pb.SiteRequest(
            id=secrets.token_hex(16),
            topic=topic,
            signed=signed,
            body=json.dumps(dict(body or {})).encode(),
        )
        box = self._boxes.setdefault(site, _Box())
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if len(box.requests) + len(box.received) >= MAX_OUTBOX:
            future.set_result(Reply("error", message=f"{MAX_OUTBOX} requests wait for {site}"))
            return future
        box.requests[request.id] = request
        self.posted += 1
        box.arrived.set()
        key = (site, request.id)
        self._waiters[key] = future
        future.add_done_callback(lambda _: self._forget(key))
        return future

    def _forget(self, key: tuple[str, str]) -> None:
        self._waiters.pop(key, None)
        if box := self._boxes.get(key[0]):
            box.requests.pop(key[1], None)
            box.received.pop(key[1], None)

    def reset(self, site: str) -> None:
        """Send again what the site received and has not answered: it may have died since."""
        self.returned(site)
        if box := self._boxes.get(site):
            box.requests = {**box.received, **box.requests}
            box.received = {}
            box.arrived.set()

    async def ask(
        self,
        sites: Sequence[str],
        topic: str,
        *,
        timeout_s: float,
        signed: bytes = b"",
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Reply]:
        """Ask several sites at once; every one of them is in the answer, in the order given."""
        futures = {
            site: self.post(site, topic, signed=signed, body=body) for site in dict.fromkeys(sites)
        }
        silent = Reply("no_reply", message=f"no reply after {timeout_s:.1f} s")
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=timeout_s)
            return {
                site: future.result() if future.done() else silent
                for site, future in futures.items()
            }
        finally:  # nobody waits any more, also if the asker has left
            for future in futures.values():
                future.cancel()

    async def retrieve(
        self, site: str, received: Sequence[str], wait_s: float
    ) -> list[pb.SiteRequest]:
        """Return the requests waiting for a site; wait for the first one, `wait_s` at most."""
        box = self._boxes.setdefault(site, _Box())
        for request_id in received:
            if request := box.requests.pop(request_id, None):
                box.received[request_id] = request
        if not box.requests and not self._closing:
            box.arrived.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await box.arrived.wait()
            except TimeoutError:
                return []
        return list(box.requests.values())

    def close(self) -> None:
        """Let all waiting calls return: the server is about to end."""
        self._closing = True
        for box in self._boxes.values():
            box.arrived.set()

    def reply(self, site: str, reply: pb.SiteReply) -> None:
        """Give a reply to who waits for it; a late or unknown one is dropped.

        Raises:
            NotFoundError: nobody waits for it.
        """
        key = (site, reply.request_id)
        future = self._waiters.get(key)
        if future is None or future.done():
            raise NotFoundError(f"nobody waits for a reply to {reply.request_id[:64]!r}")
        self._forget(key)
        status, message = reply.status, reply.message[:2000]
        try:
            body = _body(reply.body)
        except ValueError as error:
            status, body, message = "error", {}, f"its reply cannot be read: {error}"
        if status not in ("ok", "refused"):
            status = "error"
        future.set_result(Reply(status, body, message, reply.rule[:200]))


def _body(data: bytes) -> dict[str, Any]:
    """Read the JSON object of a reply.

    Raises:
        ValueError: it is too large, or none.
    """
    if len(data) > MAX_BODY_BYTES:
        raise ValueError(f"{len(data)} bytes")
    try:
        body = json.loads(
            data or b"{}", parse_constant=_refuse, parse_float=_finite, parse_int=_int64
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("it is no object")
    _check_depth(body)
    return body


def _check_depth(body: dict[str, Any]) -> None:
    """Refuse what is nested so deeply that whoever walks through it would run out of stack."""
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _int64(text: str) -> int:
    """Read a whole number that no arithmetic with floats can fail on."""
    return int(text) if len(text) <= 19 else _refuse(text)


def _refuse(constant: str) -> Never:
    raise ValueError(f"{constant:.20} is not a number that counts")
