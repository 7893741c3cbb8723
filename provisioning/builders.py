"""Builders: each returns files for every participant, and touches nothing.

They are run in the order of `BUILDERS`; the manifest and its signature come last, over everything
that lies in `startup/` by then.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding

from flplatform.core.config import AdminConfig, ServerConfig, SiteConfig
from flplatform.security import kit as kits
from flplatform.security.authn import UserRecord, hash_password, password_of
from flplatform.security.identity import ISSUER_FILES, Kind
from flplatform.security.signing import sign
from provisioning.authority import Authority, key_pem, new_key
from provisioning.project import KINDS, Admin, Participant, Project, Server, Site

PRIVATE, PROGRAM = 0o600, 0o700
LAYOUT = 1
"""Raised when a kit's files change in a way that all kits must be made anew for."""


@cache
def _template(name: str) -> bytes:
    return (Path(__file__).parent / "templates" / name).read_bytes()


class KitFile(NamedTuple):
    """A file of a kit: path inside it, bytes, permission bits."""

    path: str
    data: bytes
    mode: int = PRIVATE


Files = dict[str, list[KitFile]]


@dataclass(frozen=True)
class Plan:
    """What builders work from.

    Attributes:
        targets: the participants whose kits are to be made.
        revocations: all revocation lists, PEM.
        passphrases: of the admins among the targets.
        now: UTC.
    """

    project: Project
    authority: Authority
    targets: tuple[Participant, ...]
    revocations: bytes
    passphrases: Mapping[str, str]
    now: datetime


def config_of(
    project: Project, participant: Participant
) -> ServerConfig | SiteConfig | AdminConfig:
    """Return the typed configuration that goes into a participant's kit."""
    server, limits = project.server, project.server.limits
    match participant:
        case Server():
            return ServerConfig(
                project=project.name,
                name=server.name,
                organisation=server.organisation,
                fl_address=_address(server.listen, server.fl_port),
                admin_address=_address(server.listen, server.admin_port),
                public_addresses=server.addresses,
                limits=limits,
            )
        case Site():
            return SiteConfig(
                project=project.name,
                name=participant.name,
                organisation=participant.organisation,
                servers=tuple(_address(host, server.fl_port) for host in server.addresses),
                heartbeat_s=limits.heartbeat_s,
                clock_skew_s=limits.clock_skew_s,
            )
        case Admin():
            return AdminConfig(
                project=project.name,
                name=participant.name,
                organisation=participant.organisation,
                role=participant.role,
                servers=tuple(_address(host, server.admin_port) for host in server.addresses),
            )


