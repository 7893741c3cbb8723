"""Passwords and tokens: what proves a person or a session, besides a certificate."""

import hashlib
import hmac
import secrets

import argon2

from flplatform.core.config import Name, PersonName, Role, Strict
from flplatform.core.errors import InvalidArgumentError

MAX_PASSWORD_BYTES = 1024
TOKEN_BYTES = 32

_HASHER = argon2.PasswordHasher(
    time_cost=2, memory_cost=19 << 10, parallelism=1, type=argon2.Type.ID
)
_NOBODY = _HASHER.hash(secrets.token_hex(16))


class UserRecord(Strict):
    """`startup/user.json` of an admin's kit, signed by provisioning, shown at first login."""

    project: Name
    name: PersonName
    organisation: Name
    role: Role
    password_hash: str


def password_of(passphrase: str, project: str, user: str) -> str:
    """Derive the login password from the passphrase that also opens the user's key.

    The server, which learns the password at login, thus never learns the passphrase.
    """
    salt = f"flplatform/{project}/{user}".encode()
    derived = hashlib.scrypt(
        passphrase.encode(), salt=salt, n=1 << 15, r=8, p=1, maxmem=64 << 20, dklen=32
    )
    return derived.hex()


def hash_password(password: str) -> str:
    """Return the argon2id hash to store (19 MiB, two passes, one lane, own salt).

    Raises:
        InvalidArgumentError: the password is empty or above 1 KiB.
    """
    if not 0 < len(password.encode()) <= MAX_PASSWORD_BYTES:
        raise InvalidArgumentError(f"a password has 1 to {MAX_PASSWORD_BYTES} bytes")
    return _HASHER.hash(password)


def verify_password(stored: str | None, password: str) -> bool:
    """Compare a password with a stored hash, at the same cost whether or not the user exists.

    Args:
        stored: the hash, or None for an unknown user.
        password: what was offered; above 1 KiB it is wrong.
    """
    offered = password.encode()
    fits = len(offered) <= MAX_PASSWORD_BYTES
    try:
        _HASHER.verify(stored or _NOBODY, offered if fits else b"")
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False
    return fits and stored is not None


def needs_rehash(stored: str) -> bool:
    """Return whether a hash was made with other costs than today's."""
    return _HASHER.check_needs_rehash(stored)


def new_token() -> str:
    """Return an opaque token of 256 random bits."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def same_secret(one: str, other: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())
