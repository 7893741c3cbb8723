"""`project.yml`: the federation as its founder writes it down.

Adding a participant is adding a line and provisioning again; nobody else's kit changes.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from flplatform.core.config import Name, PersonName, Port, Role, ServerLimits, Strict, parse_yaml
from flplatform.core.errors import ConfigError
from flplatform.core.messages import RESERVED_SITE_NAMES
from flplatform.security.identity import Kind

RESERVED_ORGANISATIONS = frozenset({"site", "submitter"})
RESERVED_PEOPLE = frozenset({"submitter"})

_LABEL = r"[a-zA-Z0-9_](?:[a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


def is_ip(host: str) -> bool:
    """Return whether a host is given as an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_host(host: str) -> str:
    if not is_ip(host) and not _HOST.fullmatch(host):
        raise ValueError(f"{host!r:.80} is neither a host name nor an IP address")
    return host


Host = Annotated[str, AfterValidator(_check_host)]
LeafDays = Annotated[int, Field(ge=1, le=397)]


class Validity(Strict):
    """Days for which certificates are issued; people and machines are renewed every year."""

    issuers: Annotated[int, Field(ge=2, le=7300)] = 3650
    server: LeafDays = 365
    sites: LeafDays = 365
    admins: LeafDays = 365


class Server(Strict):
    """The one server: all `addresses` go into its certificate, sites try them in order."""

    name: Name = "server"
    organisation: Name
    addresses: tuple[Host, ...] = Field(min_length=1)
    listen: Host = "0.0.0.0"  # noqa: S104 - a server that sites dial; narrowed in local/
    fl_port: Port = 8002
    admin_port: Port = 8003
    limits: ServerLimits = ServerLimits()


class Site(Strict):
    """A site that trains."""

    name: Name
    organisation: Name


class Admin(Strict):
    """A person at the console."""

    name: PersonName
    organisation: Name
    role: Role


Participant = Server | Site | Admin
KINDS: dict[type[Participant], Kind] = {Server: "server", Site: "site", Admin: "admin"}


class Project(Strict):
    """A whole `project.yml`."""

    api_version: Literal[1] = 1
    name: Name
    description: str = ""
    validity_days: Validity = Validity()
    server: Server
    sites: tuple[Site, ...] = ()
    admins: tuple[Admin, ...] = ()

    @property
    def participants(self) -> tuple[Participant, ...]:
        """Everybody who gets a kit."""
        return (self.server, *self.sites, *self.admins)


def load_project(path: Path) -> Project:
    """Read and check a `project.yml`.

    Raises:
        ConfigError: lists every problem with its line and key path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return parse_yaml(Project, text, path.name, _contradictions)


def _contradictions(project: Project) -> Iterator[tuple[tuple[str | int, ...], str]]:
    entries: list[tuple[tuple[str | int, ...], Participant]] = [(("server",), project.server)]
    entries += [(("sites", index), site) for index, site in enumerate(project.sites)]
    entries += [(("admins", index), admin) for index, admin in enumerate(project.admins)]
    counts = Counter(entry.name for _, entry in entries)
    for path, entry in entries:
        reserved = {Site: RESERVED_SITE_NAMES, Admin: RESERVED_PEOPLE}.get(type(entry), frozenset())
        if entry.name in reserved:
            yield (*path, "name"), f"{entry.name!r} has a meaning in commands; take another name"
        if counts[entry.name] > 1:
            yield (
                (*path, "name"),
                f"{entry.name!r} is the name of {counts[entry.name]} participants",
            )
        if entry.organisation in RESERVED_ORGANISATIONS:
            yield (*path, "organisation"), f"{entry.organisation!r} has a meaning in policies"
    server = project.server
    if server.fl_port == server.admin_port != 0:
        yield ("server", "admin_port"), f"is {server.admin_port}, as is fl_port"
    for field in ("server", "sites", "admins"):
        if getattr(project.validity_days, field) > project.validity_days.issuers:
            yield ("validity_days", field), "is longer than that of the issuers"
