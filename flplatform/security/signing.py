"""Signatures over exact bytes under a domain tag: what an admin orders, what a kit contains.

The signed text is `flplatform/` tag NUL length(payload) payload: no two (tag, payload) pairs
share it. Verify first, then parse: nothing here reads a payload before its signature holds.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import AfterValidator, Field, model_validator

from flplatform.core.config import Name, PersonName, Strict, parse_json
from flplatform.core.errors import InvalidArgumentError, PermissionDeniedError, UnauthenticatedError
from flplatform.security.identity import (
    Identity,
    Kind,
    TrustStore,
    identity_in,
    load_certificate,
)

MAX_SIGNED_BYTES = 2 << 20
MAX_SKEW_S = 30.0

_TAG = re.compile(r"[a-z][a-z-]{0,30}")
_ALGORITHM = ec.ECDSA(hashes.SHA256())


def _signing() -> ec.ECDSA:
    """Return how to sign: the same bytes alike each time (RFC 6979), where OpenSSL is 3.2 or newer.

    What is packed and signed again is then the same package, and a submission can be repeated.
    """
    try:
        return ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    except UnsupportedAlgorithm:
        return _ALGORITHM


class _Envelope(Strict):
    payload: str = ""
    signature: str
    certificate: str


@dataclass(frozen=True, slots=True)
class Signed:
    """A payload, its ECDSA signature (DER) and the signer's certificate (PEM, the leaf alone)."""

    payload: bytes
    signature: bytes
    certificate: bytes

    def to_bytes(self) -> bytes:
        """Encode as one JSON object."""
        return self._encode({"payload": base64.b64encode(self.payload).decode()})

    def to_detached(self) -> bytes:
        """Encode without the payload, which lies in a file of its own."""
        return self._encode({})

    def _encode(self, fields: dict[str, str]) -> bytes:
        signature = base64.b64encode(self.signature).decode()
        fields |= {"signature": signature, "certificate": self.certificate.decode()}
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode what `to_bytes` made. Nothing is verified yet.

        Raises:
            InvalidArgumentError: it is malformed or too large.
        """
        return cls._decode(data)

    @classmethod
    def from_detached(cls, payload: bytes, data: bytes) -> Self:
        """Decode what `to_detached` made, for this payload. Nothing is verified yet.

        Raises:
            InvalidArgumentError: it is malformed or too large.
        """
        return cls._decode(data, payload)

    @classmethod
    def _decode(cls, data: bytes, payload: bytes | None = None) -> Self:
        if len(data) > MAX_SIGNED_BYTES:
            raise InvalidArgumentError(f"a signed message of {len(data)} bytes is refused unread")
        envelope = parse_json(_Envelope, data, "signature")
        try:
            inner = base64.b64decode(envelope.payload, validate=True)
            signature = base64.b64decode(envelope.signature, validate=True)
            certificate = envelope.certificate.encode("ascii")
        except (binascii.Error, ValueError):
            raise InvalidArgumentError("a signed message holds something not base64") from None
        if payload is not None and inner:
            raise InvalidArgumentError("a detached signature carries a payload")
        return cls(inner if payload is None else payload, signature, certificate)


def preimage(tag: str, payload: bytes) -> bytes:
    """Return the bytes that are signed.

    Raises:
        ValueError: the tag is not lower-case letters and hyphens.
    """
    if not _TAG.fullmatch(tag):
        raise ValueError(f"{tag!r} is not a domain tag")
    return b"flplatform/" + tag.encode() + b"\0" + len(payload).to_bytes(8, "big") + payload


def sign(
    tag: str, payload: bytes, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate | bytes
) -> Signed:
    """Sign `payload` under `tag`; of a PEM chain only the leaf is kept."""
    leaf = load_certificate(certificate) if isinstance(certificate, bytes) else certificate
    signature = key.sign(preimage(tag, payload), _signing())
    return Signed(payload, signature, leaf.public_bytes(Encoding.PEM))


def verify(
    tag: str, signed: Signed, trust: TrustStore, now: datetime, kind: Kind = "admin"
) -> Identity:
    """Check chain, revocation and signature, and return who signed.

    Raises:
        UnauthenticatedError: names what does not hold.
    """
    certificate = load_certificate(signed.certificate)
    identity = trust.verify_chain(certificate, kind, now)
    _verify_signature(tag, signed, certificate, identity.name)
    return identity


def verify_kit(tag: str, signed: Signed, trust: TrustStore, now: datetime) -> None:
    """Check a signature made by provisioning itself.

    Raises:
        UnauthenticatedError: names what does not hold.
    """
    certificate = load_certificate(signed.certificate)
    trust.verify_signer(certificate, now)
    _verify_signature(tag, signed, certificate, "provisioning")


def check_signature(tag: str, signed: Signed) -> x509.Certificate:
    """Check that a signature fits its text; whether its certificate is trusted is another matter.

    Raises:
        UnauthenticatedError: it does not, or the certificate is not a participant's.
    """
    certificate = load_certificate(signed.certificate)
    _verify_signature(tag, signed, certificate, identity_in(certificate).name)
    return certificate


def _verify_signature(tag: str, signed: Signed, certificate: x509.Certificate, who: str) -> None:
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # demanded of every leaf
    try:
        key.verify(signed.signature, preimage(tag, signed.payload), _ALGORITHM)
    except InvalidSignature:
        raise UnauthenticatedError(f"the {tag} signature of {who} does not fit its text") from None


# ------------------------------------------------------------------------------------ orders


def _utc(value: datetime) -> datetime:
    if value.utcoffset() != timedelta(0):
        raise ValueError(f"{value.isoformat()} is not a time in UTC")
    return value


Utc = Annotated[datetime, AfterValidator(_utc)]


class Order(Strict):
    """What an admin signs for sites: valid from `issued_at` until `not_after`, in one project."""

    TAG: ClassVar[str]
    MAX_LIFETIME_S: ClassVar[float]

    project: Name
    issued_at: Utc
    not_after: Utc

    @model_validator(mode="after")
    def _lifetime(self) -> Self:
        lifetime_s = (self.not_after - self.issued_at).total_seconds()
        if not 0 < lifetime_s <= self.MAX_LIFETIME_S:
            raise ValueError(f"is valid for {lifetime_s} s; at most {self.MAX_LIFETIME_S} s")
        return self

    def payload(self) -> bytes:
        """Return the bytes to sign."""
        return self.model_dump_json().encode()


class StartOrder(Order):
    """Start this job, once, at these sites.

    Attributes:
        gpus: site -> processes that work on the job there together, one per GPU; 1 if absent.
        purpose: `validate` allows tasks that measure models, and no others.
    """

    TAG: ClassVar[str] = "start"
    MAX_LIFETIME_S: ClassVar[float] = 7 * 86_400.0

    submission_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    job_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    sites: tuple[Name, ...] = Field(min_length=1)
    gpus: dict[Name, Annotated[int, Field(ge=1, le=1024)]] = {}
    purpose: Literal["train", "validate"] = "train"


class CommandOrder(Order):
    """Carry out one console command: the words that its user typed, targets included."""

    TAG: ClassVar[str] = "command"
    MAX_LIFETIME_S: ClassVar[float] = 86_400.0

    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    argv: tuple[str, ...] = Field(min_length=1, max_length=2000)
    run: int | None = Field(None, ge=1)


class DenialOrder(Order):
    """Deny a name any part in the federation from now on, or undo that.

    It holds without end: `not_after` bounds only how long a server may take it in.

    Attributes:
        undo: takes back every earlier denial of the name.
    """

    TAG: ClassVar[str] = "denial"
    MAX_LIFETIME_S: ClassVar[float] = 3600.0

    name: PersonName
    kind: Literal["site", "admin"]
    reason: str = Field("", max_length=500)
    undo: bool = False


O = TypeVar("O", bound=Order)  # noqa: E741


def sign_order(
    order: Order, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate | bytes
) -> Signed:
    """Sign an order under its own tag."""
    return sign(order.TAG, order.payload(), key, certificate)


def open_order(
    kind: type[O], signed: Signed, trust: TrustStore, now: datetime, skew_s: float = MAX_SKEW_S
) -> tuple[Identity, O]:
    """Verify, then parse, then check project and freshness. Seen ids are the caller's to keep.

    Raises:
        UnauthenticatedError: the signature or its chain does not hold.
        InvalidArgumentError: the signed text is not such an order.
        PermissionDeniedError: another project's, too old, or from a clock too far off.
    """
    identity = verify(kind.TAG, signed, trust, now)
    order = parse_json(kind, signed.payload, f"{kind.TAG} order of {identity.name}")
    if order.project != trust.project:
        raise PermissionDeniedError(
            f"the order is for project {order.project!r}, not {trust.project!r}", rule="project"
        )
    check_fresh(order, now, skew_s)
    return identity, order


def check_fresh(order: Order, now: datetime, skew_s: float = MAX_SKEW_S) -> None:
    """Refuse an order from the future or past its end; both clocks are named.

    Raises:
        PermissionDeniedError: not valid now.
    """
    here = now.isoformat(timespec="seconds")
    skew = timedelta(seconds=skew_s)
    if now < order.issued_at - skew:
        there = order.issued_at.isoformat(timespec="seconds")
        ahead_s = (order.issued_at - now).total_seconds()
        raise PermissionDeniedError(
            f"signed at {there} by the signer's clock, but this clock says {here}: "
            f"they differ by {ahead_s:.0f} s",
            rule=f"clocks within {skew_s:.0f} s",
            hint="set the clocks",
        )
    if now > order.not_after + skew:
        issued, end = (t.isoformat(timespec="seconds") for t in (order.issued_at, order.not_after))
        raise PermissionDeniedError(
            f"signed at {issued} and valid until {end} by the signer's clock, "
            f"but this clock says {here}",
            rule="not after",
            hint="give the command again, or set the clocks",
        )
