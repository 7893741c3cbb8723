"""Who is signed in, and how often may one try: records of the server only.

A session is never rebuilt from its token; ending the record ends the token. Nothing here is safe
for threads: it belongs to the server's event loop.
"""

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flplatform.core.errors import InvalidArgumentError, UnauthenticatedError

MAX_PAUSE_S = 30.0
MAX_ADDRESSES = 10_000
MAX_FAILURES = 1000
_ADDRESS = "address "

logger = logging.getLogger(__name__)


@dataclass
class AdminSession:
    """One signed-in user.

    Attributes:
        id: names the session in lists and logs; it does not open it.
        user: name of the user.
        role: role of the user.
        organisation: organisation of the user.
        peer: network address.
        fingerprint: of the certificate that the session is bound to.
        created: monotonic seconds.
        last_used: monotonic seconds.
        proved: when the password was last checked, monotonic seconds.
        reply_timeout_s: how long those whom a command asks may take; None for the default.
    """

    id: str
    user: str
    role: str
    organisation: str
    peer: str
    fingerprint: str
    created: float
    last_used: float
    proved: float = 0.0
    reply_timeout_s: float | None = None


class Sessions:
    """The sessions of one server.

    Args:
        idle_s: seconds without a command after which a session ends.
        absolute_s: seconds after which a session ends in any case.
        max_per_user: sessions one user may have; opening another ends the oldest.
        clock: monotonic seconds.
        on_close: called with each session that ends, for whatever reason.
    """

    def __init__(
        self,
        *,
        idle_s: float = 1800.0,
        absolute_s: float = 8 * 3600.0,
        max_per_user: int = 8,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[AdminSession], None] = lambda _: None,
    ) -> None:
        self.clock = clock
        self._idle_s = idle_s
        self._absolute_s = absolute_s
        self._max_per_user = max_per_user
        self._on_close = on_close
        self._by_digest: dict[bytes, AdminSession] = {}  # in the order of opening

    def open(
        self, *, user: str, role: str, organisation: str, peer: str, fingerprint: str
    ) -> tuple[str, AdminSession]:
        """Opens a session; the caller has checked who asks.

        Returns:
            The token, which is kept nowhere here, and the session.
        """
        mine = [session for session in self.live() if session.user == user]
        for oldest in mine[: max(0, len(mine) - self._max_per_user + 1)]:
            self.close(oldest.id)
        token = secrets.token_urlsafe(32)
        digest = _digest(token)
        now = self.clock()
        session = AdminSession(
            digest.hex()[:12], user, role, organisation, peer, fingerprint, now, now, now
        )
        self._by_digest[digest] = session
        return token, session

    def get(self, token: str, fingerprint: str) -> AdminSession:
        """The live session of a token, which this call counts as used.

        Raises:
            UnauthenticatedError: the token is unknown, ended or bound to another certificate.
        """
        session = self._by_digest.get(_digest(token))
        if session is not None and self._expired(session):
            self.close(session.id)
            session = None
        if session is not None and session.fingerprint != fingerprint:
            logger.warning("session %s was presented with another certificate", session.id)
            session = None
        if session is None:
            raise UnauthenticatedError("no such session, or it has ended", hint="sign in again")
        session.last_used = self.clock()
        return session

    def close(self, session_id: str) -> bool:
        """Ends a session; False if there is none with this id."""
        for digest, session in self._by_digest.items():
            if session.id == session_id:
                del self._by_digest[digest]
                self._on_close(session)
                return True
        return False

    def close_user(self, user: str, keep: str = "") -> int:
        """Ends all sessions of a user, as after a change of password or role; returns how many.

        Args:
            user: whose.
            keep: id of a session that goes on.
        """
        mine = [each for each in self.live() if each.user == user and each.id != keep]
        return sum(self.close(session.id) for session in mine)

    def expires_s(self, session: AdminSession) -> float:
        """Seconds until a session ends if nothing more is asked in it."""
        now = self.clock()
        idle = session.last_used + self._idle_s - now
        return max(0.0, min(idle, session.created + self._absolute_s - now))

    def live(self) -> list[AdminSession]:
        """The live sessions, oldest first; ends those past their limits."""
        for session in [*self._by_digest.values()]:
            if self._expired(session):
                self.close(session.id)
        return [*self._by_digest.values()]

    def _expired(self, session: AdminSession) -> bool:
        now = self.clock()
        return now - session.last_used >= self._idle_s or now - session.created >= self._absolute_s


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def login_refused() -> UnauthenticatedError:
    """The one answer to every sign-in that fails, whatever the reason."""
    return UnauthenticatedError("sign-in refused", hint="check name and password, or wait a while")


