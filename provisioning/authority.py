"""The certificate authority: a root, an issuer for each kind of participant, a signer of kits.

The root signs four certificates once and may then be taken offline (`root.key` moved away): the
issuers suffice to add, renew and revoke participants. All keys are on P-256.
"""

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flplatform.core.errors import ConfigError, UnauthenticatedError
from flplatform.security.identity import ISSUER_FILES, USAGES, Kind, uri_of
from provisioning.project import is_ip

BACKDATED = timedelta(minutes=5)
ROOT, SIGNER = "root", "kits"
ISSUERS: Mapping[Kind, str] = {
    kind: name.removesuffix(".crt") for kind, name in ISSUER_FILES.items()
}


@dataclass(frozen=True)
class Issuer:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate, PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    def revocations(self, serials: Iterable[int], number: int, now: datetime) -> bytes:
        """Return its revocation list, PEM, valid for longer than anything that it issued.

        Args:
            serials: what is revoked.
            number: higher than that of every earlier list.
            now: UTC.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(self.certificate.not_valid_before_utc)  # a slow clock must not refuse it
            .next_update(self.certificate.not_valid_after_utc + timedelta(days=1))
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(_authority_id(self.key), critical=False)
        )
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


@dataclass(frozen=True)
class Authority:
    """What provisioning works with: the root's certificate, the issuers, the signer of kits."""

    project: str
    root: x509.Certificate
    issuers: Mapping[Kind, Issuer]
    signer: Issuer

    def issue(
        self,
        kind: Kind,
        organisation: str,
        name: str,
        key: ec.EllipticCurvePublicKey,
        *,
        days: int,
        now: datetime,
        role: str = "",
        hosts: Sequence[str] = (),
    ) -> x509.Certificate:
        """Issue a participant's certificate.

        Args:
            kind: chooses issuer and extended key usage.
            organisation: theirs.
            name: the common name, and the end of the URI.
            key: their public key.
            days: validity, cut to the issuer's.
            now: UTC; validity begins five minutes earlier.
            role: an admin's console role.
            hosts: a server's host names and IP addresses.
        """
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(uri_of(self.project, kind, organisation, name))
        ]
        for host in hosts:
            ip = is_ip(host)
            names.append(x509.IPAddress(ipaddress.ip_address(host)) if ip else x509.DNSName(host))
        extensions = [x509.ExtendedKeyUsage([USAGES[kind]]), x509.SubjectAlternativeName(names)]
        subject = _subject(name, organisation, role)
        return _sign(subject, key, self.issuers[kind], days, now, extensions)


def create(project: str, days: int, now: datetime) -> tuple[Authority, Issuer]:
    """Make a new authority; the second value is the root with its key.

    Args:
        project: the federation's name, which becomes the root's organisation.
        days: validity of the root and of what it signs.
        now: UTC.
    """
    key = new_key()
    subject = _subject("root", project)
    certificate = _sign(subject, key.public_key(), None, days, now, path_length=1, own_key=key)
    root = Issuer(certificate, key)

    def signed(name: str, extensions: list[x509.ExtensionType], length: int | None) -> Issuer:
        inner = new_key()
        subject = _subject(name, project)
        public = inner.public_key()
        return Issuer(_sign(subject, public, root, days, now, extensions, length), inner)

    issuers = {kind: signed(name.replace("_", " "), [], 0) for kind, name in ISSUERS.items()}
    signer = signed(SIGNER, [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])], None)
    return Authority(project, certificate, issuers, signer), root


def new_key() -> ec.EllipticCurvePrivateKey:
    """Draw a private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: str | None) -> bytes:
    """Encode a private key as PKCS#8 PEM, encrypted if there is a passphrase."""
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        encryption = BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def load_issuer(certificate: bytes, key: bytes, passphrase: str, name: str) -> Issuer:
    """Load a certificate with its encrypted key.

    Raises:
        UnauthenticatedError: the passphrase is wrong.
        ConfigError: they are damaged, or do not belong together.
    """
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise ConfigError(f"{name}.crt is not a certificate: {error}") from None
    try:
        private = load_pem_private_key(key, passphrase.encode())
    except (ValueError, TypeError):
        raise UnauthenticatedError(f"the passphrase does not open {name}.key") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or (
        private.public_key() != loaded.public_key()
    ):
        raise ConfigError(f"{name}.key is not the key of {name}.crt")
    return Issuer(loaded, private)


def _subject(name: str, organisation: str, role: str = "") -> x509.Name:
    attributes = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
        x509.NameAttribute(NameOID.COMMON_NAME, name),
    ]
    if role:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role))
    return x509.Name(attributes)


def _authority_id(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _sign(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: Issuer | None,
    days: int,
    now: datetime,
    extensions: Sequence[x509.ExtensionType] = (),
    path_length: int | None = None,
    own_key: ec.EllipticCurvePrivateKey | None = None,
) -> x509.Certificate:
    """Sign one certificate: an authority's if `path_length` is given, else a leaf's."""
    is_authority = path_length is not None
    signing_key = issuer.key if issuer else own_key
    assert signing_key is not None
    end = now + timedelta(days=days)
    if issuer:
        end = min(end, issuer.certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(is_authority, path_length), critical=True)
        .add_extension(_key_usage(is_authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_authority_id(signing_key), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signing_key, hashes.SHA256())


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
