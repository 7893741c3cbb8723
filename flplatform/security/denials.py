"""Who is denied: names that an admin has shut out by a signed denial, until it is undone.

Server and sites hold the same set, each by its own verification. For each name the newest word
counts, by the time at which it was signed, so that replaying or reordering changes nothing. The
denial of an org_admin reaches the names of the own organisation alone, whatever it claims.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from flplatform.core.config import parse_json
from flplatform.core.errors import InvalidArgumentError, PermissionDeniedError
from flplatform.security.identity import Identity, TrustStore, identity_of
from flplatform.security.signing import (
    MAX_SKEW_S,
    DenialOrder,
    Signed,
    check_fresh,
    check_signature,
)

REVOKED = "revoked"
"""The rule by which a denied name is refused."""

DeniedKind = Literal["site", "admin"]


@dataclass(frozen=True, slots=True)
class Denial:
    """One signed word about a name.

    Attributes:
        organisation: whose names it reaches; empty for every organisation's.
        by: who signed it.
        signed: the order as it was signed, to be carried on.
    """

    name: str
    kind: DeniedKind
    organisation: str
    undo: bool
    issued_at: datetime
    by: str
    reason: str
    signed: bytes

    def to_text(self) -> str:
        """Encode the signed order as it is stored and carried."""
        return base64.b64encode(self.signed).decode()


class Denials:
    """A set of denials; of each name, kind and organisation the newest word counts."""

    def __init__(self, words: Iterable[Denial] = ()) -> None:
        self._words: dict[tuple[str, str, str, bool], Denial] = {}
        for word in words:
            self.add(word)

    def add(self, word: Denial) -> bool:
        """Take a word in; return whether it is news."""
        key = (word.kind, word.name, word.organisation, word.undo)
        known = self._words.get(key)
        if known is not None and known.issued_at >= word.issued_at:
            return False
        self._words[key] = word
        return True

    def words(self) -> list[Denial]:
        """Return what must be remembered and carried on, in the order of signing."""
        return sorted(self._words.values(), key=lambda word: (word.issued_at, word.undo))

    def in_force(self) -> list[Denial]:
        """Return the denials that are not undone, in the order of signing."""
        return [word for word in self.words() if not word.undo and self._holds(word)]

    def find(self, kind: str, name: str, organisation: str) -> Denial | None:
        """Return the denial that is in force for a participant, if there is one."""
        for reach in ("", organisation):
            word = self._words.get((kind, name, reach, False))
            if word is not None and self._holds(word):
                return word
        return None

    def _holds(self, word: Denial) -> bool:
        undone = self._words.get((word.kind, word.name, "", True))
        return undone is None or undone.issued_at <= word.issued_at

    def demand(self, identity: Identity) -> None:
        """Refuse who is denied.

        Raises:
            PermissionDeniedError: names who denied it, and when.
        """
        word = self.find(identity.kind, identity.name, identity.organisation)
        if word is not None:
            since = word.issued_at.isoformat(timespec="seconds")
            why = f": {word.reason}" if word.reason else ""
            raise PermissionDeniedError(
                f"{identity.name} was revoked by {word.by} at {since}{why}", rule=REVOKED
            )


def open_denial(
    signed: bytes,
    trust: TrustStore,
    now: datetime,
    denials: Denials,
    *,
    fresh: bool,
    skew_s: float = MAX_SKEW_S,
) -> Denial:
    """Verify a denial as of the time at which it was signed.

    Args:
        signed: a signed `DenialOrder`.
        trust: the trust store of now.
        now: the present, UTC.
        denials: what is known; who is denied can deny nobody.
        fresh: whether it must have been signed just now, as the server demands that takes it in;
            a site may learn of it much later.
        skew_s: how far the signer's clock may be off.

    Raises:
        UnauthenticatedError: the signature or its chain does not hold.
        InvalidArgumentError: it is not a denial.
        PermissionDeniedError: another project's, of a time to come, or not the signer's to give.
    """
    envelope = Signed.from_bytes(signed)
    certificate = check_signature(DenialOrder.TAG, envelope)
    order = _payload(envelope)
    # Valid when it was signed, and not revoked by now: a revocation list knows no "since".
    signer = trust.verify_chain(certificate, "admin", min(order.issued_at, now))
    if order.project != trust.project:
        raise PermissionDeniedError(
            f"the denial is for project {order.project!r}, not {trust.project!r}", rule="project"
        )
    if fresh:
        check_fresh(order, now, skew_s)
    elif order.issued_at > now + timedelta(seconds=skew_s):
        raise PermissionDeniedError(
            f"signed at {order.issued_at.isoformat(timespec='seconds')}, which is yet to come",
            rule=f"clocks within {skew_s:.0f} s",
            hint="set the clocks",
        )
    denials.demand(signer)
    demand_right(signer, order)
    return _denial(order, signer, signed)


def demand_right(signer: Identity, order: DenialOrder) -> None:
    """Refuse a denial that is not the signer's to give; no policy widens this.

    Raises:
        PermissionDeniedError: names the rule.
    """
    allowed = ("project_admin",) if order.undo else ("project_admin", "org_admin")
    what = "undo a revocation" if order.undo else "revoke"
    if signer.role not in allowed:
        raise PermissionDeniedError(
            f"{signer.name} may not {what}", rule=f"{what}: {' or '.join(allowed)}"
        )
    if order.kind == "admin" and order.name == signer.name:
        raise PermissionDeniedError(
            f"{signer.name} signed this about the own name", rule="revoke: nobody the own name"
        )


def read_denial(text: str) -> Denial:
    """Read a stored denial that was verified before it was stored.

    Raises:
        UnauthenticatedError, InvalidArgumentError: it is not one.
    """
    signed = decode(text)
    envelope = Signed.from_bytes(signed)
    return _denial(_payload(envelope), identity_of(envelope.certificate), signed)


def decode(text: str) -> bytes:
    """Return the signed order in what `Denial.to_text` wrote.

    Raises:
        InvalidArgumentError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgumentError("a denial is not base64") from None


def _payload(envelope: Signed) -> DenialOrder:
    return parse_json(DenialOrder, envelope.payload, "denial")


def _denial(order: DenialOrder, signer: Identity, signed: bytes) -> Denial:
    return Denial(
        name=order.name,
        kind=order.kind,
        organisation="" if signer.role == "project_admin" else signer.organisation,
        undo=order.undo,
        issued_at=order.issued_at,
        by=signer.name,
        reason=order.reason,
        signed=signed,
    )
