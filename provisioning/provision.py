"""From a project to a folder of signed kits, all or nothing.

    <out>/<project>/kits/<participant>/   startup/ local/ transfer/: to be handed out
    <out>/<project>/state/                the authority: certificates, encrypted keys, ledger
    <out>/<project>/secrets/              passphrases of the authority and of every admin

Everything is built in memory, written into a temporary folder and renamed into place, the ledger
last: an error leaves nothing behind. The ledger decides what is new: kits may be moved away once
they are handed out. Kits are not fsynced one by one; whoever loses power right after provisioning
renews what `verify` refuses.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from flplatform.core.config import Strict, parse_json
from flplatform.core.errors import ConfigError, NotFoundError
from flplatform.files.durable import (
    check_private,
    private_dir,
    remove_temporaries,
    temporary_beside,
    write_atomic,
)
from flplatform.security.identity import Kind, fingerprint_of
from flplatform.security.kit import CERTIFICATE, REVOCATIONS
from flplatform.security.signing import Utc
from provisioning.authority import (
    ISSUERS,
    ROOT,
    SIGNER,
    Authority,
    Issuer,
    create,
    key_pem,
    load_issuer,
)
from provisioning.builders import Files, KitFile, Plan, build, inputs_of
from provisioning.project import KINDS, Admin, Participant, Project

LEDGER = "ledger.json"
AUTHORITY_SECRET = "authority.txt"  # noqa: S105 - the name of a file
PASSPHRASE_BYTES = 18


class Issued(Strict):
    """A line of the ledger: one certificate."""

    name: str
    kind: Kind
    serial: str
    fingerprint: str
    inputs: str
    not_after: Utc
    revoked_at: Utc | None = None


class Ledger(Strict):
    """`state/ledger.json`: every certificate that was issued to a participant."""

    crl_number: int = 1
    issued: tuple[Issued, ...] = ()

    def current(self) -> dict[str, Issued]:
        """Return each participant's latest unrevoked certificate."""
        return {item.name: item for item in self.issued if item.revoked_at is None}


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        folder: `<out>/<project>`.
        made: participants with a new kit.
        unchanged: those whose kit was left alone.
        left_over: certified earlier, but no longer in the project: revoke them.
    """

    folder: Path
    root_fingerprint: str
    made: tuple[str, ...]
    unchanged: tuple[str, ...]
    left_over: tuple[str, ...]


def provision(
    project: Project,
    out: Path,
    *,
    passphrase: str | None = None,
    renew: Collection[str] = (),
    now: datetime | None = None,
) -> Report:
    """Make the kits that are missing; those whose inputs are unchanged stay byte for byte.

    Args:
        project: from `load_project`.
        out: the folder of federations.
        passphrase: of the authority's keys; drawn into `secrets` if None.
        renew: participants who get a new key and certificate in any case.
        now: UTC; the present if None.

    Raises:
        ConfigError: `out` holds something else, or a name to renew is not in the project.
        UnauthenticatedError: the passphrase is wrong.
        OSError: the disk refused. Nothing is left behind.
    """
    unknown = sorted(set(renew) - {item.name for item in project.participants})
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} is not in the project")
    folder, at = out / project.name, (now or datetime.now(UTC)).replace(microsecond=0)
    private_dir(out)
    if not folder.exists():
        return _found(project, folder, passphrase, at)
    if not (folder / "state" / LEDGER).is_file():
        raise ConfigError(f"{folder} exists, but holds no state of a federation")
    with _locked(folder):
        return _extend(project, folder, passphrase, frozenset(renew), at)


def revoke(
    folder: Path, name: str, *, passphrase: str | None = None, now: datetime | None = None
) -> Path:
    """Revoke all certificates of a participant, for good.

    A new `crl.pem` is made and put into the kits that are still here; the other hosts need a copy
    of it as `startup/crl.pem`, where it is noticed without a restart.

    Args:
        folder: `<out>/<project>`.
        name: the participant.
        passphrase: of the authority's keys; read from `secrets` if None.
        now: UTC; the present if None.

    Returns:
        The new `crl.pem`.

    Raises:
        NotFoundError: nobody of that name ever had a certificate.
        UnauthenticatedError: the passphrase is wrong.
    """
    at = (now or datetime.now(UTC)).replace(microsecond=0)
    with _locked(folder):
        ledger, authority = _load_ledger(folder), _load_authority(folder, passphrase)
        kinds = {item.kind for item in ledger.issued if item.name == name}
        if not kinds:
            raise NotFoundError(f"no certificate was issued to {name!r}")
        issued = tuple(
            item.model_copy(update={"revoked_at": item.revoked_at or at})
            if item.name == name
            else item
            for item in ledger.issued
        )
        ledger = Ledger(crl_number=ledger.crl_number + 1, issued=issued)
        write_atomic(folder / "state" / LEDGER, _encode(ledger))
        for kind in kinds:
            serials = [
                int(item.serial, 16) for item in issued if item.kind == kind and item.revoked_at
            ]
            text = authority.issuers[kind].revocations(serials, ledger.crl_number, at)
            write_atomic(folder / "state" / f"{ISSUERS[kind]}.crl", text)
        lists = _join_revocations(folder)
    for startup in (folder / "kits").glob("*/startup"):
        write_atomic(startup / REVOCATIONS, lists)
    return folder / "state" / REVOCATIONS


# ----------------------------------------------------------------------------------- inside


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        handle = os.open(folder / "state", os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no state of a federation") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _found(project: Project, folder: Path, passphrase: str | None, now: datetime) -> Report:
    draft = temporary_beside(folder)
    try:
        for part in (draft, draft / "state", draft / "secrets", draft / "kits"):
            private_dir(part)
        if passphrase is None:
            passphrase = secrets.token_urlsafe(PASSPHRASE_BYTES)
            write_atomic(draft / "secrets" / AUTHORITY_SECRET, passphrase.encode() + b"\n")
        _write_authority(draft / "state", project, passphrase, now)
        report = _extend(project, draft, passphrase, frozenset(), now)
        os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return replace(report, folder=folder)


def _write_authority(state: Path, project: Project, passphrase: str, now: datetime) -> None:
    authority, root = create(project.name, project.validity_days.issuers, now)
    named = {ISSUERS[kind]: issuer for kind, issuer in authority.issuers.items()}
    for name, issuer in {ROOT: root, SIGNER: authority.signer, **named}.items():
        write_atomic(state / f"{name}.crt", issuer.pem)
        write_atomic(state / f"{name}.key", key_pem(issuer.key, passphrase))
        if name != SIGNER:
            write_atomic(state / f"{name}.crl", issuer.revocations((), 1, now))
    _join_revocations(state.parent)
    write_atomic(state / LEDGER, _encode(Ledger()))


def _join_revocations(folder: Path) -> bytes:
    state = folder / "state"
    text = b"".join((state / f"{name}.crl").read_bytes() for name in (ROOT, *ISSUERS.values()))
    write_atomic(state / REVOCATIONS, text)
    return text


def _load_authority(folder: Path, passphrase: str | None) -> Authority:
    state = folder / "state"
    if passphrase is None:
        secret = folder / "secrets" / AUTHORITY_SECRET
        if not secret.exists():
            raise ConfigError(f"{secret} is not here", hint="give the passphrase by a file")
        check_private(secret)
        passphrase = secret.read_text().strip()
    known = passphrase

    def load(name: str) -> Issuer:
        certificate, key = (
            (state / f"{name}.crt").read_bytes(),
            (state / f"{name}.key").read_bytes(),
        )
        return load_issuer(certificate, key, known, name)

    (root,) = x509.load_pem_x509_certificates((state / f"{ROOT}.crt").read_bytes())
    issuers = {kind: load(name) for kind, name in ISSUERS.items()}
    project = root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    return Authority(str(project), root, issuers, load(SIGNER))


def _load_ledger(folder: Path) -> Ledger:
    path = folder / "state" / LEDGER
    return parse_json(Ledger, path.read_bytes(), str(path))


def _encode(ledger: Ledger) -> bytes:
    return ledger.model_dump_json(indent=1).encode() + b"\n"


def _extend(
    project: Project, folder: Path, passphrase: str | None, renew: Collection[str], now: datetime
) -> Report:
    authority, ledger = _load_authority(folder, passphrase), _load_ledger(folder)
    targets = tuple(_changed(project, ledger, renew))
    made = tuple(target.name for target in targets)
    names = {participant.name for participant in project.participants}
    report = Report(
        folder=folder,
        root_fingerprint=fingerprint_of(authority.root),
        made=made,
        unchanged=tuple(sorted(names - set(made))),
        left_over=tuple(sorted(ledger.current().keys() - names)),
    )
    if targets:
        phrases = {t.name: _passphrase(folder, t.name) for t in targets if isinstance(t, Admin)}
        revocations = (folder / "state" / REVOCATIONS).read_bytes()
        files = build(Plan(project, authority, targets, revocations, phrases, now))
        issued = [_ledger_line(project, target, files[target.name]) for target in targets]
        _install(folder, files, phrases)
        ledger = ledger.model_copy(update={"issued": (*ledger.issued, *issued)})
        write_atomic(folder / "state" / LEDGER, _encode(ledger))
    return report


def _changed(project: Project, ledger: Ledger, renew: Collection[str]) -> Iterator[Participant]:
    latest = {item.name: item for item in ledger.issued}
    for participant in project.participants:
        known = latest.get(participant.name)
        if known is None or participant.name in renew:
            yield participant
        elif not known.revoked_at and known.inputs != inputs_of(project, participant):
            yield participant  # one that is revoked stays so until renewed by name


def _passphrase(folder: Path, name: str) -> str:
    path = folder / "secrets" / f"{name}.txt"
    return path.read_text().strip() if path.exists() else secrets.token_urlsafe(PASSPHRASE_BYTES)


def _ledger_line(project: Project, target: Participant, files: Iterable[KitFile]) -> Issued:
    data = next(file.data for file in files if file.path == f"startup/{CERTIFICATE}")
    certificate = x509.load_pem_x509_certificate(data)
    return Issued(
        name=target.name,
        kind=KINDS[type(target)],
        serial=f"{certificate.serial_number:x}",
        fingerprint=fingerprint_of(certificate),
        inputs=inputs_of(project, target),
        not_after=certificate.not_valid_after_utc,
    )


def _install(folder: Path, files: Files, passphrases: Mapping[str, str]) -> None:
    """Write all kits aside, then rename them into place; `local/` files that exist stay."""
    kits = folder / "kits"
    remove_temporaries(kits)
    draft = private_dir(temporary_beside(kits / "kits"))
    try:
        for name, content in files.items():
            _write_kit(draft / name, content)
        for name, passphrase in passphrases.items():
            write_atomic(folder / "secrets" / f"{name}.txt", passphrase.encode() + b"\n")
        for name in files:
            _replace(draft / name, kits / name, draft / f"{name}.old")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_kit(kit: Path, files: Iterable[KitFile]) -> None:
    for folder in (kit, kit / "startup", kit / "local", kit / "transfer"):
        private_dir(folder)
    for file in files:
        handle = os.open(kit / file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
        with os.fdopen(handle, "wb") as output:
            output.write(file.data)


def _replace(new: Path, kit: Path, old: Path) -> None:
    if not kit.exists():
        os.rename(new, kit)
        return
    if (kit / "startup").exists():
        os.rename(kit / "startup", old)
    os.rename(new / "startup", kit / "startup")
    for path in (new / "local").iterdir():
        if not (private_dir(kit / "local") / path.name).exists():
            os.rename(path, kit / "local" / path.name)
