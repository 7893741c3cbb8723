import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flplatform.core.errors import ConfigError, UnauthenticatedError
from flplatform.security.identity import (
    MAX_CERTIFICATE_BYTES,
    Kind,
    TrustStore,
    identity_of,
    load_certificate,
    uri_of,
)
from provisioning.authority import Authority, Issuer, create, new_key
from tests.support.federation import Federation

NOW = datetime.now(UTC).replace(microsecond=0)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass
class Draft:
    """A certificate that is right unless something is changed."""

    uris: tuple[str, ...] = ("flp://test/site/org/site-1",)
    names: tuple[str, ...] = ("site-1",)
    units: tuple[str, ...] = ()
    usages: tuple[x509.ObjectIdentifier, ...] = (CLIENT,)
    ca: bool | None = False
    signs: bool = False
    other: tuple[x509.GeneralName, ...] = ()
    key: Any = field(default_factory=new_key)

    def der(self, issuer: Issuer) -> bytes:
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in self.names]
        attributes += [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in self.units
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(attributes))
            .issuer_name(issuer.certificate.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(minutes=5))
            .not_valid_after(NOW + timedelta(days=1))
        )
        names = [x509.UniformResourceIdentifier(uri) for uri in self.uris] + list(self.other)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if self.usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.usages), critical=False)
        if self.ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(self.ca, None), critical=True)
        flags = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        usage = x509.KeyUsage(digital_signature=True, key_cert_sign=self.signs, **flags)
        builder = builder.add_extension(usage, critical=True)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False
        )
        return builder.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_the_draft_itself_is_accepted(authority: Authority) -> None:
    der = Draft().der(authority.issuers["site"])
    identity = identity_of(der)
    assert (identity.project, identity.kind, identity.organisation, identity.name) == (
        "test",
        "site",
        "org",
        "site-1",
    )
    assert identity.role == ""
    assert identity.uri == uri_of("test", "site", "org", "site-1")
    assert identity.fingerprint == load_certificate(der).fingerprint(hashes.SHA256()).hex()
    assert identity.not_after == NOW + timedelta(days=1)


