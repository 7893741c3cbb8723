import contextlib
import hashlib
import io
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flplatform.core.errors import (
    ConfigError,
    FLError,
    InvalidArgumentError,
    UnauthenticatedError,
)
from flplatform.core.messages import ModelRef
from flplatform.security import package
from flplatform.security.identity import TrustStore
from flplatform.security.package import (
    MANIFEST,
    SIGNATURE,
    TAG,
    Package,
    PackageManifest,
    PackedFile,
    open_package,
    pack,
    read_job_folder,
)
from flplatform.security.signing import sign
from tests.support.federation import Federation, provision

NOW = datetime.now(UTC) + timedelta(hours=1)  # the certificates are made while the tests run
JOB = b"""name: tiny
executor: {module: job}
initial_model: {file: model.safetensors}
"""
FILES = {
    "job.yml": JOB,
    "code/job.py": b"print(1)\n" * 50,
    "code/lib/\xc3\xa4.py".encode().decode(): b"",
}
MODEL = ModelRef("blake3:" + "0" * 64, 1234)
AUTHOR = "amy@x.org"
Pack = Callable[..., bytes]
Open = Callable[[bytes], Package]


@pytest.fixture(scope="module")
def signer(federation: Federation) -> dict[str, Any]:
    return {"key": federation.key(AUTHOR), "certificate": federation.open(AUTHOR).chain}


@pytest.fixture
def packed(signer: dict[str, Any]) -> Pack:
    def make(files: Mapping[str, bytes] = FILES, **more: Any) -> bytes:
        fields = {"project": "test", "author": AUTHOR, "job": "tiny", **signer}
        return pack(files, MODEL, **fields | more)

    return make


@pytest.fixture
def opened(tmp_path: Path, trust: TrustStore) -> Open:
    def read(data: bytes) -> Package:
        path = tmp_path / "package.zip"
        path.write_bytes(data)
        return open_package(path, trust, NOW)

    return read


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(entries: Mapping[str, bytes] | list[tuple[Any, bytes]], **more: Any) -> bytes:
    pairs = list(entries.items()) if isinstance(entries, Mapping) else entries
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, **more) as archive:
        for name, content in pairs:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def forged(signer: dict[str, Any]) -> Callable[..., bytes]:
    """Packages that their author signed, but that `pack` would not make."""

    def make(
        files: list[tuple[Any, bytes]], listed: list[PackedFile] | None = None, **more: Any
    ) -> bytes:
        plain = [(getattr(name, "filename", name), data) for name, data in files]
        fields: dict[str, Any] = {
            "project": "test",
            "job": "tiny",
            "author": AUTHOR,
            "model_digest": MODEL.digest,
            "model_size": MODEL.size,
            "files": tuple(listed if listed is not None else (entry(*pair) for pair in plain)),
        }
        text = PackageManifest(**fields | more).model_dump_json().encode()
        signed = sign(TAG, text, signer["key"], signer["certificate"])
        return zipped([(MANIFEST, text), (SIGNATURE, signed.to_detached()), *files])

    return make


