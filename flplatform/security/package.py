"""A packed job: one zip with `job.yml`, the code, and a manifest signed by its author.

The manifest lists every file with size and SHA-256, and the initial model's digest; the model
itself travels as a blob of its own. Members are read one by one against the manifest: nothing is
extracted that it does not name, and no byte more than it declares is inflated.
"""

import errno
import hashlib
import io
import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from flplatform.core.errors import ConfigError, InvalidArgumentError
from flplatform.core.job import CODE_FOLDER, JOB_FILE, JobSpec, parse_job
from flplatform.core.messages import ModelRef
from flplatform.core.strict import Strict, parse_json
from flplatform.files.durable import fsync_dir
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.signing import Signed, sign, verify

TAG = "job"
MANIFEST = "META/manifest.json"
SIGNATURE = "META/manifest.sig"
MAX_FILES = 10_000
MAX_FILE_BYTES = 256 << 20
MAX_CODE_BYTES = 1 << 30
MAX_META_BYTES = 4 << 20
MAX_DIRECTORY_BYTES = 8 << 20
MAX_PATH_BYTES = 255
_EPOCH = (1980, 1, 1, 0, 0, 0)
_END = struct.Struct("<4s4H2LH")
"""The end record of a zip: signature, disks, entries, directory size and offset, comment size."""
_LOCATOR_BYTES = 20
"""Size of the record before it that says where a zip64 has its true end record."""
_IGNORED = {"__pycache__", ".git", ".ipynb_checkpoints"}
_MALFORMED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
)
"""What reading a zip raises that is none."""


class PackedFile(Strict):
    """One file of a job: path with `/`, size in bytes, SHA-256 in hex."""

    path: str
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackageManifest(Strict):
    """What the author signed."""

    project: str
    job: str
    author: str
    model_digest: str
    model_size: int
    files: Annotated[tuple[PackedFile, ...], Field(max_length=MAX_FILES)]


@dataclass(frozen=True, slots=True)
class Package:
    """A verified package.

    Attributes:
        path: the zip file.
        author: who signed it.
        manifest: what was signed.
        job: the parsed `job.yml`.
    """

    path: Path
    author: Identity
    manifest: PackageManifest
    job: JobSpec

    @property
    def model(self) -> ModelRef:
        """The initial model's blob."""
        return ModelRef(self.manifest.model_digest, self.manifest.model_size)

    @property
    def has_code(self) -> bool:
        """Whether the job brings code of its own."""
        return any(file.path.startswith(f"{CODE_FOLDER}/") for file in self.manifest.files)

    def extract(self, folder: Path) -> None:
        """Write all files below `folder`, which must be empty and private; durable on return.

        Raises:
            InvalidArgumentError: the zip differs from its manifest.
        """
        with zipfile.ZipFile(self.path) as archive:
            for file in self.manifest.files:
                target = folder / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                data = _read(archive, file)
                with os.fdopen(
                    os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600),
                    "wb",
                ) as output:
                    output.write(data)
                    output.flush()
                    os.fsync(output.fileno())
        for parent, _, _ in os.walk(folder):
            fsync_dir(Path(parent))


def read_job_folder(folder: Path) -> dict[str, bytes]:
    """Return the files of a job folder that are packed: `job.yml` and everything in `code/`.

    Raises:
        ConfigError: there is no job.yml, or a file is a link or too large.
    """
    if not (folder / JOB_FILE).is_file():
        raise ConfigError(f"{folder} has no {JOB_FILE}", hint="give the path of a job folder")
    found = {JOB_FILE: (folder / JOB_FILE).read_bytes()}
    code = folder / CODE_FOLDER
    for path in sorted((code, *code.rglob("*"))):
        relative = path.relative_to(folder)
        if _IGNORED & set(relative.parts) or path.suffix == ".pyc":
            continue
        if path.is_symlink() or path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{relative} is not a plain file", hint="copy it into the job")
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{relative} is larger than {MAX_FILE_BYTES} bytes")
        found[relative.as_posix()] = path.read_bytes()
    if len(found) > MAX_FILES:
        raise ConfigError(f"{folder} has {len(found)} files; at most {MAX_FILES} are packed")
    if sum(map(len, found.values())) > MAX_CODE_BYTES:
        raise ConfigError(f"{folder} is larger than {MAX_CODE_BYTES} bytes")
    return found


