"""`certs`: when every certificate ends that the server knows of, the next one first."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from flplatform.admin.orders import Trust
from flplatform.admin.ports import Control
from flplatform.admin.users import UserStore
from flplatform.core.errors import FailedPreconditionError
from flplatform.hci import CommandSpec, Connection, NoArguments
from flplatform.security.kit import Kit

WARN_DAYS = 30.0

Line = tuple[str, str, str, datetime | None, str]
"""Name, what it is, organisation, when it ends, and how the server knows."""


class CertificatesModule:
    """Ends of certificates.

    Args:
        control: knows sites.
        users: everybody who has signed in; None for nobody.
        kit: the server's.
        trust: holds the trust store of now.
    """

    name = "security"
    summary = "who may do what, who did what, and whose word counts"

    def __init__(self, control: Control, users: UserStore | None, kit: Kit, trust: Trust) -> None:
        self._control = control
        self._users = users
        self._kit = kit
        self._trust = trust

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="certs",
                summary="shows how long certificates and revocation lists last, the next end first",
                arguments=NoArguments,
                handler=self._certs,
                permission="view",
                mutating=False,
                examples=("certs",),
            )
        ]

    async def _certs(self, connection: Connection, _: NoArguments) -> None:
        now = datetime.now(UTC)
        far = datetime.max.replace(tzinfo=UTC)
        lines = sorted(self._lines(), key=lambda line: (line[3] or far, line[0]))
        found = []
        for name, kind, organisation, end, source in lines:
            left = None if end is None else round((end - now).total_seconds() / 86_400, 2)
            found.append(
                {
                    "name": name,
                    "kind": kind,
                    "organisation": organisation,
                    "left_days": left,
                    "ends_at": None if end is None else end.isoformat(timespec="seconds"),
                    "source": source,
                    "state": _state(left),
                }
            )
        columns = list(found[0])
        await connection.table("certificates", columns, [list(each.values()) for each in found])
        await connection.data("certificates", found)
        if soon := [each["name"] for each in found if each["state"] not in ("ok", "unknown")]:
            await connection.text(
                f"{len(soon)} of {len(found)} end within {WARN_DAYS:.0f} days: "
                "fl_provision renew makes new ones"
            )

    def _lines(self) -> Iterator[Line]:
        own = self._kit.identity if self._kit else None
        if own is None:
            raise FailedPreconditionError("this server has no certificate")
        yield own.name, "server", own.organisation, own.not_after, "own"
        for name, kind, end in self._trust.store.ends():
            yield name, kind, "", end, "kit"
        ends = self._control.access.site_certificates()
        for site in self._control.sites():
            live = site.state in ("live", "disabled")
            source = "live" if live and site.name in ends else "last seen"
            known = ends.get(site.name)
            yield site.name, "site", site.organisation, known, source if known else "not seen yet"
        for user in self._users.users() if self._users else []:
            if user.not_after:
                until = datetime.fromisoformat(user.not_after)
                yield user.name, user.role or "admin", user.organisation, until, "last sign-in"


def _state(left_days: float | None) -> str:
    if left_days is None:
        return "unknown"
    if left_days < 0:
        return "ended"
    return "ends soon" if left_days < WARN_DAYS else "ok"
