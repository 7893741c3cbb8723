"""A startup kit: verified whole before anything in it is used.

    startup/   signed: certificate, key, trust files, typed configuration, scripts, manifest
    local/     the host owner's: policy, datasets, environments, resources, overrides
    transfer/  an admin's uploads and downloads

The manifest lists every file of `startup/` with its SHA-256 and is signed by provisioning. Two are
not pinned: `crl.pem`, whose lists carry their authorities' signatures and are replaced when
somebody is revoked, and a person's key, which is encrypted anew with every change of the passphrase
and must be the certificate's in any case.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import BaseModel, Field

from flplatform.core.config import (
    AdminConfig,
    Datasets,
    Environments,
    Name,
    Overrides,
    PersonName,
    Resources,
    ServerConfig,
    ServerPolicy,
    SiteConfig,
    SitePolicy,
    Strict,
    override,
    parse_json,
    parse_yaml,
)
from flplatform.core.errors import ConfigError, InvalidArgumentError, UnauthenticatedError
from flplatform.files.durable import write_atomic
from flplatform.security.authn import UserRecord
from flplatform.security.identity import Identity, Kind, TrustStore, load_certificate
from flplatform.security.signing import Signed, verify_kit

MANIFEST_TAG = "kit"
USER_TAG = "user"
CERTIFICATE, KEY, REVOCATIONS = "participant.crt", "participant.key", "crl.pem"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
USER, USER_SIGNATURE = "user.json", "user.sig"
CONFIG_FILES: dict[Kind, str] = {
    "server": "fed_server.json",
    "site": "fed_client.json",
    "admin": "fed_admin.json",
}

Config = ServerConfig | SiteConfig | AdminConfig
M = TypeVar("M", bound=BaseModel)


class Manifest(Strict):
    """`startup/manifest.json`: whose kit this is and the SHA-256 of every signed file.

    `inputs` is the digest of what provisioning built the kit from.
    """

    api_version: Literal[1] = 1
    project: Name
    kind: Kind
    name: PersonName
    inputs: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


@dataclass(frozen=True)
class Local:
    """The `local/` folder; a file that is absent or empty means its defaults."""

    overrides: Overrides = field(default_factory=Overrides)
    server_policy: ServerPolicy = field(default_factory=ServerPolicy)
    site_policy: SitePolicy = field(default_factory=SitePolicy)
    datasets: Datasets = field(default_factory=Datasets)
    environments: Environments = field(default_factory=Environments)
    resources: Resources = field(default_factory=Resources)

    @classmethod
    def load(cls, folder: Path, kind: Kind) -> "Local":
        """Read the files that a kit of this kind has.

        Raises:
            ConfigError: with the problems of all files.
        """
        problems: list[str] = []

        def read(model: type[M], name: str, *kinds: Kind) -> M:
            path = folder / name
            try:
                text = path.read_text() if kind in kinds and path.exists() else ""
                return parse_yaml(model, text, f"{folder.name}/{name}")
            except ConfigError as error:
                problems.extend(error.problems or (str(error),))
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{path}: {error}")
            return model()

        local = cls(
            read(Overrides, "overrides.yml", "server", "site", "admin"),
            read(ServerPolicy, "policy.yml", "server"),
            read(SitePolicy, "policy.yml", "site"),
            read(Datasets, "datasets.yml", "site"),
            read(Environments, "environments.yml", "site"),
            read(Resources, "resources.yml", "server", "site"),
        )
        if problems:
            raise ConfigError(f"{folder} has problems", problems=tuple(problems))
        return local


@dataclass(frozen=True)
class Kit:
    """A verified kit.

    Attributes:
        folder: the kit's folder.
        identity: whom its certificate names.
        config: the signed configuration, with this host's `local/overrides.yml` applied.
        trust: root, issuers and revocation lists.
        local: what the host's owner set.
    """

    folder: Path
    identity: Identity
    config: Config
    trust: TrustStore
    local: Local

    @classmethod
    def open(cls, folder: Path, now: datetime | None = None) -> "Kit":
        """Verify everything about a kit.

        Args:
            folder: holds `startup` and `local`.
            now: the time to check for, UTC; the present if None.

        Raises:
            ConfigError: names each file and what is wrong with it.
        """
        folder = folder.resolve()
        startup = folder / "startup"
        if not startup.is_dir():
            raise ConfigError(f"{folder} is not a startup kit: it has no startup folder")
        at = now or datetime.now(UTC)
        trust = TrustStore.load(startup)
        manifest = read_manifest(startup, trust, at)
        _refuse(folder, [*_bad_modes(folder), *_changed_files(startup, manifest)])
        identity = _check_certificate(startup, manifest, trust, at)
        _check_key(startup, identity)
        local = Local.load(folder / "local", identity.kind)
        config = override(_read_config(startup, identity.kind), local.overrides)
        _refuse(folder, _contradictions(identity, config, manifest))
        kit = cls(folder, identity, config, trust, local)
        if identity.kind == "admin":
            kit._check_user_record(at)
        return kit

    @property
    def server(self) -> ServerConfig:
        """The configuration of a server's kit.

        Raises:
            ConfigError: this is another kind of kit.
        """
        if isinstance(self.config, ServerConfig):
            return self.config
        raise ConfigError(f"{self.folder} is the kit of a {self.identity.kind}, not of a server")

    @property
    def site(self) -> SiteConfig:
        """The configuration of a site's kit.

        Raises:
            ConfigError: this is another kind of kit.
        """
        if isinstance(self.config, SiteConfig):
            return self.config
        raise ConfigError(f"{self.folder} is the kit of a {self.identity.kind}, not of a site")

    @property
    def admin(self) -> AdminConfig:
        """The configuration of an admin's kit.

        Raises:
            ConfigError: this is another kind of kit.
        """
        if isinstance(self.config, AdminConfig):
            return self.config
        raise ConfigError(f"{self.folder} is the kit of a {self.identity.kind}, not of an admin")

    @property
    def chain(self) -> bytes:
        """The certificate and its issuer's, PEM: what TLS presents."""
        return (self.folder / "startup" / CERTIFICATE).read_bytes()

    @property
    def key_path(self) -> Path:
        """The private key's file."""
        return self.folder / "startup" / KEY

    def private_key(self, passphrase: str | None = None) -> ec.EllipticCurvePrivateKey:
        """Open the private key.

        Raises:
            UnauthenticatedError: the passphrase is wrong or missing.
            ConfigError: the key does not belong to the certificate.
        """
        return _load_key(self.folder / "startup", passphrase)

    def key_pem(self, passphrase: str | None = None) -> bytes:
        """Return the private key as unencrypted PEM, for TLS; keep it in memory only.

        Raises:
            UnauthenticatedError: the passphrase is wrong or missing.
            ConfigError: the key does not belong to the certificate.
        """
        key = self.private_key(passphrase)
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def change_passphrase(self, old: str, new: str) -> None:
        """Encrypt an admin's private key with another passphrase; whole or not at all.

        Raises:
            UnauthenticatedError: the old one is wrong.
            OSError: it cannot be written; the old one goes on to open the key.
        """
        key = self.private_key(old)
        encryption = BestAvailableEncryption(new.encode())
        write_atomic(
            self.key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        )

    def user_record(self) -> Signed:
        """Return an admin's `user.json` with its signature, to be presented at first login."""
        startup = self.folder / "startup"
        return _attach(startup, USER, USER_SIGNATURE)

    def state_folder(self) -> Path:
        """Return the folder that holds what this participant remembers."""
        config = self.config
        return self.folder / ("state" if isinstance(config, AdminConfig) else config.state_folder)

    def reload_trust(self) -> TrustStore:
        """Read root, issuers and revocation lists again.

        Raises:
            ConfigError: they do not fit together; keep the old ones then.
        """
        return TrustStore.load(self.folder / "startup")

    def check_user(self) -> None:
        """Refuse to run as root where the owner forbids it.

        Raises:
            ConfigError: `allow_root` is false and this is root.
        """
        server, site = self.local.server_policy, self.local.site_policy
        if os.geteuid() == 0 and not (server.allow_root and site.allow_root):
            raise ConfigError("runs as root, which local/policy.yml forbids (allow_root: false)")

    def _check_user_record(self, now: datetime) -> None:
        signed = self.user_record()
        try:
            verify_kit(USER_TAG, signed, self.trust, now)
        except UnauthenticatedError as error:
            raise ConfigError(f"{self.folder}/startup/{USER}: {error}") from None
        record = parse_json(UserRecord, signed.payload, USER)
        own = self.identity
        if (record.project, record.name, record.organisation, record.role) != (
            own.project,
            own.name,
            own.organisation,
            own.role,
        ):
            raise ConfigError(f"{self.folder}/startup/{USER} is about {record.name}, not {own.uri}")