def pack(
    files: Mapping[str, bytes],
    model: ModelRef,
    *,
    project: str,
    author: str,
    job: str,
    key: ec.EllipticCurvePrivateKey,
    certificate: bytes,
) -> bytes:
    """Return the package; the same files, model and signature give the same bytes."""
    manifest = PackageManifest(
        project=project,
        job=job,
        author=author,
        model_digest=model.digest,
        model_size=model.size,
        files=tuple(
            PackedFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in sorted(files.items())
        ),
    )
    text = manifest.model_dump_json(indent=1).encode()
    signed = sign(TAG, text, key, certificate)
    members = {MANIFEST: text, SIGNATURE: signed.to_detached(), **dict(sorted(files.items()))}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in members.items():
            archive.writestr(zipfile.ZipInfo(path, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def open_package(path: Path, trust: TrustStore, now: datetime) -> Package:
    """Verify a package: signature first, then every member against the manifest.

    Raises:
        UnauthenticatedError: unsigned, or the signature or its chain does not hold.
        InvalidArgumentError: the zip is malformed or differs from its manifest.
        ConfigError: `job.yml` is wrong.
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            return _verify(archive, path, trust, now)
    except _MALFORMED as error:
        raise InvalidArgumentError(f"is not a job package: {error}", field="package") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # an offset before the file's beginning
            raise
        raise InvalidArgumentError("is not a job package", field="package") from None


def _check_directory(path: Path) -> None:
    """Bound the zip's table of contents before it is read whole.

    Raises:
        zipfile.BadZipFile: it is too large, or there is none at the very end of the file.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END.size - _LOCATOR_BYTES))
        before, record = file.read(_LOCATOR_BYTES), file.read()
    if len(record) < _END.size:
        raise zipfile.BadZipFile("too short for a zip")
    signature, *_, entries, directory_bytes, _, comment_bytes = _END.unpack(record)
    if signature != b"PK\x05\x06" or comment_bytes:
        raise zipfile.BadZipFile("no zip ends where the file does")
    if before.startswith(b"PK\x06\x07"):
        raise zipfile.BadZipFile("zip64 is not needed for a job")
    if entries > MAX_FILES + 2 or directory_bytes > MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"has {entries} entries")


def _verify(archive: zipfile.ZipFile, path: Path, trust: TrustStore, now: datetime) -> Package:
    names = [info.filename for info in archive.infolist()]
    if len(names) > MAX_FILES + 2 or len(set(names)) != len(names):
        raise InvalidArgumentError("has a name twice, or too many files", field="package")
    if not all(map(_plain, archive.infolist())):
        raise InvalidArgumentError("holds more than plain files", field="package")
    if MANIFEST not in names or SIGNATURE not in names:
        raise InvalidArgumentError(
            "is not signed", field="package", hint="submit it with submit_job, which signs it"
        )
    text = _inflate(archive, MANIFEST, MAX_META_BYTES)
    signed = Signed.from_detached(text, _inflate(archive, SIGNATURE, MAX_META_BYTES))
    author = verify(TAG, signed, trust, now)
    manifest = parse_json(PackageManifest, text, MANIFEST)
    if manifest.project != trust.project or manifest.author != author.name:
        raise InvalidArgumentError(
            f"was packed by {manifest.author} for project {manifest.project!r}", field="package"
        )
    listed = [file.path for file in manifest.files]
    odd = sorted((set(names) - {MANIFEST, SIGNATURE}) ^ set(listed))
    if odd:
        raise InvalidArgumentError(
            f"{odd[0]!r} is only in one of zip and manifest", field="package"
        )
    if sum(file.size for file in manifest.files) > MAX_CODE_BYTES:
        raise InvalidArgumentError(f"unpacks to more than {MAX_CODE_BYTES} bytes", field="package")
    _check_paths(listed)
    job_text = ""
    for file in manifest.files:
        data = _read(archive, file)
        if file.path == JOB_FILE:
            job_text = data.decode("utf-8", "replace")
    job = parse_job(job_text, JOB_FILE)
    if job.name != manifest.job:
        raise InvalidArgumentError("manifest and job.yml name different jobs", field="package")
    return Package(path, author, manifest, job)


def _plain(info: zipfile.ZipInfo) -> bool:
    """Return whether an entry is a regular file, neither encrypted nor packed in an odd way."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    packed = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return kind in (0, stat.S_IFREG) and packed and not info.flag_bits & 1


def _check_paths(paths: Sequence[str]) -> None:
    """Demand that the paths can all be files of one job, on any file system."""
    for path in paths:
        _check_path(path)
    folded = [unicodedata.normalize("NFC", path).casefold() for path in paths]
    if len(set(folded)) != len(folded):
        raise InvalidArgumentError("two names differ only in case", field="package")
    folders = {str(parent) for path in folded for parent in PurePosixPath(path).parents}
    if both := folders.intersection(folded):
        raise InvalidArgumentError(f"{min(both)!r} is a file and a folder at once", field="package")


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    plain = path == "/".join(parts) and "\\" not in path and path.isprintable()
    inside = path == JOB_FILE or (parts[:1] == (CODE_FOLDER,) and len(parts) > 1)
    if not plain or not inside or ".." in parts or len(path.encode()) > MAX_PATH_BYTES:
        raise InvalidArgumentError(
            f"{path[:100]!r} is not {JOB_FILE} or a path inside {CODE_FOLDER}/", field="package"
        )


def _inflate(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    with archive.open(name) as member:
        data = member.read(limit + 1)
    if len(data) > limit:
        raise InvalidArgumentError(f"{name} is larger than it may be", field="package")
    return data


def _read(archive: zipfile.ZipFile, file: PackedFile) -> bytes:
    data = _inflate(archive, file.path, file.size)
    if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
        raise InvalidArgumentError(f"{file.path} is not what its author signed", field="package")
    return data
