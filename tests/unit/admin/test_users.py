import argon2
import pytest

from flplatform.admin.users import UserStore
from flplatform.core.errors import ConfigError
from flplatform.security import authn
from flplatform.security.authn import UserRecord, password_of
from flplatform.security.kit import USER_TAG
from flplatform.security.signing import Signed, sign


@pytest.fixture(scope="module")
def amy(federation):
    return federation.open("amy")


@pytest.fixture(scope="module")
def password(federation):
    return password_of(federation.passphrase("amy"), "test", "amy")


@pytest.fixture
def store(tmp_path):
    return UserStore(tmp_path / "users.json")


def check(store, kit, password, trust, record: Signed | None = None) -> bool:
    record = record or kit.user_record()
    return store.check(kit.identity, password, record.payload, record.to_detached(), trust.store)


def test_the_first_login_stores_the_hash_and_later_ones_use_it(
    store, amy, password, trust, tmp_path
):
    assert check(store, amy, password, trust)
    stored = (tmp_path / "users.json").read_text()
    assert amy.identity.fingerprint in stored
    assert "$argon2id$" in stored
    assert password not in stored
    assert (tmp_path / "users.json").stat().st_mode & 0o777 == 0o600
    again = UserStore(tmp_path / "users.json")
    assert again.check(amy.identity, password, b"", b"", trust.store)
    assert not again.check(amy.identity, "wrong", b"", b"", trust.store)


def test_a_wrong_password_stores_nothing(store, amy, trust, tmp_path):
    assert not check(store, amy, "wrong", trust)
    assert not (tmp_path / "users.json").exists()


def test_a_record_about_somebody_else_proves_nothing(store, amy, federation, trust):
    lea = federation.open("lea")
    password = password_of(federation.passphrase("lea"), "test", "lea")
    assert not check(store, amy, password, trust, lea.user_record())


def test_a_record_that_provisioning_did_not_sign_proves_nothing(
    store, amy, federation, trust, password
):
    record = UserRecord(
        project="test",
        name="amy",
        organisation="hub",
        role="project_admin",
        password_hash=authn.hash_password("mine"),
    )
    forged = sign(USER_TAG, record.model_dump_json().encode(), federation.key("amy"), amy.chain)
    assert not check(store, amy, "mine", trust, forged)
    assert not store.check(amy.identity, password, b"", b"", trust.store)
    assert not store.check(amy.identity, password, b"\xff", b"{", trust.store)


def test_an_unknown_user_costs_as_much_as_a_known_one(store, amy, trust, monkeypatch):
    checked = []
    monkeypatch.setattr(
        "flplatform.admin.users.verify_password", lambda stored, _: checked.append(stored)
    )
    store.check(amy.identity, "x", b"", b"", trust.store)
    assert checked == [None]


def test_a_hash_of_older_costs_is_made_anew(store, amy, password, trust, tmp_path, monkeypatch):
    assert check(store, amy, password, trust)
    before = (tmp_path / "users.json").read_text()
    dearer = argon2.PasswordHasher(time_cost=3, memory_cost=19 << 10, parallelism=1)
    monkeypatch.setattr(authn, "_HASHER", dearer)
    assert check(store, amy, password, trust)
    assert "t=3" in (tmp_path / "users.json").read_text()
    assert "t=2" in before


def test_a_damaged_file_stops_the_start(tmp_path):
    (tmp_path / "users.json").write_text('{"users": {"x": 1}}')
    with pytest.raises(ConfigError, match=r"users\.json"):
        UserStore(tmp_path / "users.json")
