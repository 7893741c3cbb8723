"""Denials on the server: in force at once, in the federation's log, carried to every site."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol

from flplatform.core.access import DenialView
from flplatform.core.control import SiteReply
from flplatform.core.errors import NotFoundError, PermissionDeniedError
from flplatform.security.denials import REVOKED, Denial, open_denial
from flplatform.security.identity import TrustStore
from flplatform.security.signing import MAX_SKEW_S
from flplatform.server.client_manager import ClientManager
from flplatform.server.relay import Reply, RequestRelay
from flplatform.server.runs import Runs

TOPIC = "denials"
"""Of the requests that carry them."""

MAX_ORDERS = 2000
"""Most denials that one request carries: sites take in no more at once."""


class Trusting(Protocol):
    """Holds the trust store of now; it is replaced when revocation lists change."""

    store: TrustStore


class DenialDesk:
    """Implements `core.access.AccessControl`; lives on the event loop.

    Args:
        trust: holds the trust store of now.
        runs: keeps the federation's log.
        clients: who is there, and who is denied.
        relay: carries denials to sites.
        skew_s: how far a signer's clock may be off.
        clock: the present, UTC.
    """

    def __init__(
        self,
        trust: Trusting,
        runs: Runs,
        clients: ClientManager,
        relay: RequestRelay,
        *,
        skew_s: float = MAX_SKEW_S,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._denials = clients.denials
        self._trust = trust
        self._runs = runs
        self._clients = clients
        self._relay = relay
        self._skew_s = skew_s
        self._clock = clock
        self._sent: dict[str, list[asyncio.Future[Reply]]] = {}

    def denials(self) -> list[DenialView]:
        """Return the denials in force, oldest first."""
        return [_view(word) for word in self._denials.in_force()]

    def denied(self, kind: str, name: str, organisation: str) -> DenialView | None:
        """Return the denial that is in force for a participant, if there is one."""
        word = self._denials.find(kind, name, organisation)
        return _view(word) if word else None

    def demand_site(self, site: str) -> None:
        """Refuse a site that is denied.

        Raises:
            PermissionDeniedError: names who denied it.
        """
        if word := self._denials.find("site", site, self._clients.known.get(site, "")):
            raise PermissionDeniedError(f"{site} was revoked by {word.by}", rule=REVOKED)

    async def deny(self, order: bytes, signer: str) -> tuple[str, str, bool]:
        """Take in a signed denial; see `core.access.AccessControl`.

        Raises:
            FLError: the signature does not hold, or it is not the signer's to give.
            ResourceExhaustedError: it cannot be stored, so nothing has happened.
        """
        word = open_denial(
            order, self._trust.store, self._clock(), self._denials, fresh=True, skew_s=self._skew_s
        )
        if word.by != signer:
            raise PermissionDeniedError(
                f"the denial is signed by {word.by}, the session is {signer}'s", rule="own order"
            )
        await self._runs.deny(word)
        if word.kind == "site":
            self._shut_out(word.name)
        return word.kind, word.name, word.undo

    def _shut_out(self, site: str) -> None:
        """End what a site has under way, if it is denied; its waiting calls return refused."""
        if site in self._clients.barred():
            with suppress(NotFoundError):  # it was not there
                self._clients.remove(site, "revoked")
            self._relay.reset(site)
            for future in self._sent.pop(site, ()):
                future.cancel()
        self._runs.site_changed(site)

    def send(self, site: str) -> "list[asyncio.Future[Reply]]":
        """Put all denials into a site's outbox, in place of what waited there before."""
        for future in self._sent.pop(site, ()):
            future.cancel()
        orders = [word.to_text() for word in self._denials.words()]
        if not orders or site in self._clients.barred():
            return []
        self._sent[site] = [
            self._relay.post(site, TOPIC, body={"orders": orders[start : start + MAX_ORDERS]})
            for start in range(0, len(orders), MAX_ORDERS)
        ]
        return self._sent[site]

    async def carry(self, sites: Sequence[str], timeout_s: float) -> dict[str, SiteReply]:
        """Send all denials to sites and wait for their answers; who is silent gets them later."""
        sent = {site: self.send(site) for site in sites}
        waiting = [future for futures in sent.values() for future in futures]
        if waiting:
            await asyncio.wait(waiting, timeout=timeout_s)
        return {site: _answer(futures, timeout_s) for site, futures in sent.items()}

    def site_certificates(self) -> Mapping[str, datetime]:
        """Return when the certificate of each site ends that has registered since the start."""
        return dict(self._clients.not_after)


def _answer(futures: "Sequence[asyncio.Future[Reply]]", timeout_s: float) -> SiteReply:
    """Return a site's answer to what it was sent: the first that is not `ok`, if there is one."""
    for future in futures:
        if not future.done() or future.cancelled():
            return SiteReply("no_reply", message=f"no reply after {timeout_s:.1f} s")
        reply = future.result()
        if reply.status != "ok" or reply.body.get("refused"):
            return SiteReply(
                "refused" if reply.status == "ok" else reply.status,
                reply.body,
                reply.message or str(reply.body.get("refused"))[:500],
                reply.rule,
            )
    return SiteReply("ok")


def _view(word: Denial) -> DenialView:
    since = word.issued_at.isoformat(timespec="seconds")
    return DenialView(word.name, word.kind, word.organisation, since, word.by, word.reason)