def read_manifest(startup: Path, trust: TrustStore, now: datetime) -> Manifest:
    """Verify, then parse the manifest.

    Raises:
        ConfigError: it is missing, or not signed by provisioning.
    """
    signed = _attach(startup, MANIFEST, SIGNATURE)
    try:
        verify_kit(MANIFEST_TAG, signed, trust, now)
    except UnauthenticatedError as error:
        raise ConfigError(f"{startup / MANIFEST}: {error}") from None
    return parse_json(Manifest, signed.payload, MANIFEST)


def _attach(startup: Path, name: str, signature: str) -> Signed:
    try:
        payload, detached = (startup / name).read_bytes(), (startup / signature).read_bytes()
        return Signed.from_detached(payload, detached)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    except InvalidArgumentError as error:
        raise ConfigError(f"{startup / signature}: {error}") from None


def _refuse(folder: Path, problems: Iterable[str]) -> None:
    if found := tuple(problems):
        raise ConfigError(f"the kit {folder} is refused", problems=found)


def _bad_modes(folder: Path) -> Iterator[str]:
    for path in (folder, folder / "startup", folder / "local", folder / "startup" / KEY):
        if not path.exists():
            continue
        status = path.stat()
        mode, right = stat.S_IMODE(status.st_mode), "700" if path.is_dir() else "600"
        if mode & 0o077:
            yield f"{path}: mode {mode:04o} lets others in; run: chmod {right} {path}"
        if status.st_uid not in (os.geteuid(), 0):
            yield f"{path}: belongs to user id {status.st_uid}, not to the one who runs this"


