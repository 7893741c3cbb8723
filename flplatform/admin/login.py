"""Signing in: certificate and nonce and password, every attempt counted and audited."""

import asyncio
import json
import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from flplatform.admin.orders import Trust
from flplatform.admin.users import UserStore
from flplatform.core.config import ServerLimits
from flplatform.core.errors import FLError, UnauthenticatedError, UnavailableError
from flplatform.core.ports import AuditSink
from flplatform.files.durable import write_atomic
from flplatform.files.shortage import remedy_at, shortage_in
from flplatform.hci import AdminSession, LoginThrottle, Sessions, login_refused
from flplatform.rpc.interceptors import Caller
from flplatform.security.identity import Identity

log = logging.getLogger(__name__)

NONCE_BYTES = 32
NONCE_S = 60.0
NONCES = 4
"""Open challenges of one certificate; another one ends the oldest."""


class Challenges:
    """Nonces: each for one login, soon, with the certificate that asked for it.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[str, deque[tuple[bytes, float]]] = {}  # bounded by valid certificates

    def make(self, fingerprint: str) -> bytes:
        """Return a new nonce for this certificate."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        waiting = self._open.setdefault(fingerprint, deque(maxlen=NONCES))
        waiting.append((nonce, self._clock() + NONCE_S))
        return nonce

    def use(self, nonce: bytes, fingerprint: str) -> None:
        """Use a nonce up.

        Raises:
            UnauthenticatedError: it was not made for this certificate, used before, or too old.
        """
        waiting = self._open.get(fingerprint, deque())
        found = next((each for each in waiting if secrets.compare_digest(each[0], nonce)), None)
        if found is not None:
            waiting.remove(found)
        if found is None or self._clock() > found[1]:
            raise UnauthenticatedError(
                f"no challenge of the last {NONCE_S:.0f} s fits this sign-in",
                rule="challenge",
                hint="ask for a new one",
            )


