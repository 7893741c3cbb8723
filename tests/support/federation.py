"""A small real federation: kits made by provisioning, in a fraction of a second."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from flplatform.core.config import ServerLimits
from flplatform.security.kit import Kit
from provisioning import provision as steps
from provisioning.project import Admin, Project, Server, Site, Validity


@dataclass(frozen=True)
class Federation:
    """Paths of kits by participant, under `<tmp>/federation/<project>`."""

    project: Project
    folder: Path

    @property
    def server(self) -> Path:
        """The server's kit."""
        return self.kit("server")

    def kit(self, name: str) -> Path:
        """The folder of a kit."""
        return self.folder / "kits" / name

    def open(self, name: str) -> Kit:
        """A verified kit."""
        return Kit.open(self.kit(name))

    def passphrase(self, name: str) -> str:
        """What opens an admin's key, and from which the password is derived."""
        return (self.folder / "secrets" / f"{name}.txt").read_text().strip()

    def key(self, name: str) -> ec.EllipticCurvePrivateKey:
        """The private key of anybody."""
        kit = self.open(name)
        secret = self.passphrase(name) if kit.identity.kind == "admin" else None
        return kit.private_key(secret)

    def point_to(self, fl_port: int, admin_port: int, host: str = "localhost") -> None:
        """Tell all sites and admins the ports that the server really got."""
        ports = dict.fromkeys((site.name for site in self.project.sites), fl_port)
        ports |= dict.fromkeys((admin.name for admin in self.project.admins), admin_port)
        for name, port in ports.items():
            self.local(name, "overrides.yml", f'servers: ["{host}:{port}"]\n')

    def local(self, name: str, file: str, text: str) -> None:
        """Write one of a participant's local files."""
        (self.kit(name) / "local" / file).write_text(text)

    def revoke(self, name: str) -> None:
        """Revoke somebody; the new list is put into all kits."""
        steps.revoke(self.folder, name)


def provision(
    folder: Path,
    sites: Sequence[str] | Mapping[str, str] = ("site-1", "site-2"),
    admins: Sequence[str] | Mapping[str, str] = ("admin",),
    *,
    project: str = "test",
    fl_port: int = 0,
    admin_port: int = 0,
    addresses: Sequence[str] = ("localhost", "127.0.0.1"),
    days: int = 365,
    now: datetime | None = None,
    **limits: Any,
) -> Federation:
    """Provision a federation below `folder`.

    Args:
        folder: usually `tmp_path`.
        sites: names, each an organisation of the same name; or name -> organisation.
        admins: names, all project admins of organisation `hub`; or name -> `role` or
            `role@organisation`.
        project: its name.
        fl_port: 0 binds to a free port: see `Federation.point_to`.
        admin_port: likewise.
        addresses: of the server; it binds to 127.0.0.1 in any case.
        days: validity of all certificates but the issuers'.
        now: the time of issuing.
        **limits: fields of `ServerLimits`.
    """
    organisations = sites if isinstance(sites, Mapping) else {name: name for name in sites}
    roles = admins if isinstance(admins, Mapping) else dict.fromkeys(admins, "project_admin")
    people = {name: (*role.split("@"), "hub")[:2] for name, role in roles.items()}
    description = Project(
        name=project,
        validity_days=Validity(server=days, sites=days, admins=days),
        server=Server(
            organisation="hub",
            addresses=tuple(addresses),
            listen="127.0.0.1",
            fl_port=fl_port,
            admin_port=admin_port,
            limits=ServerLimits(**limits),
        ),
        sites=tuple(Site(name=name, organisation=org) for name, org in organisations.items()),
        admins=tuple(
            Admin.model_validate({"name": name, "role": role, "organisation": organisation})
            for name, (role, organisation) in people.items()
        ),
    )
    report = steps.provision(description, folder / "federation", now=now)
    return Federation(description, report.folder)
