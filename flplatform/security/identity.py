"""Who a certificate speaks for, and whether its chain holds.

An identity is read from a certificate and from nothing else. TLS proves possession of the key;
here the certificate's own claims are checked (SEC-04), because gRPC demands neither an extended
key usage nor a role, and chains are checked against revocation lists by OpenSSL's own store.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID, ObjectIdentifier
from OpenSSL import crypto

from flplatform.core.config import NAME_PATTERN, PERSON_PATTERN, Role
from flplatform.core.errors import ConfigError, UnauthenticatedError

Kind = Literal["server", "site", "admin"]
ISSUER_FILES: Mapping[Kind, str] = {
    "server": "server_issuer.crt",
    "site": "site_issuer.crt",
    "admin": "user_issuer.crt",
}
USAGES: Mapping[Kind, ObjectIdentifier] = {
    "server": Usage.SERVER_AUTH,
    "site": Usage.CLIENT_AUTH,
    "admin": Usage.CLIENT_AUTH,
}
MAX_CERTIFICATE_BYTES = 16 << 10

_URI = re.compile(
    rf"flp://({NAME_PATTERN})/(server|site|admin)/({NAME_PATTERN})/({PERSON_PATTERN})", re.ASCII
)
_NAME = re.compile(NAME_PATTERN, re.ASCII)
_REASONS = {
    7: "its signature is wrong",
    9: "it is not yet valid",
    10: "it has expired",
    11: "its issuer's revocation list is not yet valid",
    12: "its issuer's revocation list has expired",
    23: "it is revoked",
    3: "its issuer's revocation list is missing",
}
_UNKNOWN_ISSUER = {2, 18, 19, 20, 21}


@dataclass(frozen=True, slots=True)
class Identity:
    """A participant, as its certificate names it.

    Attributes:
        role: an admin's console role, empty for servers and sites.
        fingerprint: SHA-256 of the certificate (DER), in hex.
        not_after: end of validity, UTC.
    """

    project: str
    kind: Kind
    organisation: str
    name: str
    role: Role | Literal[""]
    fingerprint: str
    serial: int
    not_after: datetime

    @property
    def uri(self) -> str:
        """The URI of the certificate's subject alternative name."""
        return uri_of(self.project, self.kind, self.organisation, self.name)

    def as_actor(self, peer: str = "") -> dict[str, str]:
        """Return the fields under which the audit names this identity."""
        return {
            "name": self.name,
            "role": self.role or self.kind,
            "organisation": self.organisation,
            "fingerprint": self.fingerprint,
            "peer": peer,
        }


def uri_of(project: str, kind: Kind, organisation: str, name: str) -> str:
    """Return `flp://project/kind/organisation/name`."""
    return f"flp://{project}/{kind}/{organisation}/{name}"


def load_certificate(data: bytes) -> x509.Certificate:
    """Parse one certificate, PEM (the first of a chain) or DER.

    Raises:
        UnauthenticatedError: it is neither, or too large.
    """
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise UnauthenticatedError(f"a certificate of {len(data)} bytes is refused unread")
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)
    except ValueError as error:
        raise UnauthenticatedError(f"not a certificate: {error}") from None