def address_key(peer: str) -> str:
    """The key under which an address is counted: without its port; "" for none."""
    host = peer.rpartition(":")[0]
    return f"{_ADDRESS}{host}" if host else ""


class LoginThrottle:
    """Bounds guessing: so many failed sign-ins per user and certificate in a sliding window.

    A certificate with `limit * 4` failures over all users is locked for every user; what happens
    on one certificate never locks another. So the state is bounded by the valid certificates.

    An address with `limit * 8` failures, more than one certificate can cause, has to wait between
    two attempts: twice as long for each further failure, up to `MAX_PAUSE_S`.

    Args:
        limit: failures after which a user is locked on a certificate.
        window_s: length of the window in seconds.
        clock: seconds since the epoch (not monotonic: the state outlives the process).
    """

    def __init__(
        self,
        *,
        limit: int = 5,
        window_s: float = 900.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limit = limit
        self._window_s = window_s
        self._clock = clock
        self._failures: dict[str, list[tuple[float, str]]] = {}  # fingerprint -> (when, user)

    def attempt(self, user: str, fingerprint: str, peer: str = "") -> None:
        """Counts an attempt as failed until `succeeded`; call it before the password is checked.

        Counting first leaves no gap for attempts made at the same time.

        Args:
            user: who is to be signed in.
            fingerprint: of the certificate that is presented.
            peer: network address with port, as gRPC writes it; "" is not counted.

        Raises:
            UnauthenticatedError: locked; the same error as for a wrong password.
        """
        recent = self._recent(fingerprint)
        if len(recent) >= 4 * self._limit or sum(u == user for _, u in recent) >= self._limit:
            raise login_refused()
        key = address_key(peer)
        if key:
            failures = self._recent(key)
            beyond = len(failures) - 8 * self._limit
            pause_s = min(2.0**beyond, MAX_PAUSE_S) if beyond >= 0 else 0.0
            if failures and self._clock() - failures[-1][0] < pause_s:
                raise login_refused()
            self._failures[key] = [*failures[-MAX_FAILURES:], (self._clock(), user)]
            self._forget_addresses()
        self._failures[fingerprint] = [*recent, (self._clock(), user)]

    def succeeded(self, user: str, fingerprint: str, peer: str = "") -> None:
        """Forgets the failures of this user on this certificate, and this attempt's address."""
        self._keep(fingerprint, [f for f in self._recent(fingerprint) if f[1] != user])
        if key := address_key(peer):
            self._forget_last(user, key)

    def take_back(self, user: str, fingerprint: str, peer: str = "") -> None:
        """Forgets one attempt that was neither right nor wrong; earlier failures stay counted.

        Only for an attempt whose password was not looked at, or was right.
        """
        self._forget_last(user, fingerprint)
        if key := address_key(peer):
            self._forget_last(user, key)

    def _forget_last(self, user: str, key: str) -> None:
        failures = [*self._recent(key)]
        if mine := [each for each in failures if each[1] == user]:
            failures.remove(mine[-1])
        self._keep(key, failures)

    def _forget_addresses(self) -> None:
        """Bound the addresses: the ones that came first go first."""
        addresses = [key for key in self._failures if key.startswith(_ADDRESS)]
        for key in addresses[: max(0, len(addresses) - MAX_ADDRESSES)]:
            del self._failures[key]

    def dump(self) -> dict[str, list[list[Any]]]:
        """The state as a JSON-able dict: fingerprint -> [[when, user], ...]."""
        recent = {fingerprint: self._recent(fingerprint) for fingerprint in [*self._failures]}
        return {
            fingerprint: [[when, user] for when, user in failures]
            for fingerprint, failures in recent.items()
            if failures
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes the state of an earlier process from `dump`.

        Raises:
            InvalidArgumentError: it is not such a state.
        """
        try:
            self._failures = {
                str(fingerprint): [(float(when), str(user)) for when, user in failures]
                for fingerprint, failures in state.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidArgumentError(f"not a state of failed sign-ins: {error}") from error

    def _recent(self, fingerprint: str) -> list[tuple[float, str]]:
        now = self._clock()
        # After a clock was set back a failure counts from now on; it must not lock for longer.
        failures = [(min(when, now), user) for when, user in self._failures.get(fingerprint, [])]
        self._keep(fingerprint, [f for f in failures if now - f[0] < self._window_s])
        return self._failures.get(fingerprint, [])

    def _keep(self, fingerprint: str, failures: list[tuple[float, str]]) -> None:
        if failures:
            self._failures[fingerprint] = failures
        else:
            self._failures.pop(fingerprint, None)
