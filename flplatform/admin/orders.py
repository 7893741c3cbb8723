"""The signed command in hand: verified, fresh, used once. Its words are what is carried out."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from flplatform.core.errors import PermissionDeniedError, ResourceExhaustedError
from flplatform.security.identity import Identity, Kind, TrustStore
from flplatform.security.signing import CommandOrder, Signed, open_order

MAX_IDS = 10_000
"""Commands per certificate whose ids are remembered at once."""


class Trust(Protocol):
    """Holds the trust store of now; it is replaced when revocation lists change."""

    store: TrustStore

    def identify(self, kind: Kind, certificate: bytes) -> Identity:
        """Return the checked identity behind a certificate that TLS has accepted.

        Raises:
            UnauthenticatedError: of another kind or project, revoked or expired.
        """


@dataclass(slots=True)
class Ordered:
    """A verified command.

    Attributes:
        order: what the user signed.
        signer: who that was.
        signed: the signed bytes, relayed to sites as they are.
        attachment: a second signed order that the command carries; unverified.
        meant_run: the run that a command without a number turned out to mean; it stays so from
            the check of rights to the deed.
        reply_timeout_s: how long its session gives sites to answer; None for the default.
    """

    order: CommandOrder
    signer: Identity
    signed: bytes
    attachment: bytes = b""
    meant_run: int | None = None
    reply_timeout_s: float | None = None


_ORDERED: contextvars.ContextVar[Ordered] = contextvars.ContextVar("flplatform_ordered")


def ordered() -> Ordered:
    """Return the command in hand; only while one is carried out."""
    return _ORDERED.get()


def take_in_hand(command: Ordered) -> None:
    """Make a command the one in hand, for the current task and those that it starts."""
    _ORDERED.set(command)


class OrderBook:
    """Opens signed commands, each of them once. Lives on the event loop.

    Args:
        trust: holds the trust store of now.
        skew_s: how far the signer's clock may be off.
        clock: the present, UTC.
    """

    def __init__(
        self, trust: Trust, skew_s: float, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._trust = trust
        self._skew_s = skew_s
        self._clock = clock
        self._used: dict[str, dict[str, float]] = {}  # fingerprint -> id -> until when

    def open(self, signed: bytes, attachment: bytes, fingerprint: str) -> Ordered:
        """Verify a command, check who signed it and when, and use up its id.

        Args:
            signed: a signed `CommandOrder`.
            attachment: kept as it is.
            fingerprint: of the certificate that presents it.

        Raises:
            FLError: malformed, not signed by this certificate, too old, or used before.
        """
        now = self._clock()
        signer, order = open_order(
            CommandOrder, Signed.from_bytes(signed), self._trust.store, now, self._skew_s
        )
        if signer.fingerprint != fingerprint:
            raise PermissionDeniedError(
                f"the command is signed by {signer.name} with another certificate", rule="own order"
            )
        self._use(fingerprint, order, now.timestamp())
        return Ordered(order, signer, signed, attachment)

    def _use(self, fingerprint: str, order: CommandOrder, now: float) -> None:
        used = self._used.get(fingerprint, {})
        if order.id in used:
            raise PermissionDeniedError("this command was carried out already", rule="single use")
        used = {key: until for key, until in used.items() if until > now}
        if len(used) >= MAX_IDS:
            raise ResourceExhaustedError("too many commands at once", rule="command rate")
        # An order counts as fresh until the skew after its end.
        self._used[fingerprint] = used | {order.id: order.not_after.timestamp() + self._skew_s + 1}
