"""Which password proves whom: learnt from each kit's signed record at its first login."""

import logging
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from flplatform.core.config import PersonName, Role, Strict, parse_json
from flplatform.core.errors import FLError, UnauthenticatedError
from flplatform.files.durable import write_atomic
from flplatform.security.authn import (
    UserRecord,
    hash_password,
    needs_rehash,
    verify_password,
)
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.kit import USER, USER_TAG
from flplatform.security.signing import Signed, verify_kit

log = logging.getLogger(__name__)


class KnownUser(Strict):
    """One certificate's user and argon2id hash.

    Attributes:
        new_password_hash: of a change that is under way; both passwords hold until the new one is
            used for the first time, so that a change that breaks off locks nobody out.
        role, organisation, not_after: as the certificate said at the last login.
    """

    name: PersonName
    password_hash: str
    new_password_hash: str = ""
    role: Role | Literal[""] = ""
    organisation: str = ""
    not_after: str = ""


class UserFile(Strict):
    """`users.json` in the server's state: SHA-256 of a certificate -> its user."""

    api_version: Literal[1] = 1
    users: dict[str, KnownUser] = {}


class UserStore:
    """The users' password hashes, by certificate. Thread-safe; blocks on disk and argon2.

    A renewed kit has a new certificate, and so begins with the record that came with it.

    Args:
        path: the file, made at the first login.

    Raises:
        ConfigError: the file is not what this release wrote.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._users: dict[str, KnownUser] = {}
        if path.exists():
            self._users = dict(parse_json(UserFile, path.read_bytes(), str(path)).users)

    def check(
        self, identity: Identity, password: str, record: bytes, signature: bytes, trust: TrustStore
    ) -> bool:
        """Return whether the password is the user's, at the same cost for an unknown user.

        Args:
            identity: whom the certificate names.
            password: what was offered.
            record: the kit's `user.json`, read only at this certificate's first login.
            signature: its detached signature.
            trust: the trust store of now.

        Raises:
            OSError: a new user cannot be stored.
        """
        known = self._users.get(identity.fingerprint)
        stored = known.password_hash if known else _hash_in(identity, record, signature, trust)
        under_way = known.new_password_hash if known else ""
        if under_way and verify_password(under_way, password):
            stored, under_way = under_way, ""  # the change is complete: the old password ends
        elif not verify_password(stored, password):
            return False
        hashed = stored if stored and not needs_rehash(stored) else hash_password(password)
        user = _known(identity, hashed, under_way)
        if self._users.get(identity.fingerprint) != user:
            self._store(identity, user)
        return True

    def begin_change(self, identity: Identity, password: str, new: str) -> bool:
        """Let a new password hold beside the old one; return whether the old one is right.

        Args:
            identity: whom the certificate names; who has signed in before.
            password: the one that holds now.
            new: the one that takes its place when it is first used.

        Raises:
            InvalidArgumentError: the new password is empty or too long.
            OSError: it cannot be stored; the old one goes on to hold.
        """
        known = self._users.get(identity.fingerprint)
        right = verify_password(known.password_hash if known else None, password)
        if known is None or not right:
            return False
        self._store(identity, _known(identity, known.password_hash, hash_password(new)))
        return True

    def users(self) -> list[KnownUser]:
        """Return everybody who has ever signed in, once for each certificate."""
        return list(self._users.values())

    def _store(self, identity: Identity, user: KnownUser) -> None:
        with self._lock:
            users = self._users | {identity.fingerprint: user}
            write_atomic(self._path, UserFile(users=users).model_dump_json(indent=1).encode())
            self._users = users


def _known(identity: Identity, password_hash: str, new_password_hash: str) -> KnownUser:
    return KnownUser(
        name=identity.name,
        password_hash=password_hash,
        new_password_hash=new_password_hash,
        role=identity.role,
        organisation=identity.organisation,
        not_after=identity.not_after.isoformat(timespec="seconds"),
    )


def _hash_in(identity: Identity, record: bytes, signature: bytes, trust: TrustStore) -> str | None:
    """Return the hash in a record that provisioning signed about exactly this user."""
    try:
        signed = Signed.from_detached(record, signature)
        verify_kit(USER_TAG, signed, trust, datetime.now(UTC))
        user = parse_json(UserRecord, signed.payload, USER)
        own = (identity.project, identity.name, identity.organisation, identity.role)
        if (user.project, user.name, user.organisation, user.role) != own:
            raise UnauthenticatedError(f"the record is about {user.name}")
    except FLError as error:
        log.warning("the user record that %s presents is refused: %s", identity.name, error)
        return None
    return user.password_hash
