"""Who is there: registered sites, their tokens, and when each was last heard of.

Liveness comes from any call, on a monotonic clock. Names are counted, not registrations: a site
that registers again gets a new token and stays the same client. Time in which this server stood
still (a frozen process or machine, a blocked event loop) is nobody's silence.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from flplatform.core.errors import (
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from flplatform.core.workflow import Roster
from flplatform.rpc.errors import REPLACED_TOKEN
from flplatform.security.denials import Denials
from flplatform.security.identity import Identity

log = logging.getLogger(__name__)

TOKEN_LIFETIME_S = 24 * 3600.0

LOOK_S = 1.0
"""Longest pause between two looks at the clock by which a standstill is noticed."""

STANDSTILL = 0.1
"""A look that is late by more than this share of the dead time was held up by a standstill."""


CONTEST_S = 60.0
"""Two processes that take a site's registration from each other do so within so long."""

CONTESTS = 5
"""Of such changes in a row this is the first that is told; afterwards ever fewer are."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a site last said about one of its runs; `since` is monotonic, seconds."""

    run: int
    round: int
    phase: str
    since: float
    isolation: str = ""


@dataclass(slots=True)
class Client:
    """One registered site.

    Attributes:
        since: when it registered, monotonic.
        contested: whether a token came since then that this registration replaced: whoever had it
            lives on, as a site that was started again does not.
        contests: how often in a row a registration was contested, and soon replaced.
    """

    identity: Identity
    peer: str
    token_hash: bytes
    token_since: float
    last_seen: float
    since: float
    contests: int = 0
    contested: bool = False
    version: str = ""
    isolation: str = ""
    reports: tuple[RunReport, ...] = ()

    @property
    def name(self) -> str:
        """The site's name."""
        return self.identity.name