ADMIN_URI = ("flp://test/admin/org/amy@x.org",)
MALFORMED: dict[str, tuple[Draft, str]] = {
    "no san": (Draft(uris=()), "has no extension subjectAltName"),
    "no uri": (Draft(uris=(), other=(x509.DNSName("site-1"),)), "names 0 URIs"),
    "two uris": (Draft(uris=Draft.uris * 2), "names 2 URIs"),
    "web uri": (Draft(uris=("https://test/site/org/site-1",)), "is not flp://"),
    "short uri": (Draft(uris=("flp://test/site/site-1",)), "is not flp://"),
    "long uri": (Draft(uris=("flp://test/site/org/site-1/x",)), "is not flp://"),
    "unknown kind": (Draft(uris=("flp://test/root/org/site-1",)), "is not flp://"),
    "upper case": (Draft(uris=("flp://test/site/org/Site-1",), names=("Site-1",)), "is not flp"),
    "percent": (Draft(uris=("flp://test/site/org/site%2d1",)), "is not flp://"),
    "trailing newline": (Draft(uris=("flp://test/site/org/site-1\n",)), "is not flp://"),
    "nul": (Draft(uris=("flp://test/site/org/site-1\0",)), "is not flp://"),
    "long name": (Draft(uris=("flp://t/site/o/" + "a" * 64,), names=("a" * 64,)), "is not flp"),
    "person as site": (Draft(uris=("flp://t/site/o/a@b",), names=("a@b",)), "not the name of"),
    "other cn": (Draft(names=("site-2",)), "differs from 'site-1'"),
    "unicode cn": (Draft(names=("site\u20101",)), "differs from 'site-1'"),
    "nul cn": (Draft(names=("site-1\0x",)), "differs from 'site-1'"),
    "two cns": (Draft(names=("site-1", "site-2")), "differs from 'site-1'"),
    "no cn": (Draft(names=()), "differs from 'site-1'"),
    "no eku": (Draft(usages=()), "has no extension extendedKeyUsage"),
    "server eku": (Draft(usages=(SERVER,)), "serverAuth, not clientAuth alone"),
    "both ekus": (Draft(usages=(CLIENT, SERVER)), "clientAuth, serverAuth, not clientAuth alone"),
    "any eku": (Draft(usages=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)), "not clientAuth"),
    "authority": (Draft(ca=True), "certificate of an authority"),
    "no constraints": (Draft(ca=None), "has no extension basicConstraints"),
    "may sign": (Draft(signs=True), "allows it to sign certificates"),
    "site with role": (Draft(units=("project_admin",)), "a site has no role"),
    "admin without role": (Draft(uris=ADMIN_URI, names=("amy@x.org",)), "is not one role"),
    "admin with odd role": (
        Draft(uris=ADMIN_URI, names=("amy@x.org",), units=("king",)),
        "is not one role",
    ),
    "admin with two roles": (
        Draft(uris=ADMIN_URI, names=("amy@x.org",), units=("lead", "member")),
        "is not one role",
    ),
    "server with client eku": (
        Draft(uris=("flp://test/server/org/server",), names=("server",)),
        "not serverAuth alone",
    ),
    "p-384": (Draft(key=ec.generate_private_key(ec.SECP384R1())), "not on the curve P-256"),
    "rsa": (Draft(key=rsa.generate_private_key(65537, 2048)), "not on the curve P-256"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_certificates(case: str, authority: Authority) -> None:
    draft, reason = MALFORMED[case]
    with pytest.raises(UnauthenticatedError) as caught:
        identity_of(draft.der(authority.issuers["site"]))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"\x30\x00", b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate(data: bytes) -> None:
    with pytest.raises(UnauthenticatedError, match="not a certificate"):
        load_certificate(data)


def test_a_huge_certificate_is_refused_unread() -> None:
    with pytest.raises(UnauthenticatedError, match="refused unread"):
        load_certificate(b"x" * (MAX_CERTIFICATE_BYTES + 1))


@pytest.mark.parametrize("name", ["server", "site-1", "amy@x.org"])
def test_kits_hold_what_is_demanded(federation: Federation, trust: TrustStore, name: str) -> None:
    kit = federation.open(name)
    leaf = load_certificate(kit.chain)
    identity = trust.verify_chain(leaf, kit.identity.kind)
    assert identity == kit.identity == identity_of(leaf.public_bytes(Encoding.DER))
    assert (identity.not_after - leaf.not_valid_before_utc) < timedelta(days=397)
    assert leaf.serial_number.bit_length() > 100
    trust.check(identity, datetime.now(UTC))


def test_an_admin_s_role_comes_from_the_certificate(federation: Federation) -> None:
    identity = federation.open("bob").identity
    assert (identity.role, identity.organisation) == ("member", "site-1")
    assert identity.as_actor("1.2.3.4") == {
        "name": "bob",
        "role": "member",
        "organisation": "site-1",
        "fingerprint": identity.fingerprint,
        "peer": "1.2.3.4",
    }


@pytest.mark.parametrize(
    ("name", "kind"), [("site-1", "admin"), ("bob", "site"), ("bob", "server")]
)
def test_another_kind_is_refused(
    federation: Federation, trust: TrustStore, name: str, kind: Kind
) -> None:
    with pytest.raises(UnauthenticatedError, match=f"not a {kind}"):
        trust.verify_chain(federation.open(name).chain, kind)


def trust_of(authority: Authority, root: Issuer, *revoked: int) -> TrustStore:
    lists = [root.revocations((), 1, NOW)]
    lists += [issuer.revocations(revoked, 2, NOW) for issuer in authority.issuers.values()]
    return TrustStore(
        authority.root,
        {kind: [issuer.certificate] for kind, issuer in authority.issuers.items()},
        [x509.load_pem_x509_crl(item) for item in lists],
    )


def test_the_issuer_of_another_kind_is_refused(rooted: tuple[Authority, Issuer]) -> None:
    authority, root = rooted
    trust = trust_of(authority, root)
    trust.verify_chain(Draft().der(authority.issuers["site"]), "site")
    with pytest.raises(UnauthenticatedError, match="not issued by an authority that is trusted"):
        trust.verify_chain(Draft().der(authority.issuers["admin"]), "site")
    with pytest.raises(UnauthenticatedError, match="not issued by an authority"):
        trust.verify_chain(Draft().der(root), "site")


def test_another_project_under_the_same_root_is_refused(rooted: tuple[Authority, Issuer]) -> None:
    authority, root = rooted
    draft = Draft(uris=("flp://other/site/org/site-1",))
    with pytest.raises(UnauthenticatedError, match="is not of project 'test'"):
        trust_of(authority, root).verify_chain(draft.der(authority.issuers["site"]), "site")


def test_expired_and_not_yet_valid_name_the_time(rooted: tuple[Authority, Issuer]) -> None:
    authority, root = rooted
    trust, der = trust_of(authority, root), Draft().der(authority.issuers["site"])
    trust.verify_chain(der, "site", NOW - timedelta(minutes=4))
    with pytest.raises(UnauthenticatedError, match="not yet valid before .* compare the clocks"):
        trust.verify_chain(der, "site", NOW - timedelta(minutes=6))
    with pytest.raises(UnauthenticatedError, match=f"has expired at {NOW.year}"):
        trust.verify_chain(der, "site", NOW + timedelta(days=1, seconds=1))
    with pytest.raises(UnauthenticatedError, match="expired at"):
        trust.check(identity_of(der), NOW + timedelta(days=1, seconds=1))


def test_revoked_is_refused_with_and_without_the_chain(rooted: tuple[Authority, Issuer]) -> None:
    authority, root = rooted
    der = Draft().der(authority.issuers["site"])
    trust = trust_of(authority, root, load_certificate(der).serial_number)
    with pytest.raises(UnauthenticatedError, match="it is revoked"):
        trust.verify_chain(der, "site")
    with pytest.raises(UnauthenticatedError, match="is revoked"):
        trust.check(identity_of(der), NOW)


def test_a_revoked_issuer_is_refused(rooted: tuple[Authority, Issuer]) -> None:
    authority, root = rooted
    issuer = authority.issuers["site"]
    lists = [root.revocations([issuer.certificate.serial_number], 2, NOW)]
    lists.append(issuer.revocations((), 1, NOW))
    trust = TrustStore(
        authority.root,
        {"site": [issuer.certificate]},
        [x509.load_pem_x509_crl(item) for item in lists],
    )
    with pytest.raises(UnauthenticatedError, match=r"authority CN=site issuer.*it is revoked"):
        trust.verify_chain(Draft().der(issuer), "site")


def test_a_missing_or_forged_list_is_refused(rooted: tuple[Authority, Issuer]) -> None:
    authority, root = rooted
    issuers: dict[Kind, list[x509.Certificate]] = {"site": [authority.issuers["site"].certificate]}
    own = x509.load_pem_x509_crl(root.revocations((), 1, NOW))
    with pytest.raises(ConfigError, match="no revocation list of CN=site issuer"):
        TrustStore(authority.root, issuers, [own])
    forger = create("test", 10, NOW)[0].issuers["site"]
    forged = x509.load_pem_x509_crl(forger.revocations((), 9, NOW))
    with pytest.raises(ConfigError, match="is not signed by it"):
        TrustStore(authority.root, issuers, [own, forged])


def test_an_expired_list_refuses_everybody(rooted: tuple[Authority, Issuer]) -> None:
    authority, root = rooted
    later = NOW + timedelta(days=4000)
    with pytest.raises(UnauthenticatedError):
        trust_of(authority, root).verify_chain(
            Draft().der(authority.issuers["site"]), "site", later
        )


def test_a_foreign_authority_is_refused(trust: TrustStore) -> None:
    der = Draft().der(create("test", 10, NOW)[0].issuers["site"])
    with pytest.raises(UnauthenticatedError, match="not issued by an authority"):
        trust.verify_chain(der, "site")
    foreign = trustme.CA().issue_cert("site-1").cert_chain_pems[0].bytes()
    with pytest.raises(UnauthenticatedError):
        trust.verify_chain(foreign, "site")


def test_kit_signers_are_not_participants(
    rooted: tuple[Authority, Issuer], federation: Federation
) -> None:
    authority, root = rooted
    trust = trust_of(authority, root)
    trust.verify_signer(authority.signer.certificate)
    with pytest.raises(UnauthenticatedError, match="not codeSigning alone"):
        trust.verify_signer(Draft().der(authority.issuers["site"]))
    with pytest.raises(UnauthenticatedError, match="no extension subjectAltName"):
        trust.verify_chain(authority.signer.certificate, "site")
    with pytest.raises(UnauthenticatedError, match="not issued by an authority"):
        federation.open("server").trust.verify_signer(authority.signer.certificate)


def test_ports_trust_one_kind_only(federation: Federation, trust: TrustStore) -> None:
    roots: Callable[[Kind], bytes] = trust.tls_roots
    assert len({roots("server"), roots("site"), roots("admin")}) == 3
    with pytest.raises(ConfigError, match="holds no issuer of site certificates"):
        federation.open("bob").trust.tls_roots("site")


def test_server_certificates_name_every_address(federation: Federation) -> None:
    names = (
        load_certificate(federation.open("server").chain)
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]
