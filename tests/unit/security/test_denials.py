"""Whose word counts about a denied name, and which word, whatever order they come in."""

import dataclasses
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import InvalidArgumentError, PermissionDeniedError, UnauthenticatedError
from flplatform.security.denials import Denial, Denials, open_denial, read_denial
from flplatform.security.signing import CommandOrder, DenialOrder, Signed, sign, sign_order
from tests.support.federation import provision

NOW = datetime.now(UTC) + timedelta(hours=1)  # the certificates are made while the tests run
ADMINS = {
    "amy": "project_admin",
    "zoe": "project_admin",
    "ola": "org_admin@site-1",
    "lea": "lead@site-1",
}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denials")
    federation = provision(folder / "own", admins=ADMINS)
    foreign = provision(folder / "foreign", admins=("eve",), project="other")
    signers = {name: (federation.key(name), federation.open(name).chain) for name in ADMINS}
    signers["eve"] = (foreign.key("eve"), foreign.open("eve").chain)
    signers["site-1"] = (federation.key("site-1"), federation.open("site-1").chain)
    return SimpleNamespace(
        signers=signers, trust=federation.open("server").trust, federation=federation
    )


def order(people, name="mia", who="amy", age_s=0.0, **fields) -> bytes:
    issued = NOW - timedelta(seconds=age_s)
    fields = {"kind": "admin", "project": "test", **fields}
    denial = DenialOrder(
        issued_at=issued, not_after=issued + timedelta(seconds=60), name=name, **fields
    )
    return sign_order(denial, *people.signers[who]).to_bytes()


def opened(people, signed: bytes, known: Denials | None = None, *, fresh: bool = True) -> Denial:
    return open_denial(signed, people.trust, NOW, known or Denials(), fresh=fresh)


def word(number: int, undo: bool, organisation: str = "", name: str = "mia") -> Denial:
    issued = NOW + timedelta(seconds=number)
    return Denial(name, "admin", organisation, undo, issued, "amy", "", b"%d" % number)


def test_a_denial_says_who_whom_and_why(people):
    found = opened(people, order(people, reason="left"))
    assert (found.name, found.kind, found.by, found.reason) == ("mia", "admin", "amy", "left")
    assert (found.organisation, found.undo) == ("", False)
    assert read_denial(found.to_text()) == found


def test_of_an_org_admin_it_reaches_the_own_organisation_alone(people):
    denials = Denials([opened(people, order(people, who="ola"))])
    assert denials.find("admin", "mia", "site-1")
    assert denials.find("admin", "mia", "site-2") is None
    assert denials.find("site", "mia", "site-1") is None
    assert denials.find("admin", "mia", "") is None


def test_who_is_denied_is_told_by_whom(people):
    denials = Denials([opened(people, order(people, name="lea", reason="left"))])
    lea = people.federation.open("lea").identity
    with pytest.raises(PermissionDeniedError, match="lea was revoked by amy at .*: left") as caught:
        denials.demand(lea)
    assert caught.value.rule == "revoked"
    denials.demand(people.federation.open("zoe").identity)


@pytest.mark.parametrize(
    ("who", "fields", "rule"),
    [
        ("lea", {}, "revoke: project_admin or org_admin"),
        ("ola", {"undo": True}, "undo a revocation: project_admin"),
        ("amy", {"name": "amy"}, "revoke: nobody the own name"),
        ("amy", {"name": "amy", "undo": True}, "revoke: nobody the own name"),
        ("amy", {"project": "other"}, "project"),
        ("amy", {"age_s": 200.0}, "not after"),
        ("amy", {"age_s": -60.0}, "clocks within 30 s"),
    ],
)
def test_what_is_not_the_signer_s_to_give(people, who, fields, rule):
    with pytest.raises(PermissionDeniedError) as caught:
        opened(people, order(people, who=who, **fields))
    assert caught.value.rule == rule


def test_a_site_learns_of_old_denials_but_not_of_future_ones(people):
    assert opened(people, order(people, age_s=200.0), fresh=False).name == "mia"
    with pytest.raises(PermissionDeniedError, match="yet to come"):
        opened(people, order(people, age_s=-60.0), fresh=False)


@pytest.mark.parametrize("who", ["eve", "site-1"])
def test_signed_by_nobody_who_may(people, who):
    with pytest.raises(UnauthenticatedError):
        opened(people, order(people, who=who))


def test_forged(people):
    signed = Signed.from_bytes(order(people))
    changed = dataclasses.replace(signed, payload=signed.payload.replace(b"mia", b"zoe"))
    as_undo = dataclasses.replace(
        signed, payload=signed.payload.replace(b'"undo":false', b'"undo":true')
    )
    other = Signed.from_bytes(order(people, who="zoe"))
    borrowed = dataclasses.replace(signed, certificate=other.certificate)
    for forged in (changed, as_undo, borrowed):
        with pytest.raises(UnauthenticatedError, match="does not fit its text"):
            opened(people, forged.to_bytes())


def test_a_signature_over_something_else_is_no_denial(people):
    command = CommandOrder(
        project="test",
        issued_at=NOW,
        not_after=NOW + timedelta(seconds=60),
        id="0" * 32,
        argv=("deny", "mia"),
    )
    with pytest.raises(UnauthenticatedError):
        opened(people, sign_order(command, *people.signers["amy"]).to_bytes())
    text = sign(DenialOrder.TAG, b'{"name": "mia"}', *people.signers["amy"])
    with pytest.raises(InvalidArgumentError):
        opened(people, text.to_bytes())


def test_who_is_denied_can_deny_nobody_and_undo_nothing(people):
    known = Denials([opened(people, order(people, name="amy", who="zoe"))])
    for signed in (order(people), order(people, name="zoe"), order(people, undo=True)):
        with pytest.raises(PermissionDeniedError) as caught:
            opened(people, signed, known)
        assert caught.value.rule == "revoked"


WORDS = st.lists(
    st.builds(word, st.integers(0, 5), st.booleans(), st.sampled_from(["", "a", "b"])), max_size=8
)


@given(WORDS, st.randoms())
def test_the_order_of_arrival_and_repetition_change_nothing(words, random):
    words = [each for each in words if not (each.undo and each.organisation)]
    shuffled = [*words, *words[:3]]
    random.shuffle(shuffled)
    one, other = Denials(words), Denials(shuffled)
    for organisation in ("", "a", "b", "c"):
        found = one.find("admin", "mia", organisation)
        undone = max((each.issued_at for each in words if each.undo), default=None)
        reaching = [
            each.issued_at
            for each in words
            if not each.undo and each.organisation in ("", organisation)
        ]
        expected = any(undone is None or issued >= undone for issued in reaching)
        assert (found is not None) == expected
        assert (other.find("admin", "mia", organisation) is not None) == expected
    again = Denials(one.words())
    assert again.words() == one.words()
    assert again.in_force() == one.in_force()


def test_an_older_denial_does_not_come_back(people):
    old, undo, newer = word(1, False), word(2, True), word(3, False)
    denials = Denials([old, undo])
    assert not denials.add(old)
    assert denials.in_force() == []
    assert denials.add(newer)
    assert not denials.add(undo)
    assert denials.in_force() == [newer]
    assert denials.words() == [undo, newer]