def inputs_of(project: Project, participant: Participant) -> str:
    """Digest what a kit is made from: it is made anew only when this changes."""
    config = config_of(project, participant).model_dump(mode="json")
    text = json.dumps([LAYOUT, config, _days(project, participant)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _days(project: Project, participant: Participant) -> int:
    days = project.validity_days
    return {Server: days.server, Site: days.sites, Admin: days.admins}[type(participant)]


def identities(plan: Plan) -> Files:
    """Key pairs, and certificates followed by their issuers'."""
    files: Files = {}
    for target in plan.targets:
        kind = KINDS[type(target)]
        key = new_key()
        certificate = plan.authority.issue(
            kind,
            target.organisation,
            target.name,
            key.public_key(),
            days=_days(plan.project, target),
            now=plan.now,
            role=target.role if isinstance(target, Admin) else "",
            hosts=target.addresses if isinstance(target, Server) else (),
        )
        chain = certificate.public_bytes(Encoding.PEM) + plan.authority.issuers[kind].pem
        secret = key_pem(key, plan.passphrases.get(target.name))
        files[target.name] = [
            KitFile(f"startup/{kits.CERTIFICATE}", chain),
            KitFile(f"startup/{kits.KEY}", secret),
        ]
    return files


_TRUSTED: Mapping[Kind, Sequence[Kind]] = {
    "server": ("server", "site", "admin"),
    "site": ("server", "site", "admin"),  # admin: for signatures, never a TLS root
    "admin": ("server", "admin"),
}


def trust(plan: Plan) -> Files:
    """The root, the issuers that each kind may trust, and the revocation lists."""
    authority = plan.authority
    common = [
        KitFile("startup/root.crt", authority.root.public_bytes(Encoding.PEM)),
        KitFile(f"startup/{kits.REVOCATIONS}", plan.revocations),
    ]
    issuers = {
        kind: KitFile(f"startup/{name}", authority.issuers[kind].pem)
        for kind, name in ISSUER_FILES.items()
    }
    trusted = {kind: [issuers[other] for other in others] for kind, others in _TRUSTED.items()}
    return {target.name: common + trusted[KINDS[type(target)]] for target in plan.targets}


def configurations(plan: Plan) -> Files:
    """The typed configuration of each participant."""
    return {
        target.name: [
            KitFile(
                f"startup/{kits.CONFIG_FILES[KINDS[type(target)]]}",
                config_of(plan.project, target).model_dump_json(indent=1).encode() + b"\n",
            )
        ]
        for target in plan.targets
    }


def users(plan: Plan) -> Files:
    """For admins: name, role and password hash, signed, for the server to learn at first login."""
    files: Files = {}
    for target in plan.targets:
        if isinstance(target, Admin):
            password = password_of(plan.passphrases[target.name], plan.project.name, target.name)
            record = UserRecord(
                project=plan.project.name,
                name=target.name,
                organisation=target.organisation,
                role=target.role,
                password_hash=hash_password(password),
            )
            payload = record.model_dump_json(indent=1).encode()
            files[target.name] = [
                KitFile(f"startup/{kits.USER}", payload),
                KitFile(f"startup/{kits.USER_SIGNATURE}", _signature(plan, kits.USER_TAG, payload)),
            ]
    return files


_LOCAL: Mapping[Kind, Sequence[tuple[str, str]]] = {
    "server": (
        ("policy.yml", "server_policy.yml"),
        ("resources.yml", "server_resources.yml"),
        ("overrides.yml", "server_overrides.yml"),
    ),
    "site": (
        ("policy.yml", "site_policy.yml"),
        ("datasets.yml", "datasets.yml"),
        ("environments.yml", "environments.yml"),
        ("resources.yml", "site_resources.yml"),
        ("overrides.yml", "site_overrides.yml"),
    ),
    "admin": (("overrides.yml", "admin_overrides.yml"),),
}
_UNITS: Mapping[Kind, str] = {"server": "server.service", "site": "site.service"}
_SCRIPTS: Mapping[Kind, Sequence[str]] = {
    "server": ("start.sh", "stop.sh"),
    "site": ("start.sh", "stop.sh"),
    "admin": ("fl_admin.sh",),
}


def scripts(plan: Plan) -> Files:
    """What people start."""
    return {
        target.name: [
            KitFile(f"startup/{name}", _template(name), PROGRAM)
            for name in _SCRIPTS[KINDS[type(target)]]
        ]
        for target in plan.targets
    }


def units(plan: Plan) -> Files:
    """What systemd starts, once the host's owner has filled in folder and account."""
    return {
        target.name: [KitFile(f"startup/flplatform-{unit}", _template(unit))]
        for target in plan.targets
        if (unit := _UNITS.get(KINDS[type(target)]))
    }


def local_files(plan: Plan) -> Files:
    """The host owner's files: every key explained, all of them commented out."""
    return {
        target.name: [
            KitFile(f"local/{name}", _template(template))
            for name, template in _LOCAL[KINDS[type(target)]]
        ]
        for target in plan.targets
    }


Builder = Callable[[Plan], Files]
BUILDERS: tuple[Builder, ...] = (
    identities,
    trust,
    configurations,
    users,
    scripts,
    units,
    local_files,
)


def build(plan: Plan) -> Files:
    """Run all builders, then sign."""
    files: Files = {target.name: [] for target in plan.targets}
    for builder in BUILDERS:
        for name, more in builder(plan).items():
            files[name].extend(more)
    for target in plan.targets:
        files[target.name].extend(_manifest(plan, target, files[target.name]))
    return files


def _manifest(plan: Plan, target: Participant, files: Sequence[KitFile]) -> list[KitFile]:
    pinned = {
        file.path.removeprefix("startup/"): hashlib.sha256(file.data).hexdigest()
        for file in files
        if file.path.startswith("startup/") and not file.path.endswith(kits.REVOCATIONS)
    }
    manifest = kits.Manifest(
        project=plan.project.name,
        kind=KINDS[type(target)],
        name=target.name,
        inputs=inputs_of(plan.project, target),
        files=dict(sorted(pinned.items())),
    )
    payload = manifest.model_dump_json(indent=1).encode()
    signature = _signature(plan, kits.MANIFEST_TAG, payload)
    return [
        KitFile(f"startup/{kits.MANIFEST}", payload),
        KitFile(f"startup/{kits.SIGNATURE}", signature),
    ]


def _signature(plan: Plan, tag: str, payload: bytes) -> bytes:
    signer = plan.authority.signer
    return sign(tag, payload, signer.key, signer.certificate).to_detached()
