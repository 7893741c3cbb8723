from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from flplatform.core.errors import ConfigError, UnauthenticatedError
from provisioning.authority import Authority, Issuer, create, key_pem, load_issuer, new_key

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def made() -> tuple[Authority, Issuer]:
    return create("heart", 1000, NOW)


def certificates(made: tuple[Authority, Issuer]) -> list[x509.Certificate]:
    authority, root = made
    issuers = [issuer.certificate for issuer in authority.issuers.values()]
    return [root.certificate, *issuers, authority.signer.certificate]


def test_only_authorities_may_sign_and_paths_are_short(made: tuple[Authority, Issuer]) -> None:
    lengths = [
        item.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        for item in certificates(made)
    ]
    assert lengths == [1, 0, 0, 0, None]
    usages = [
        item.extensions.get_extension_for_class(x509.KeyUsage).value for item in certificates(made)
    ]
    assert [usage.key_cert_sign for usage in usages] == [True] * 4 + [False]
    assert [usage.crl_sign for usage in usages] == [True] * 4 + [False]


def test_keys_are_p256_and_serials_random(made: tuple[Authority, Issuer]) -> None:
    found = certificates(made)
    for item in found:
        key = item.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
        assert item.serial_number.bit_length() > 100
        assert item.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert len({item.serial_number for item in found}) == len(found)


def test_leaves_end_no_later_than_their_issuers() -> None:
    authority, _ = create("heart", 10, NOW)
    leaf = authority.issue("site", "a", "s", new_key().public_key(), days=365, now=NOW)
    assert leaf.not_valid_after_utc == NOW + timedelta(days=10)


def test_lists_outlive_what_they_are_for(made: tuple[Authority, Issuer]) -> None:
    authority, root = made
    for issuer in (root, *authority.issuers.values()):
        parsed = x509.load_pem_x509_crl(issuer.revocations([5, 6], 3, NOW))
        assert {entry.serial_number for entry in parsed} == {5, 6}
        assert parsed.next_update_utc is not None
        assert parsed.next_update_utc > issuer.certificate.not_valid_after_utc
        assert parsed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3


def test_keys_are_encrypted_and_checked(made: tuple[Authority, Issuer]) -> None:
    issuer = made[0].issuers["site"]
    secret = key_pem(issuer.key, "passphrase")
    assert b"ENCRYPTED" in secret
    assert load_issuer(issuer.pem, secret, "passphrase", "site").certificate == issuer.certificate
    with pytest.raises(UnauthenticatedError, match=r"does not open site\.key"):
        load_issuer(issuer.pem, secret, "other", "site")
    with pytest.raises(UnauthenticatedError, match=r"does not open site\.key"):
        load_issuer(issuer.pem, key_pem(issuer.key, None), "passphrase", "site")
    with pytest.raises(ConfigError, match="is not the key of"):
        load_issuer(issuer.pem, key_pem(new_key(), "passphrase"), "passphrase", "site")
    with pytest.raises(ConfigError, match="is not a certificate"):
        load_issuer(b"x", secret, "passphrase", "site")