class LoginDesk:
    """Lets users in. Lives on the event loop.

    Args:
        folder: the server's state; users and failed attempts are remembered here.
        limits: of attempts.
        trust: holds the trust store of now.
        sessions: where sessions are opened.
        audit: hears of every attempt.
        workers: threads for disk and argon2.

    Raises:
        ConfigError: `users.json` is not what this release wrote.
        OSError: what is remembered cannot be read.
    """

    def __init__(
        self,
        *,
        folder: Path,
        limits: ServerLimits,
        trust: Trust,
        sessions: Sessions,
        audit: AuditSink,
        workers: Executor,
    ) -> None:
        self.challenges = Challenges()
        self._trust = trust
        self._sessions = sessions
        self._audit = audit
        self._workers = workers
        self._users = UserStore(folder / "users.json")
        self._attempts = folder / "login_attempts.json"
        self._saving = asyncio.Lock()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._throttle = LoginThrottle(limit=limits.login_attempts, window_s=limits.login_lock_s)
        if self._attempts.exists():
            try:
                self._throttle.load(json.loads(self._attempts.read_bytes()))
            except (ValueError, FLError) as error:  # only a counter: no reason to let nobody in
                log.warning(
                    "%s is damaged and made anew, earlier failed sign-ins are forgotten: %s",
                    self._attempts,
                    error,
                )

    async def login(
        self, caller: Caller, nonce: bytes, password: str, record: bytes, signature: bytes
    ) -> tuple[str, AdminSession]:
        """Open a session for who holds the certificate and knows the password.

        Args:
            caller: who presents the certificate.
            nonce: from `challenges`.
            password: as derived from the user's passphrase.
            record: the kit's `user.json`.
            signature: its detached signature.

        Returns:
            The session's token, and the session.

        Raises:
            UnauthenticatedError: refused; one text for every reason but a stale challenge.
            UnavailableError: the attempt cannot be recorded, so nobody is let in.
        """
        me = caller.identity
        try:
            self.challenges.use(nonce, me.fingerprint)
            async with self._turns[me.fingerprint]:  # others under way do not count as failed
                store = self._trust.store
                await self._count(
                    caller, lambda: self._users.check(me, password, record, signature, store)
                )
        except UnauthenticatedError as error:
            await self._note_denied(caller, error)
            raise
        except OSError as error:
            log.error("nobody can sign in: %s", error)
            raise _cannot_write(error) from error
        return self._sessions.open(
            user=me.name,
            role=me.role,
            organisation=me.organisation,
            peer=caller.peer,
            fingerprint=me.fingerprint,
        )

    @property
    def users(self) -> UserStore:
        """Everybody who has ever signed in."""
        return self._users

    async def prove_again(self, session: AdminSession, identity: Identity, password: str) -> None:
        """Check the password of a signed-in user, as often as a sign-in may be tried.

        Raises:
            UnauthenticatedError: it is wrong, or was tried too often.
            UnavailableError: the attempt cannot be recorded.
        """
        await self._again(
            session,
            identity,
            lambda: self._users.check(identity, password, b"", b"", self._trust.store),
        )
        session.proved = self._sessions.clock()

    async def change_password(
        self, session: AdminSession, identity: Identity, password: str, new: str
    ) -> int:
        """Let a new password hold beside the old one, until it is first used.

        The user's other sessions end.

        Returns:
            How many sessions ended.

        Raises:
            UnauthenticatedError: the old one is wrong, or was tried too often.
            InvalidArgumentError: the new password is empty or too long.
            UnavailableError: it cannot be stored.
        """
        await self._again(
            session, identity, lambda: self._users.begin_change(identity, password, new)
        )
        session.proved = self._sessions.clock()
        return self._sessions.close_user(session.user, keep=session.id)

    async def _again(
        self, session: AdminSession, identity: Identity, check: Callable[[], bool]
    ) -> None:
        caller = Caller(identity, session.peer)
        try:
            async with self._turns[identity.fingerprint]:
                await self._count(caller, check, "password checked again")
        except UnauthenticatedError as error:
            await self._note_denied(caller, error)
            raise
        except OSError as error:
            log.error("a password cannot be checked: %s", error)
            raise _cannot_write(error) from error

    async def _count(self, caller: Caller, check: Callable[[], bool], reason: str = "") -> None:
        """Count an attempt, check the password, and forgive what was counted if it is right.

        On a full disk nobody is locked out, and nobody can guess without being counted: an attempt
        that cannot be stored is taken back with its password unseen, and once it is stored, only
        a right password comes to where anything else is written.

        Args:
            caller: who tries.
            check: looks at the password; writes only if that is right.
            reason: of the audit's record.

        Raises:
            UnauthenticatedError: it is wrong, or was tried too often.
            OSError: something could not be stored.
        """
        who = caller.identity.name, caller.identity.fingerprint, caller.peer
        self._throttle.attempt(*who)
        stored = False
        try:
            await self._save()
            stored = True
            if not await self._run(check):
                raise login_refused()
            await self._note(caller, "allowed", reason)
        except OSError:
            self._throttle.take_back(*who)
            if stored:
                await self._save_forgiven()
            raise
        self._throttle.succeeded(*who)
        await self._save_forgiven()

    async def _save_forgiven(self) -> None:
        try:
            await self._save()
        except OSError as error:
            log.warning(
                "a restart would count a sign-in that is forgiven, %s cannot be written: %s",
                self._attempts,
                error,
            )

    async def _note_denied(self, caller: Caller, error: UnauthenticatedError) -> None:
        try:
            await self._note(caller, "denied", error.message)
        except OSError as failure:
            log.error("a refused sign-in is not in the audit: %s", failure)

    async def _save(self) -> None:
        async with self._saving:  # an older state must not overwrite a newer one
            state = json.dumps(self._throttle.dump()).encode()
            await self._run(write_atomic, self._attempts, state)

    async def _note(self, caller: Caller, decision: str, reason: str = "") -> None:
        actor = caller.identity.as_actor(caller.peer)
        await self._run(lambda: self._audit.record(actor, "login", decision, reason=reason))

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)


def _cannot_write(error: OSError) -> UnavailableError:
    shortage = shortage_in(error)
    if shortage is None:
        return UnavailableError(
            "the server cannot write to its disk", hint="the server's log says more"
        )
    return UnavailableError(
        f"the server cannot write to its disk: {shortage.message}",
        hint=f"{remedy_at(shortage, 'the server')}; this did not count as an attempt",
    )