def entry(path: str, data: bytes, **more: Any) -> PackedFile:
    fields = {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return PackedFile(**fields | more)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- what is right ----------------------------------------------------------------------------


def test_round_trip(packed: Pack, opened: Open, tmp_path: Path) -> None:
    found = opened(packed())
    assert (found.author.name, found.author.organisation) == (AUTHOR, "hub")
    assert found.job.name == "tiny"
    assert found.model == MODEL
    assert found.has_code
    target = tmp_path / "unpacked"
    target.mkdir()
    found.extract(target)
    assert tree(target) == FILES
    for path in target.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_job_without_code(packed: Pack, opened: Open) -> None:
    assert not opened(packed({"job.yml": JOB})).has_code


def test_packing_twice_gives_the_same_package(packed: Pack) -> None:
    """So that a submission can be repeated: its package is known by its digest."""
    assert packed() == packed(dict(reversed(FILES.items())))


def test_extracting_needs_an_empty_folder(packed: Pack, opened: Open, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "code").mkdir(parents=True)
    (target / "code" / "job.py").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        opened(packed()).extract(target)
    assert not (tmp_path / "victim").exists()


# ---- what was changed -------------------------------------------------------------------------


def test_any_flipped_byte_is_refused_or_means_nothing(
    packed: Pack, opened: Open, tmp_path: Path
) -> None:
    data = packed()
    refused = 0
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 0x41
        try:
            found = opened(bytes(broken))
        except FLError:
            refused += 1
            continue
        folder = tmp_path / str(place)
        folder.mkdir()
        found.extract(folder)
        assert tree(folder) == FILES, "a time stamp and the like may change"
    assert refused > len(data) / 7 * 0.6


def test_random_garbage_raises_nothing_else(packed: Pack, opened: Open) -> None:
    data = packed()
    for place in range(1, 40):
        for broken in (
            data[: -place * 7],
            data[place * 7 :],
            data[:-22] + os.urandom(22),
            data[: -22 - place] + os.urandom(place) + data[-22:],
            data[:place] + os.urandom(9) + data[place + 9 :],
        ):
            with contextlib.suppress(FLError):
                opened(broken)


def _changes(entries: dict[str, bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    yield "a byte", entries | {"code/job.py": b"Print(1)\n" * 50}
    yield "longer", entries | {"code/job.py": entries["code/job.py"] + b" "}
    yield "shorter", entries | {"code/job.py": entries["code/job.py"][:-1]}
    yield "added", entries | {"code/more.py": b""}
    yield "added beside", entries | {"extra": b""}
    yield "a folder", entries | {"code/empty/": b""}
    yield "removed", {name: data for name, data in entries.items() if name != "code/job.py"}
    renamed = {name: data for name, data in entries.items() if name != "code/job.py"}
    yield "renamed", renamed | {"code/jib.py": entries["code/job.py"]}
    swapped = {"code/job.py": entries["job.yml"], "job.yml": entries["code/job.py"]}
    yield "swapped", entries | swapped
    manifest = entries[MANIFEST].replace(b'"tiny"', b'"tinY"')
    yield "the manifest", entries | {MANIFEST: manifest}
    yield "its layout", entries | {MANIFEST: entries[MANIFEST] + b" "}


@pytest.mark.parametrize("what", [what for what, _ in _changes(FILES | {MANIFEST: b""})])
def test_a_changed_package_is_refused(packed: Pack, opened: Open, what: str) -> None:
    changed = dict(_changes(members(packed())))[what]
    with pytest.raises((InvalidArgumentError, UnauthenticatedError)):
        opened(zipped(changed))


def test_the_order_of_entries_means_nothing(packed: Pack, opened: Open) -> None:
    """The whole file's digest is what a start order pins."""
    data = packed()
    again = opened(zipped(dict(reversed(members(data).items()))))
    assert again.manifest == opened(data).manifest


def test_a_signature_of_another_package_is_refused(packed: Pack, opened: Open) -> None:
    other = packed(FILES | {"code/job.py": b"evil"})
    for swapped in (
        members(packed()) | {SIGNATURE: members(other)[SIGNATURE]},
        members(packed()) | {MANIFEST: members(other)[MANIFEST]},
    ):
        with pytest.raises(UnauthenticatedError, match="does not fit its text"):
            opened(zipped(swapped))


@pytest.mark.parametrize("missing", [(MANIFEST,), (SIGNATURE,), (MANIFEST, SIGNATURE)])
def test_unsigned_packages_are_refused(
    packed: Pack, opened: Open, missing: tuple[str, ...]
) -> None:
    left = {name: data for name, data in members(packed()).items() if name not in missing}
    with pytest.raises(InvalidArgumentError, match="is not signed"):
        opened(zipped(left))


@pytest.mark.parametrize("signature", [b"", b"{}", b"not json", b"\xff"])
def test_an_odd_signature_is_refused(packed: Pack, opened: Open, signature: bytes) -> None:
    with pytest.raises(FLError):
        opened(zipped(members(packed()) | {SIGNATURE: signature}))


# ---- who signed -------------------------------------------------------------------------------


def test_a_manifest_that_names_another_author_is_refused(packed: Pack, opened: Open) -> None:
    with pytest.raises(InvalidArgumentError, match="was packed by bob"):
        opened(packed(author="bob"))


def test_a_package_of_another_project_is_refused(packed: Pack, opened: Open) -> None:
    with pytest.raises(InvalidArgumentError, match="for project 'other'"):
        opened(packed(project="other"))


def test_a_signature_under_another_tag_is_refused(
    packed: Pack, opened: Open, signer: dict[str, Any]
) -> None:
    entries = members(packed())
    signed = sign("start", entries[MANIFEST], signer["key"], signer["certificate"])
    with pytest.raises(UnauthenticatedError, match="does not fit its text"):
        opened(zipped(entries | {SIGNATURE: signed.to_detached()}))


@pytest.mark.parametrize("who", ["server", "site-1"])
def test_only_admins_are_authors(
    packed: Pack, opened: Open, federation: Federation, who: str
) -> None:
    kit = federation.open(who)
    with pytest.raises(UnauthenticatedError, match="not a admin"):
        opened(packed(author=who, key=federation.key(who), certificate=kit.chain))


def test_an_author_of_another_federation_is_refused(
    packed: Pack, opened: Open, tmp_path: Path
) -> None:
    other = provision(tmp_path / "other", admins=(AUTHOR,))
    with pytest.raises(UnauthenticatedError):
        opened(packed(key=other.key(AUTHOR), certificate=other.open(AUTHOR).chain))


def test_a_revoked_author_is_refused(tmp_path: Path, packed: Pack, own: Federation) -> None:
    path = tmp_path / "package.zip"
    fields = {"key": own.key("amy"), "certificate": own.open("amy").chain}
    path.write_bytes(packed(author="amy", **fields))
    open_package(path, own.open("server").trust, NOW)
    own.revoke("amy")
    with pytest.raises(UnauthenticatedError, match="revoked"):
        open_package(path, own.open("server").trust, NOW)


def test_an_expired_author_is_refused(
    tmp_path: Path, packed: Pack, federation: Federation, trust: TrustStore
) -> None:
    path = tmp_path / "package.zip"
    path.write_bytes(packed())
    end = federation.open(AUTHOR).identity.not_after
    with pytest.raises(UnauthenticatedError, match="expired"):
        open_package(path, trust, end + timedelta(seconds=1))
    open_package(path, trust, end - timedelta(seconds=1))


# ---- hostile archives that their author signed --------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../evil.py",
        "code/../../evil.py",
        "code/..",
        "/etc/cron.d/evil",
        "//code/evil.py",
        "code//evil.py",
        "code/./evil.py",
        "./code/evil.py",
        "code/a/",
        "code",
        "code\\evil.py",
        "C:\\evil.py",
        "evil.py",
        "META/evil",
        "code/\x1b[31m",
        "code/a\nb",
        "code/\u202eevil",
        "code/" + "x" * 256,
        "code/" + "é" * 130,
        ".",
    ],
)
def test_paths_that_are_no_plain_files_of_the_job_are_refused(
    forged: Callable[..., bytes], opened: Open, path: str
) -> None:
    data = forged([("job.yml", JOB), (path, b"evil")])
    with pytest.raises(InvalidArgumentError):
        opened(data)


@pytest.mark.parametrize(
    "names",
    [
        ("code/a.py", "code/A.py"),
        ("code/dir/a", "code/DIR/A"),
        ("code/straße", "code/STRASSE"),
        ("code/\u00e9", "code/e\u0301"),
        ("code/a", "code/a/b"),
        ("code/A", "code/a/b"),
    ],
)
def test_names_that_collide_are_refused(
    forged: Callable[..., bytes], opened: Open, names: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidArgumentError, match="differ only in case|file and a folder"):
        opened(forged([("job.yml", JOB), *((name, b"") for name in names)]))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_twice_is_refused(forged: Callable[..., bytes], opened: Open) -> None:
    with pytest.raises(InvalidArgumentError, match="name twice"):
        opened(forged([("job.yml", JOB), ("code/a", b"1"), ("code/a", b"2")]))
    with pytest.raises(InvalidArgumentError, match="differ only in case"):
        opened(forged([("job.yml", JOB)], listed=[entry("job.yml", JOB), entry("job.yml", JOB)]))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_second_manifest_is_refused(packed: Pack, opened: Open) -> None:
    entries = list(members(packed()).items())
    with pytest.raises(InvalidArgumentError, match="name twice"):
        opened(zipped([*entries, (MANIFEST, b"{}")]))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_entries_that_are_not_files_are_refused(
    forged: Callable[..., bytes], opened: Open, kind: int
) -> None:
    info = zipfile.ZipInfo("code/link")
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    with pytest.raises(InvalidArgumentError, match="more than plain files"):
        opened(forged([("job.yml", JOB), (info, b"/etc/passwd")]))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_packing_are_refused(
    forged: Callable[..., bytes], opened: Open, method: int
) -> None:
    info = zipfile.ZipInfo("code/a")
    info.compress_type = method
    with pytest.raises(InvalidArgumentError, match="more than plain files"):
        opened(forged([("job.yml", JOB), (info, b"x" * 100)]))


def test_a_bomb_stops_at_its_declared_size(
    forged: Callable[..., bytes], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declared small, inflates large: no byte more than declared is inflated."""
    bomb = bytes(50 << 20)
    data = forged(
        [("job.yml", JOB), ("code/bomb", bomb)],
        listed=[entry("job.yml", JOB), entry("code/bomb", b"", size=10)],
    )
    assert len(data) < 100_000
    taken: list[int] = []
    read = zipfile.ZipExtFile.read

    def counting(self: zipfile.ZipExtFile, size: int = -1) -> bytes:
        found = read(self, size)
        taken.append(len(found))
        return found

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counting)
    with pytest.raises(InvalidArgumentError, match="larger than it may be"):
        opened(data)
    assert sum(taken) < 100_000


def test_a_bomb_in_the_manifest_stops_at_its_limit(packed: Pack, opened: Open) -> None:
    bomb = bytes(package.MAX_META_BYTES + 1)
    for name in (MANIFEST, SIGNATURE):
        with pytest.raises(InvalidArgumentError, match="larger than it may be"):
            opened(zipped(members(packed()) | {name: bomb}))


def test_what_would_unpack_to_too_much_is_refused_unread(
    forged: Callable[..., bytes], opened: Open
) -> None:
    large = [entry(f"code/{n}", b"", size=package.MAX_FILE_BYTES) for n in range(5)]
    files = [("job.yml", JOB), *((item.path, b"") for item in large)]
    with pytest.raises(InvalidArgumentError, match="unpacks to more than"):
        opened(forged(files, listed=[entry("job.yml", JOB), *large]))


def test_a_table_of_contents_beyond_the_limit_is_refused_unread(
    packed: Pack, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "MAX_FILES", 2)
    with pytest.raises(InvalidArgumentError, match="has 5 entries"):
        opened(packed())
    data = bytearray(packed())
    struct.pack_into("<L", data, len(data) - 10, package.MAX_DIRECTORY_BYTES + 1)
    monkeypatch.undo()
    with pytest.raises(InvalidArgumentError, match="not a job package"):
        opened(bytes(data))


def test_zip64_and_comments_are_refused(packed: Pack, opened: Open) -> None:
    data = packed()
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    with pytest.raises(InvalidArgumentError, match="zip64"):
        opened(data[:-22] + locator + data[-22:])
    commented = bytearray(data + b"hello")
    struct.pack_into("<H", commented, len(data) - 2, 5)
    with pytest.raises(InvalidArgumentError, match="no zip ends"):
        opened(bytes(commented))


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"not a zip" * 100, bytes(22), b"PK\x05\x06" + bytes(18)]
)
def test_what_is_no_zip_is_refused(opened: Open, data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="not a job package|is not signed"):
        opened(data)


# ---- the job in it ------------------------------------------------------------------------------


def test_the_job_must_be_there_and_be_one(packed: Pack, opened: Open) -> None:
    with pytest.raises(ConfigError):
        opened(packed({"code/job.py": b""}))
    with pytest.raises(ConfigError, match="rounds"):
        opened(packed(FILES | {"job.yml": JOB + b"rounds: many\n"}))
    with pytest.raises(InvalidArgumentError, match="different jobs"):
        opened(packed(job="another"))


def test_extract_writes_what_was_verified_or_nothing_odd(
    packed: Pack, opened: Open, tmp_path: Path
) -> None:
    """The file was swapped after it was opened."""
    found = opened(packed())
    found.path.write_bytes(zipped(members(packed()) | {"code/job.py": b"evil", "code/x": b""}))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(InvalidArgumentError, match="not what its author signed|larger"):
        found.extract(target)
    assert b"evil" not in tree(target).values()
    assert "code/x" not in tree(target)


# ---- reading a job folder -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job" / "code" / "lib").mkdir(parents=True)
    (tmp_path / "job" / "job.yml").write_bytes(JOB)
    (tmp_path / "job" / "code" / "job.py").write_text("x")
    (tmp_path / "job" / "code" / "lib" / "a.py").write_text("y")
    return tmp_path / "job"


def test_a_folder_is_read_without_what_is_made_from_it(folder: Path) -> None:
    for noise in ("code/__pycache__/job.pyc", "code/.git/config", "code/b.pyc", "data/x"):
        path = folder / noise
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("noise")
    assert sorted(read_job_folder(folder)) == ["code/job.py", "code/lib/a.py", "job.yml"]


def test_a_folder_without_code(folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    (other / "job.yml").write_bytes(JOB)
    assert read_job_folder(other) == {"job.yml": JOB}


@pytest.mark.parametrize("target", ["file", "folder", "nothing", "code"])
def test_links_are_refused_and_not_left_out(folder: Path, target: str) -> None:
    """A folder that is a link would be missing at the sites, in silence."""
    if target == "code":
        (folder / "code").rename(folder / "elsewhere")
        (folder / "code").symlink_to(folder / "elsewhere")
    else:
        names = {"file": "job.py", "folder": "lib", "nothing": "nowhere"}
        (folder / "code" / "link").symlink_to(folder / "code" / names[target])
    with pytest.raises(ConfigError, match="not a plain file"):
        read_job_folder(folder)


def test_devices_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "code" / "pipe")
    with pytest.raises(ConfigError, match="not a plain file"):
        read_job_folder(folder)


def test_limits_of_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_FILE_BYTES", 0)
    with pytest.raises(ConfigError, match="larger than"):
        read_job_folder(folder)
    monkeypatch.undo()
    monkeypatch.setattr(package, "MAX_FILES", 2)
    with pytest.raises(ConfigError, match="3 files"):
        read_job_folder(folder)
    monkeypatch.undo()
    monkeypatch.setattr(package, "MAX_CODE_BYTES", 10)
    with pytest.raises(ConfigError, match="larger than 10"):
        read_job_folder(folder)
    with pytest.raises(ConfigError, match=r"no job\.yml"):
        read_job_folder(folder / "code")
