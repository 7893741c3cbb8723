"""What a hostile server can do about denials at a site: be late, and nothing else."""

import base64
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from flplatform.client.denials import DenialBook
from flplatform.core.errors import FLError, InvalidArgumentError
from flplatform.security.signing import DenialOrder, Signed, sign_order
from tests.support.federation import provision

ADMINS = {"amy": "project_admin", "ola": "org_admin@site-2", "mia": "member"}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    federation = provision(tmp_path_factory.mktemp("denials"), admins=ADMINS)
    signers = {name: (federation.key(name), federation.open(name).chain) for name in ADMINS}
    return SimpleNamespace(federation=federation, signers=signers)


@pytest.fixture
def book(people, tmp_path):
    trust = people.federation.open("site-1").trust
    return lambda: DenialBook(tmp_path / "denials.json", lambda: trust)


def order(people, name="mia", who="amy", age_s=0.0, undo=False) -> Signed:
    issued = datetime.now(UTC) - timedelta(seconds=age_s)
    denial = DenialOrder(
        project="test",
        issued_at=issued,
        not_after=issued + timedelta(seconds=60),
        name=name,
        kind="admin",
        undo=undo,
    )
    return sign_order(denial, *people.signers[who])


def body(*orders: Signed) -> bytes:
    texts = [base64.b64encode(each.to_bytes()).decode() for each in orders]
    return json.dumps({"orders": texts}).encode()


def denied(book) -> list[str]:
    return [each.name for each in book.denials.in_force()]


def test_what_was_learnt_stays_though_the_server_withholds_it(people, book):
    first = book()
    assert first.take(body(order(people))) == {"news": 1, "refused": []}
    assert denied(first) == ["mia"]
    again = book()  # the site was started again
    assert denied(again) == ["mia"]
    assert again.take(body()) == {"news": 0, "refused": []}
    assert denied(again) == ["mia"]


def test_the_same_again_is_no_news(people, book):
    mine, denial = book(), order(people)
    mine.take(body(denial))
    assert mine.take(body(denial, denial)) == {"news": 0, "refused": []}


def test_a_forged_undo_changes_nothing_and_the_rest_counts(people, book):
    mine = book()
    mine.take(body(order(people, age_s=10)))
    genuine = order(people)
    forged = Signed(
        genuine.payload.replace(b'"undo":false', b'"undo":true'),
        genuine.signature,
        genuine.certificate,
    )
    by_nobody = order(people, who="mia", undo=True)
    by_an_org_admin = order(people, who="ola", undo=True)
    answer = mine.take(body(forged, by_nobody, by_an_org_admin, order(people, name="ola")))
    assert answer["news"] == 1
    assert [each["rule"] for each in answer["refused"]] == [
        "signature",
        "revoked",
        "undo a revocation: project_admin",
    ]
    assert denied(mine) == ["mia", "ola"]
    assert denied(book()) == ["mia", "ola"]


def test_an_older_denial_played_again_does_not_undo_the_undo(people, book):
    mine = book()
    old, undo = order(people, age_s=20), order(people, age_s=10, undo=True)
    mine.take(body(old))
    mine.take(body(undo))
    assert denied(mine) == []
    assert mine.take(body(old))["news"] == 0
    assert denied(mine) == []
    newer = order(people)
    mine.take(body(newer))
    assert mine.take(body(undo, old))["news"] == 0
    assert denied(mine) == denied(book()) == ["mia"]


def test_a_denial_that_comes_late_holds_as_of_its_time(people, book):
    mine = book()
    assert mine.take(body(order(people, age_s=250)))["news"] == 1
    future = mine.take(body(order(people, name="ola", age_s=-60)))
    assert future["refused"][0]["rule"] == "clocks within 30 s"


def test_what_cannot_be_stored_is_not_learnt(people, book, tmp_path):
    mine = book()
    mine._path = tmp_path / "missing" / "denials.json"
    with pytest.raises(OSError, match="missing"):
        mine.take(body(order(people)))
    assert denied(mine) == []


@pytest.mark.parametrize("text", [b"", b"[]", b'{"orders": 1}'])
def test_a_malformed_request_is_refused(book, text):
    with pytest.raises(InvalidArgumentError):
        book().take(text)


def test_orders_that_are_none_are_named(book):
    answer = book().take(json.dumps({"orders": ["%%", "e30="]}).encode())
    assert len(answer["refused"]) == 2


def test_a_damaged_file_stops_the_site(book, tmp_path):
    (tmp_path / "denials.json").write_text('{"orders": ["e30="]}')
    with pytest.raises(FLError):
        book()
