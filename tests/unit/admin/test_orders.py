import secrets
from datetime import UTC, datetime, timedelta

import pytest

from flplatform.admin.orders import OrderBook, Ordered, ordered, take_in_hand
from flplatform.core.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from flplatform.security.signing import CommandOrder, StartOrder, sign_order

NOW = datetime.now(UTC) + timedelta(hours=1)  # the certificates are made while the tests run


class Signer:
    def __init__(self, federation, name: str) -> None:
        self.kit = federation.open(name)
        self.key = federation.key(name)
        self.fingerprint = self.kit.identity.fingerprint

    def sign(self, *, issued: float = 0, lasts: float = 60, **changes) -> bytes:
        fields = {
            "project": "test",
            "issued_at": NOW + timedelta(seconds=issued),
            "not_after": NOW + timedelta(seconds=issued + lasts),
            "id": secrets.token_hex(16),
            "argv": ("abort", "3"),
        }
        order = CommandOrder(**(fields | changes))
        return sign_order(order, self.key, self.kit.chain).to_bytes()


@pytest.fixture(scope="module")
def amy(federation):
    return Signer(federation, "amy")


@pytest.fixture
def clock():
    return [NOW]


@pytest.fixture
def book(trust, clock):
    return OrderBook(trust, 30.0, lambda: clock[0])


def test_a_command_is_opened_with_its_words(book, amy):
    signed = amy.sign(argv=("check_status", "client", "a b"), run=3)
    command = book.open(signed, b"more", amy.fingerprint)
    assert command.order.argv == ("check_status", "client", "a b")
    assert command.order.run == 3
    assert command.signer.name == "amy"
    assert (command.signed, command.attachment) == (signed, b"more")


def test_each_command_counts_once(book, amy, clock):
    signed = amy.sign()
    book.open(signed, b"", amy.fingerprint)
    for later in (0, 60, 89):
        clock[0] = NOW + timedelta(seconds=later)
        with pytest.raises(PermissionDeniedError) as caught:
            book.open(signed, b"", amy.fingerprint)
        assert caught.value.rule == "single use"
    clock[0] = NOW + timedelta(seconds=91)
    with pytest.raises(PermissionDeniedError, match="valid until"):
        book.open(signed, b"", amy.fingerprint)


def test_only_for_the_certificate_that_signed(book, amy, federation):
    with pytest.raises(PermissionDeniedError) as caught:
        book.open(amy.sign(), b"", Signer(federation, "lea").fingerprint)
    assert caught.value.rule == "own order"


def test_the_clocks_must_agree(book, amy):
    with pytest.raises(PermissionDeniedError, match="differ by 31 s"):
        book.open(amy.sign(issued=31), b"", amy.fingerprint)
    with pytest.raises(PermissionDeniedError, match="valid until"):
        book.open(amy.sign(issued=-100, lasts=60), b"", amy.fingerprint)


def test_what_is_no_command(book, amy, federation):
    start = StartOrder(
        project="test",
        issued_at=NOW,
        not_after=NOW + timedelta(seconds=60),
        submission_id="0" * 32,
        job_digest="0" * 64,
        sites=("a",),
    )
    other_tag = sign_order(start, amy.key, amy.kit.chain).to_bytes()
    with pytest.raises(UnauthenticatedError, match="does not fit"):
        book.open(other_tag, b"", amy.fingerprint)
    with pytest.raises(InvalidArgumentError):
        book.open(b"{}", b"", amy.fingerprint)
    with pytest.raises(PermissionDeniedError, match="project"):
        book.open(amy.sign(project="other"), b"", amy.fingerprint)
    site = federation.open("site-1")
    by_site = sign_order(
        CommandOrder(
            project="test",
            issued_at=NOW,
            not_after=NOW + timedelta(seconds=60),
            id="0" * 32,
            argv=("abort",),
        ),
        site.private_key(),
        site.chain,
    ).to_bytes()
    with pytest.raises(UnauthenticatedError, match="is a site, not a admin"):
        book.open(by_site, b"", site.identity.fingerprint)


def test_ids_are_forgotten_once_their_orders_have_expired(trust, amy, clock, monkeypatch):
    monkeypatch.setattr("flplatform.admin.orders.MAX_IDS", 3)
    book = OrderBook(trust, 30.0, lambda: clock[0])
    for _ in range(3):
        book.open(amy.sign(), b"", amy.fingerprint)
    with pytest.raises(ResourceExhaustedError):
        book.open(amy.sign(), b"", amy.fingerprint)
    clock[0] = NOW + timedelta(seconds=92)
    book.open(amy.sign(issued=92), b"", amy.fingerprint)


def test_the_command_in_hand(book, amy):
    command: Ordered = book.open(amy.sign(), b"", amy.fingerprint)
    take_in_hand(command)
    assert ordered() is command
