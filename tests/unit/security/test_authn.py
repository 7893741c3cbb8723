import pytest
from argon2 import PasswordHasher, extract_parameters

from flplatform.core.errors import InvalidArgumentError
from flplatform.security import authn


def test_hashes_are_argon2id_with_the_required_costs_and_own_salts() -> None:
    one, two = authn.hash_password("secret"), authn.hash_password("secret")
    parameters = extract_parameters(one)
    assert one.startswith("$argon2id$")
    assert (parameters.memory_cost, parameters.time_cost, parameters.parallelism) == (19456, 2, 1)
    assert one != two
    assert authn.verify_password(one, "secret")
    assert not authn.verify_password(one, "Secret")
    assert not authn.needs_rehash(one)


def test_old_costs_are_noticed() -> None:
    assert authn.needs_rehash(PasswordHasher(time_cost=1, memory_cost=8192).hash("x"))


def test_an_unknown_user_costs_a_hash_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Spy:
        def verify(self, stored: str, password: bytes) -> bool:
            seen.append(stored)
            return True

    monkeypatch.setattr(authn, "_HASHER", Spy())
    assert not authn.verify_password(None, "x")
    assert len(seen) == 1


@pytest.mark.parametrize("stored", ["", "plain", "$argon2id$v=19$broken"])
def test_a_damaged_hash_admits_nobody(stored: str) -> None:
    assert not authn.verify_password(stored, "x")


def test_passwords_are_bounded() -> None:
    with pytest.raises(InvalidArgumentError):
        authn.hash_password("x" * 1025)
    with pytest.raises(InvalidArgumentError):
        authn.hash_password("")
    assert not authn.verify_password(authn.hash_password("x"), "x" * 1025)


def test_the_password_depends_on_passphrase_project_and_user() -> None:
    derived = {
        authn.password_of("p", "a", "u"),
        authn.password_of("q", "a", "u"),
        authn.password_of("p", "b", "u"),
        authn.password_of("p", "a", "v"),
    }
    assert len(derived) == 4
    assert authn.password_of("p", "a", "u") in derived


def test_tokens_are_long_and_unique() -> None:
    tokens = {authn.new_token() for _ in range(10_000)}
    assert len(tokens) == 10_000
    assert all(len(token) >= 43 for token in tokens)
    assert authn.same_secret("a", "a")
    assert not authn.same_secret("a", "b")