def _changed_files(startup: Path, manifest: Manifest) -> Iterator[str]:
    unpinned = {MANIFEST, SIGNATURE, REVOCATIONS}
    if manifest.kind == "admin":
        unpinned.add(KEY)
    present = {path.name: path for path in startup.iterdir()}
    for name in sorted(manifest.files.keys() - present.keys()):
        yield f"startup/{name}: is missing"
    for name, path in sorted(present.items()):
        if path.is_symlink() or not path.is_file():
            yield f"startup/{name}: is not a plain file"
        elif name in manifest.files and name not in unpinned:
            if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.files[name]:
                yield f"startup/{name}: was changed since it was signed"
        elif name not in unpinned:
            yield f"startup/{name}: is not in the manifest"


def _check_certificate(
    startup: Path, manifest: Manifest, trust: TrustStore, now: datetime
) -> Identity:
    path = startup / CERTIFICATE
    try:
        return trust.verify_chain(path.read_bytes(), manifest.kind, now)
    except UnauthenticatedError as error:
        raise ConfigError(f"{path}: {error}") from None


def _check_key(startup: Path, identity: Identity) -> None:
    if identity.kind != "admin":
        _load_key(startup, None)
    elif b"BEGIN ENCRYPTED PRIVATE KEY" not in (startup / KEY).read_bytes():
        raise ConfigError(f"{startup / KEY}: a person's key must be encrypted with a passphrase")


def _load_key(startup: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    path = startup / KEY
    try:
        secret = None if passphrase is None else passphrase.encode()
        key = load_pem_private_key(path.read_bytes(), secret)
    except TypeError:
        asked = "is not encrypted" if passphrase is not None else "needs a passphrase"
        raise UnauthenticatedError(f"{path} {asked}") from None
    except ValueError as error:
        if passphrase is not None:
            raise UnauthenticatedError(f"{path}: the passphrase is wrong") from None
        raise ConfigError(f"{path} is not a private key: {error}") from None
    certificate = load_certificate((startup / CERTIFICATE).read_bytes())
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise ConfigError(f"{path} is not the key of {CERTIFICATE}")
    return key


def _read_config(startup: Path, kind: Kind) -> Config:
    models: dict[Kind, type[Config]] = {
        "server": ServerConfig,
        "site": SiteConfig,
        "admin": AdminConfig,
    }
    name = CONFIG_FILES[kind]
    try:
        return parse_json(models[kind], (startup / name).read_bytes(), f"startup/{name}")
    except OSError as error:
        raise ConfigError(f"{startup / name}: {error.strerror}") from None


def _contradictions(identity: Identity, config: Config, manifest: Manifest) -> Iterator[str]:
    """Name the signed files that speak of somebody else than the certificate."""
    own = (identity.project, identity.name, identity.organisation)
    if (config.project, config.name, config.organisation) != own:
        yield f"startup/{CONFIG_FILES[identity.kind]}: is not about {identity.uri}"
    if isinstance(config, AdminConfig) and config.role != identity.role:
        yield f"startup/{CONFIG_FILES[identity.kind]}: the role is not {identity.role}"
    if (manifest.project, manifest.name) != own[:2]:
        yield f"startup/{MANIFEST}: is not about {identity.uri}"