@dataclass(slots=True)
class ClientManager:
    """Admits sites and watches over them. Not thread-safe: it lives on the event loop.

    Args:
        max_clients: names admitted at the same time.
        dead_after_s: a site silent for so long is counted dead.
        clock: monotonic seconds.
        changed: called with the names of sites that came or went.
        token_s: a token that no heartbeat renewed for so long is dead.

    Attributes:
        disabled: sites that may register but take no part.
        denials: names that are denied altogether.
        known: every site that has ever registered → its organisation.
        gone: known site that is not there → when it was last heard of, monotonic.
        not_after: site that has registered since the start → when its certificate ends.
        parted: site that left, not lost → how: `stopped` by itself, or `removed` by an admin.
    """

    max_clients: int
    dead_after_s: float
    clock: Callable[[], float]
    changed: Callable[[Sequence[str]], None]
    token_s: float = TOKEN_LIFETIME_S
    disabled: set[str] = field(default_factory=set)
    denials: Denials = field(default_factory=Denials)
    known: dict[str, str] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)
    parted: dict[str, str] = field(default_factory=dict)
    not_after: dict[str, datetime] = field(default_factory=dict)
    _clients: dict[str, Client] = field(default_factory=dict)
    _presumed: dict[str, float] = field(default_factory=dict)
    _looked: float | None = None
    _stood_still_s: float = 0.0

    def register(
        self, identity: Identity, peer: str, version: str = "", isolation: str = ""
    ) -> str:
        """Admit a site and return its new token; an earlier token of the site dies.

        Raises:
            ResourceExhaustedError: `max_clients` other sites are registered.
        """
        name = identity.name
        if name not in self._clients and len(self._clients) >= self.max_clients:
            raise ResourceExhaustedError(
                f"{self.max_clients} sites are registered already",
                rule="max_clients",
                hint="raise max_clients in the server's kit or remove a client",
            )
        token = secrets.token_urlsafe(32)
        now = self.clock()
        came = name not in self.live()
        contests = self._contests(name, peer, now)
        self._clients[name] = Client(
            identity,
            peer,
            _hash(token),
            now,
            now,
            now,
            contests,
            version=version,
            isolation=isolation,
        )
        self._presumed.pop(name, None)
        self.known[name] = identity.organisation
        self.not_after[name] = identity.not_after
        self.gone.pop(name, None)
        self.parted.pop(name, None)
        if came:
            log.info("%s registered from %s", name, peer)
            self.changed([name])
        return token

    def _contests(self, name: str, peer: str, now: float) -> int:
        """Return how often in a row two processes took this site's registration from each other."""
        before = self._clients.get(name)
        if before is None or not before.contested or now - before.since > CONTEST_S:
            return 0
        count, rest = divmod(before.contests + 1, CONTESTS)
        if rest == 0 and count.bit_count() == 1:
            text = "%s registers again and again, from %s and %s: do two processes use its kit?"
            log.warning(text, name, before.peer, peer)
        return before.contests + 1

    def is_contested(self, client: Client) -> bool:
        """Return whether two processes seem to use a site's kit now."""
        return client.contests >= CONTESTS and self.clock() - client.since <= CONTEST_S

    def check_token(self, identity: Identity, token: str) -> None:
        """Accept a live token of this very certificate, and note that the site is alive.

        Raises:
            UnauthenticatedError: unknown, expired, replaced, or bound to another certificate.
        """
        client = self._clients.get(identity.name)
        now = self.clock()
        if client is not None and not secrets.compare_digest(client.token_hash, _hash(token)):
            client.contested = True
            raise UnauthenticatedError(
                f"{identity.name} has registered again since: this token is not valid any more",
                rule=REPLACED_TOKEN,
                hint="register again",
            )
        if (
            client is None
            or client.identity.fingerprint != identity.fingerprint
            or now - client.token_since > self.token_s
        ):
            raise UnauthenticatedError(
                f"the token of {identity.name} is not valid", rule="token", hint="register again"
            )
        client.last_seen = now

    def heartbeat(self, name: str, reports: Iterable[RunReport]) -> None:
        """Keep what a site says about its runs; the token slides on."""
        client = self._clients[name]
        client.reports = tuple(reports)
        client.token_since = self.clock()

    def remove(self, name: str, how: str = "stopped") -> None:
        """Forget a site at once (it `stopped`, or an admin `removed` it); it may register again.

        Raises:
            NotFoundError: no such site is registered.
        """
        if self._clients.pop(name, None) is None and self._presumed.pop(name, None) is None:
            raise NotFoundError(f"no site {name!r} is registered")
        self.gone[name] = self.clock()
        self.parted[name] = how
        log.info("%s %s", name, "has stopped" if how == "stopped" else f"was {how}")
        self.changed([name])

    def presume(self, names: Iterable[str]) -> None:
        """Count sites as there for one dead time: after a restart nobody has spoken yet."""
        until = self.clock() + self.dead_after_s
        self._presumed.update((name, until) for name in names if name not in self._clients)

    @property
    def look_s(self) -> float:
        """Seconds after which `watch` is to be called again."""
        return min(LOOK_S, STANDSTILL * self.dead_after_s)

    def watch(self) -> None:
        """Look whether this server stood still; from the first call on others may ask, too."""
        self.stood_still_s()
        self._looked = self.clock()

    def stood_still_s(self) -> float:
        """Return for how long this server has stood still since its start, in all.

        Who asks first after a standstill notices it: the sites are given that time at once.
        """
        if self._looked is not None:
            now = self.clock()
            late = now - self._looked - self.look_s
            self._looked = now
            if late > STANDSTILL * self.dead_after_s:
                log.warning("this server stood still for %.1f s: sites are given that time", late)
                self._stood_still_s += late
                for client in self._clients.values():
                    client.last_seen = min(now, client.last_seen + late)
                for name, until in self._presumed.items():
                    self._presumed[name] = min(now + self.dead_after_s, until + late)
        return self._stood_still_s

    def expire(self) -> float:
        """Drop the sites that are dead by now; return the seconds until the next may be."""
        now = self.clock()
        gone = [
            name
            for name, client in self._clients.items()
            if now - client.last_seen >= self.dead_after_s
        ]
        for name in gone:
            log.warning("%s is dead: silent for %.0f s", name, now - self._clients[name].last_seen)
            self.gone[name] = self._clients.pop(name).last_seen
        missing = [name for name, until in self._presumed.items() if now >= until]
        for name in missing:
            log.warning("%s did not come back after the restart", name)
            del self._presumed[name]
        if gone or missing:
            self.changed([*gone, *missing])
        ends = [client.last_seen + self.dead_after_s for client in self._clients.values()]
        return max(0.0, min([*ends, *self._presumed.values()], default=now + 3600.0) - now)

    def live(self) -> frozenset[str]:
        """Names of the sites that count as there."""
        return frozenset(self._clients) | frozenset(self._presumed)

    def roster(self) -> Roster:
        """The sites as a decision sees them."""
        return Roster(self.live(), self.barred())

    def barred(self) -> frozenset[str]:
        """Names of the sites that take no part: disabled ones, and those that are denied."""
        names = {word.name for word in self.denials.in_force() if word.kind == "site"}
        return frozenset(
            self.disabled
            | {name for name in names if self.denials.find("site", name, self.known.get(name, ""))}
        )

    def get(self, name: str) -> Client | None:
        """Return a registered site."""
        return self._clients.get(name)

    def clients(self) -> list[Client]:
        """Return the registered sites in name order."""
        return [self._clients[name] for name in sorted(self._clients)]


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