def fingerprint_of(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of the certificate (DER), in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


@lru_cache(maxsize=4096)
def identity_of(certificate: bytes) -> Identity:
    """Read the identity of a leaf certificate, PEM or DER. Says nothing about its issuer.

    Raises:
        UnauthenticatedError: the certificate is not exactly what provisioning issues.
    """
    return identity_in(load_certificate(certificate))


def identity_in(certificate: x509.Certificate) -> Identity:
    """As `identity_of`, for a parsed certificate.

    Raises:
        UnauthenticatedError: the certificate is not exactly what provisioning issues.
    """
    try:
        return _read_identity(certificate)
    except x509.ExtensionNotFound as error:
        name = error.oid._name
        raise UnauthenticatedError(f"the certificate has no extension {name}") from None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise UnauthenticatedError(f"malformed certificate: {error}") from None


def _read_identity(certificate: x509.Certificate) -> Identity:
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise UnauthenticatedError(f"the certificate names {len(uris)} URIs instead of one")
    match = _URI.fullmatch(uris[0])
    if match is None:
        raise UnauthenticatedError(f"{uris[0]!r:.200} is not flp://project/kind/organisation/name")
    project, organisation, name = match[1], match[3], match[4]
    kind = cast(Kind, match[2])
    if kind != "admin" and not _NAME.fullmatch(name):
        raise UnauthenticatedError(f"{name!r} is not the name of a {kind}")
    if (common := _subject(certificate, NameOID.COMMON_NAME)) != [name]:
        raise UnauthenticatedError(f"common name {common} differs from {name!r} in the URI")
    check_leaf(certificate, USAGES[kind])
    units = _subject(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
    allowed: tuple[str, ...] = get_args(Role)
    if kind == "admin" and (len(units) != 1 or units[0] not in allowed):
        raise UnauthenticatedError(f"{units} is not one role of {', '.join(allowed)}")
    if kind != "admin" and units:
        raise UnauthenticatedError(f"a {kind} has no role, but the certificate says {units}")
    role = cast(Role, units[0]) if units else ""
    return Identity(
        project=project,
        kind=kind,
        organisation=organisation,
        name=name,
        role=role,
        fingerprint=fingerprint_of(certificate),
        serial=certificate.serial_number,
        not_after=certificate.not_valid_after_utc,
    )


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _subject(certificate: x509.Certificate, oid: ObjectIdentifier) -> list[str]:
    return [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(oid)]


def check_leaf(certificate: x509.Certificate, usage: ObjectIdentifier) -> None:
    """Demand an end-entity certificate on P-256 with exactly this extended key usage.

    Raises:
        UnauthenticatedError: it is something else.
        cryptography.x509.ExtensionNotFound: an extension is missing.
    """
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    if list(usages) != [usage]:
        names = ", ".join(item._name for item in usages)
        raise UnauthenticatedError(f"its extended key usage is {names}, not {usage._name} alone")
    if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise UnauthenticatedError("it is the certificate of an authority, not of a participant")
    if certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
        raise UnauthenticatedError("its key usage allows it to sign certificates")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise UnauthenticatedError("its key is not on the curve P-256")


class TrustStore:
    """The root, the issuer of each kind of participant, and their revocation lists. Immutable.

    The root certificate's organisation names the project; other projects' certificates are
    refused even under the same root.

    Args:
        root: the federation's root certificate.
        issuers: the issuing certificates trusted for each kind; a kind may be absent.
        revocations: lists of the root and the issuers; those of other authorities are ignored.

    Raises:
        ConfigError: an authority has no list, or a list is not signed by its authority.
    """

    def __init__(
        self,
        root: x509.Certificate,
        issuers: Mapping[Kind, Sequence[x509.Certificate]],
        revocations: Sequence[x509.CertificateRevocationList],
    ) -> None:
        self.root = root
        self.project = "".join(_subject(root, NameOID.ORGANIZATION_NAME))
        self._issuers = {kind: tuple(certificates) for kind, certificates in issuers.items()}
        authorities = [root, *(item for items in self._issuers.values() for item in items)]
        self._lists: list[x509.CertificateRevocationList] = []
        for authority in authorities:
            self._lists += _lists_of(authority, revocations)
        self.revoked = frozenset(entry.serial_number for item in self._lists for entry in item)

    @classmethod
    def load(cls, startup: Path) -> "TrustStore":
        """Read `root.crt`, the issuers present and `crl.pem` from a kit's `startup` folder.

        Raises:
            ConfigError: a file is missing or not what it should be.
        """
        (root,) = _read_certificates(startup / "root.crt")
        present = {k: startup / f for k, f in ISSUER_FILES.items() if (startup / f).exists()}
        issuers = {kind: _read_certificates(path) for kind, path in present.items()}
        return cls(root, issuers, _read_lists(startup / "crl.pem"))

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 of the root certificate, in hex: what two people compare by telephone."""
        return fingerprint_of(self.root)

    def ends(self) -> list[tuple[str, str, datetime]]:
        """Return (name, what it is, when it ends) of the root, the issuers and their lists."""
        found = [(_common_name(self.root.subject), "root", self.root.not_valid_after_utc)]
        for kind, certificates in self._issuers.items():
            found += [
                (_common_name(each.subject), f"{kind} issuer", each.not_valid_after_utc)
                for each in certificates
            ]
        for item in self._lists:
            if item.next_update_utc is not None:
                found.append((_common_name(item.issuer), "revocation list", item.next_update_utc))
        return found

    def tls_roots(self, kind: Kind) -> bytes:
        """Return the PEM of the issuers of `kind`, to be the only trust anchors of a port.

        Raises:
            ConfigError: this kit does not trust that kind at all.
        """
        if not self._issuers.get(kind):
            raise ConfigError(f"this kit holds no issuer of {kind} certificates")
        return b"".join(item.public_bytes(Encoding.PEM) for item in self._issuers[kind])

    def verify_chain(
        self, leaf: bytes | x509.Certificate, kind: Kind, at: datetime | None = None
    ) -> Identity:
        """Check a certificate up to the root, and that it is one of `kind`.

        Intermediates sent by the peer are never used: each kind's issuers come with the kit.

        Args:
            leaf: PEM, DER or parsed.
            kind: what the certificate must be.
            at: the time to check for, UTC; now if None.

        Raises:
            UnauthenticatedError: names what is wrong.
        """
        certificate = load_certificate(leaf) if isinstance(leaf, bytes) else leaf
        identity = identity_in(certificate)
        if identity.kind != kind:
            raise UnauthenticatedError(f"{identity.uri} is a {identity.kind}, not a {kind}")
        if identity.project != self.project:
            raise UnauthenticatedError(f"{identity.uri} is not of project {self.project!r}")
        self._verify(certificate, self._issuers.get(kind, ()), at)
        return identity

    def verify_signer(self, leaf: bytes | x509.Certificate, at: datetime | None = None) -> None:
        """Check the certificate that signs kits: issued by the root itself, for code signing.

        Raises:
            UnauthenticatedError: names what is wrong.
        """
        certificate = load_certificate(leaf) if isinstance(leaf, bytes) else leaf
        try:
            check_leaf(certificate, Usage.CODE_SIGNING)
        except (x509.ExtensionNotFound, ValueError) as error:
            raise UnauthenticatedError(f"not a kit-signing certificate: {error}") from None
        self._verify(certificate, (self.root,), at)

    def check(self, identity: Identity, now: datetime) -> None:
        """The check of every call: two comparisons and a set lookup, no cryptography.

        Raises:
            UnauthenticatedError: revoked or expired since the connection was made.
        """
        if identity.serial in self.revoked:
            raise UnauthenticatedError(f"the certificate of {identity.name} is revoked")
        if now > identity.not_after:
            since = identity.not_after.isoformat(timespec="seconds")
            raise UnauthenticatedError(f"the certificate of {identity.name} expired at {since}")

    def _verify(
        self,
        certificate: x509.Certificate,
        issuers: Sequence[x509.Certificate],
        at: datetime | None,
    ) -> None:
        store = crypto.X509Store()
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)
        now = (at or datetime.now(UTC)).astimezone(UTC)
        store.set_time(now)
        store.add_cert(crypto.X509.from_cryptography(self.root))
        for item in self._lists:
            store.add_crl(item)
        untrusted = [crypto.X509.from_cryptography(issuer) for issuer in issuers]
        leaf = crypto.X509.from_cryptography(certificate)
        try:
            chain = crypto.X509StoreContext(store, leaf, untrusted).get_verified_chain()
        except crypto.X509StoreContextError as error:
            reason = _reason(error, certificate, self._lists, now)
            raise UnauthenticatedError(reason) from None
        if len(chain) < 2 or chain[1].to_cryptography() not in issuers:
            raise UnauthenticatedError(_not_issued(certificate))


def _not_issued(certificate: x509.Certificate) -> str:
    name = certificate.subject.rfc4514_string()
    return f"certificate {name} was not issued by an authority that is trusted for it here"


def _reason(
    error: crypto.X509StoreContextError,
    leaf: x509.Certificate,
    lists: Sequence[x509.CertificateRevocationList],
    now: datetime,
) -> str:
    code = int(error.errors[0])
    guilty = error.certificate.to_cryptography()
    name = guilty.subject.rfc4514_string()
    if code in _UNKNOWN_ISSUER:
        return _not_issued(guilty)
    reason = _REASONS.get(code, str(error.errors[2]))
    if code == 9:
        reason += f" before {guilty.not_valid_before_utc.isoformat()}; compare the clocks"
    if code == 11:
        issued = max(each.last_update_utc for each in lists if each.issuer == guilty.issuer)
        reason += f" before {issued.isoformat()}; compare the clocks"
    if code in (9, 11):
        reason += f", this one says {now.isoformat(timespec='seconds')}"
    if code == 10:
        reason += f" at {guilty.not_valid_after_utc.isoformat()}"
    return f"{'certificate' if guilty == leaf else 'authority'} {name}: {reason}"


def _lists_of(
    authority: x509.Certificate, revocations: Sequence[x509.CertificateRevocationList]
) -> list[x509.CertificateRevocationList]:
    name = authority.subject.rfc4514_string()
    own = [item for item in revocations if item.issuer == authority.subject]
    if not own:
        raise ConfigError(f"crl.pem has no revocation list of {name}")
    for item in own:
        if not item.is_signature_valid(cast(ec.EllipticCurvePublicKey, authority.public_key())):
            raise ConfigError(f"crl.pem: the revocation list of {name} is not signed by it")
    return own


def _read_certificates(path: Path) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a PEM certificate: {error}") from None
    if path.name == "root.crt" and len(found) != 1:
        raise ConfigError(f"{path} holds {len(found)} certificates instead of one root")
    return found


def _read_lists(path: Path) -> list[x509.CertificateRevocationList]:
    end = b"-----END X509 CRL-----"
    try:
        blocks = path.read_bytes().split(end)[:-1]
        return [x509.load_pem_x509_crl(block.strip() + b"\n" + end + b"\n") for block in blocks]
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a revocation list: {error}") from None
