import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import (
    ConfigError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from flplatform.security.identity import TrustStore
from flplatform.security.signing import (
    MAX_SIGNED_BYTES,
    CommandOrder,
    Signed,
    StartOrder,
    check_fresh,
    open_order,
    preimage,
    sign,
    sign_order,
    verify,
    verify_kit,
)
from provisioning.authority import create
from tests.support.federation import Federation

NOW = datetime.now(UTC) + timedelta(hours=1)  # the certificates are made while the tests run
START = StartOrder(
    project="test",
    submission_id="0" * 32,
    job_digest="a" * 64,
    sites=("site-1", "site-2"),
    issued_at=NOW,
    not_after=NOW + timedelta(hours=24),
)
COMMAND = CommandOrder(
    project="test",
    id="1" * 32,
    argv=("abort", "client", "site-1"),
    run=3,
    issued_at=NOW,
    not_after=NOW + timedelta(seconds=70),
)


@pytest.fixture(scope="module")
def signed(federation: Federation) -> Signed:
    return sign_order(START, federation.key("amy@x.org"), federation.open("amy@x.org").chain)


def test_an_order_comes_back_with_its_signer(signed: Signed, trust: TrustStore) -> None:
    identity, order = open_order(StartOrder, Signed.from_bytes(signed.to_bytes()), trust, NOW)
    assert identity.name == "amy@x.org"
    assert order == START


def test_only_the_leaf_travels(signed: Signed) -> None:
    assert signed.certificate.count(b"BEGIN CERTIFICATE") == 1


def test_commands_too(federation: Federation, trust: TrustStore) -> None:
    sealed = sign_order(COMMAND, federation.key("bob"), federation.open("bob").chain)
    identity, order = open_order(CommandOrder, sealed, trust, NOW)
    assert (identity.role, order) == ("member", COMMAND)


def test_another_tag_is_refused(signed: Signed, trust: TrustStore) -> None:
    with pytest.raises(UnauthenticatedError, match="command signature of amy@x.org does not fit"):
        open_order(CommandOrder, signed, trust, NOW)


def test_changed_payload_is_refused_before_it_is_parsed(signed: Signed, trust: TrustStore) -> None:
    broken = dataclasses.replace(signed, payload=b"not json at all")
    with pytest.raises(UnauthenticatedError, match="does not fit its text"):
        open_order(StartOrder, broken, trust, NOW)


def test_changed_signature_or_signer_is_refused(
    signed: Signed, trust: TrustStore, federation: Federation
) -> None:
    with pytest.raises(UnauthenticatedError, match="does not fit"):
        verify("start", dataclasses.replace(signed, signature=b"\0" * 70), trust, NOW)
    other = federation.open("bob").chain
    with pytest.raises(UnauthenticatedError, match="signature of bob does not fit"):
        verify("start", dataclasses.replace(signed, certificate=other), trust, NOW)
    with pytest.raises(UnauthenticatedError, match="not a certificate"):
        verify("start", dataclasses.replace(signed, certificate=b"x"), trust, NOW)


def test_a_site_cannot_sign_orders(federation: Federation, trust: TrustStore) -> None:
    sealed = sign_order(START, federation.key("site-1"), federation.open("site-1").chain)
    with pytest.raises(UnauthenticatedError, match="is a site, not a admin"):
        open_order(StartOrder, sealed, trust, NOW)


def test_a_revoked_admin_cannot_sign(own: Federation) -> None:
    sealed = sign_order(START, own.key("amy"), own.open("amy").chain)
    site = own.open("site-1")
    open_order(StartOrder, sealed, site.trust, NOW)
    own.revoke("amy")
    with pytest.raises(UnauthenticatedError, match="revoked"):
        open_order(StartOrder, sealed, site.reload_trust(), NOW)


def test_another_project_is_refused(federation: Federation, trust: TrustStore) -> None:
    foreign = START.model_copy(update={"project": "other"})
    sealed = sign_order(foreign, federation.key("bob"), federation.open("bob").chain)
    with pytest.raises(PermissionDeniedError, match="for project 'other', not 'test'"):
        open_order(StartOrder, sealed, trust, NOW)


def test_signed_nonsense_is_refused(federation: Federation, trust: TrustStore) -> None:
    for payload in (b"", b"{}", b'{"project": "test", "project": "x"}'):
        sealed = sign("start", payload, federation.key("bob"), federation.open("bob").chain)
        with pytest.raises(ConfigError, match="start order of bob"):
            open_order(StartOrder, sealed, trust, NOW)


@pytest.mark.parametrize(
    ("after_s", "refusal"),
    [
        (-31, "they differ by 31 s"),
        (-29, None),
        (0, None),
        (70 + 29, None),
        (70 + 31, "valid until"),
        (86_400, "this clock says"),
    ],
)
def test_freshness_names_both_clocks(after_s: float, refusal: str | None) -> None:
    now = NOW + timedelta(seconds=after_s)
    if refusal is None:
        check_fresh(COMMAND, now)
        return
    with pytest.raises(PermissionDeniedError, match=refusal) as caught:
        check_fresh(COMMAND, now)
    for clock in (COMMAND.issued_at, now):
        assert clock.isoformat(timespec="seconds") in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"submission_id": "0" * 31},
        {"submission_id": "0" * 32 + "\n"},
        {"job_digest": "A" * 64},
        {"sites": ()},
        {"sites": ("Site",)},
        {"not_after": NOW},
        {"not_after": NOW + timedelta(days=8)},
        {"issued_at": NOW.astimezone(timezone(timedelta(hours=1)))},
        {"issued_at": NOW.replace(tzinfo=None)},
        {"project": "P"},
        {"extra": 1},
    ],
)
def test_malformed_orders(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        StartOrder.model_validate({**START.model_dump(), **change})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"payload": "*", "signature": "", "certificate": ""}',
        b'{"payload": "", "signature": "=", "certificate": ""}',
        b'{"payload": "", "signature": "", "certificate": "\xc3\xa4"}',
        b'{"payload": "", "signature": "", "certificate": "", "more": 1}',
        b" " * (MAX_SIGNED_BYTES + 1),
    ],
)
def test_malformed_envelopes(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        Signed.from_bytes(data)


def test_a_detached_signature_has_no_payload_of_its_own(signed: Signed) -> None:
    assert Signed.from_detached(signed.payload, signed.to_detached()) == signed
    assert "payload" not in json.loads(signed.to_detached())
    with pytest.raises(InvalidArgumentError, match="carries a payload"):
        Signed.from_detached(signed.payload, signed.to_bytes())


def test_kits_are_signed_by_provisioning_only(federation: Federation, trust: TrustStore) -> None:
    record = federation.open("bob").user_record()
    verify_kit("user", record, trust, NOW)
    with pytest.raises(UnauthenticatedError, match="kit signature of provisioning"):
        verify_kit("kit", record, trust, NOW)
    key, chain = federation.key("amy@x.org"), federation.open("amy@x.org").chain
    with pytest.raises(UnauthenticatedError, match="not codeSigning alone"):
        verify_kit("user", sign("user", record.payload, key, chain), trust, NOW)
    foreign = create("test", 10, NOW)[0].signer
    with pytest.raises(UnauthenticatedError, match="not issued by an authority"):
        verify_kit("user", sign("user", b"x", foreign.key, foreign.certificate), trust, NOW)


TAGS = st.from_regex(r"[a-z][a-z-]{0,30}", fullmatch=True)


@given(TAGS, st.binary(max_size=64), TAGS, st.binary(max_size=64))
def test_no_two_texts_share_a_preimage(
    tag: str, payload: bytes, other_tag: str, other_payload: bytes
) -> None:
    same = preimage(tag, payload) == preimage(other_tag, other_payload)
    assert same == ((tag, payload) == (other_tag, other_payload))


@given(st.text(max_size=10))
def test_tags_are_letters_and_hyphens(tag: str) -> None:
    if not tag.replace("-", "").isascii() or "\0" in tag or tag != tag.lower() or not tag:
        with pytest.raises(ValueError, match="not a domain tag"):
            preimage(tag, b"")


@pytest.fixture(scope="module")
def signer(federation: Federation) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    return federation.key("site-1"), federation.open("site-1").chain


@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_refused(
    signer: tuple[ec.EllipticCurvePrivateKey, bytes],
    trust: TrustStore,
    payload: bytes,
    position: int,
    flip: int,
) -> None:
    sealed = sign("start", payload, *signer)
    verify("start", sealed, trust, NOW, kind="site")
    changed = bytearray(payload or b"x")
    changed[position % len(changed)] ^= flip
    broken = dataclasses.replace(sealed, payload=bytes(changed))
    with pytest.raises(UnauthenticatedError):
        verify("start", broken, trust, NOW, kind="site")
