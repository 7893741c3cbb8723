"""The blob store's files: layout, rights, crashes, full disks."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flplatform.core.errors import (
    DataLossError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest
from flplatform.files import durable
from flplatform.files.digest import digest_of
from flplatform.store import blobs, part_file
from flplatform.store.blobs import FileBlobStore
from tests.support.models import model_bytes, small_model

ROOT = Path(__file__).parents[3]
DATA = os.urandom(50_000)
REF = ModelRef(digest_of(DATA), len(DATA))
NAME = REF.digest.removeprefix("blake3:")


def part_of(root: Path, transfer_id: str, ref: ModelRef = REF) -> Path:
    name = ref.digest.removeprefix("blake3:")
    return root / "incoming" / f"{sha256(transfer_id.encode()).hexdigest()}.{name}.part"


def files_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_layout_and_rights(tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    store = FileBlobStore(root)
    writer = store.receive("../t", REF)
    writer.write(DATA[:10])
    assert files_in(root) == [str(part_of(root, "../t").relative_to(root))]
    assert stat.S_IMODE(part_of(root, "../t").stat().st_mode) == 0o600
    writer.write(DATA[10:])
    writer.commit()
    created = store.create(lambda path: path.write_bytes(b"other") and None)
    other = created.digest.removeprefix("blake3:")
    assert files_in(root) == sorted([NAME, other])
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for digest in store.digests():
        assert stat.S_IMODE(store.path(digest).stat().st_mode) == 0o444


def test_a_start_clears_what_nobody_will_finish(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    for transfer_id in ("old", "new"):
        writer = store.receive(transfer_id, REF)
        writer.write(DATA[:10])
        writer.suspend()
    long_ago = time.time() - blobs.KEEP_PARTS_S - 60
    os.utime(part_of(tmp_path, "old"), (long_ago, long_ago))
    (tmp_path / ".tmp-1234-blob").write_bytes(b"half")
    FileBlobStore(tmp_path)
    assert files_in(tmp_path) == [str(part_of(tmp_path, "new").relative_to(tmp_path))]


def test_bytes_are_durable_before_they_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileBlobStore(tmp_path)
    calls: list[str] = []

    def fsync(handle: int) -> None:
        is_dir = stat.S_ISDIR(os.fstat(handle).st_mode)
        calls.append("fsync folder" if is_dir else "fsync file")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    real_fsync, real_replace = os.fsync, os.replace
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, fsync)
    monkeypatch.setattr(os, "replace", replace)
    writer = store.receive("t", REF)
    writer.write(DATA)
    assert calls == []
    writer.commit()
    assert calls == ["fsync file", "rename", "fsync folder"]
    calls.clear()
    store.create(lambda path: path.write_bytes(b"x") and None)
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_a_failed_fsync_is_an_error_and_no_blob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_handle: int) -> None:
        raise OSError(errno.EIO, "broken")

    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    writer.write(DATA)
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, fsync)
    with pytest.raises(OSError, match="broken"):
        writer.commit()
    with pytest.raises(OSError, match="broken"):
        store.create(lambda path: path.write_bytes(DATA) and None)
    assert files_in(tmp_path) == []


def test_after_a_crash_what_is_no_good_is_not_resumed(tmp_path: Path) -> None:
    arrays = small_model()
    data = model_bytes(arrays, tmp_path)
    ref, manifest = ModelRef(digest_of(data), len(data)), Manifest.of(arrays)
    store = FileBlobStore(tmp_path / "blobs")
    part = part_of(tmp_path / "blobs", "t", ref)
    bad_value = bytearray(data)
    bad_value[-16:-8] = np.array(np.nan, "<f8").tobytes()
    for left in (bytes(100), bytes(bad_value), data + b"more"):
        part.write_bytes(left)
        writer = store.receive("t", ref, manifest)
        assert writer.offset == 0
        assert part.stat().st_size == 0
        writer.suspend()
    part.write_bytes(data[:-3])  # cut inside the last value
    writer = store.receive("t", ref, manifest)
    assert writer.offset == len(data) - 3
    writer.write(data[-3:])
    writer.commit()
    assert store.path(ref.digest).read_bytes() == data


RECEIVER = """
import sys
from pathlib import Path
from flplatform.core.messages import ModelRef
from flplatform.store.blobs import FileBlobStore

data = Path(sys.argv[2]).read_bytes()
writer = FileBlobStore(Path(sys.argv[1])).receive("t", ModelRef(sys.argv[3], len(data)))
print(writer.offset, flush=True)
for start in range(writer.offset, len(data), 1000):
    writer.write(data[start:start + 1000])
    print(writer.offset, flush=True)
writer.commit()
print("done", flush=True)
"""


def test_kill_9_loses_no_byte_that_was_counted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = os.urandom(20_000_000)
    source.write_bytes(data)
    root, digest = tmp_path / "blobs", digest_of(data)
    command = [sys.executable, "-c", RECEIVER, str(root), str(source), digest]
    reached, killed = 0, 0
    while True:
        receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert receiver.stdout is not None
        assert int(receiver.stdout.readline()) >= reached
        for _ in range(1000 * (killed + 1)):
            line = receiver.stdout.readline()
            if line == "done\n":
                break
            reached = int(line)
        receiver.send_signal(signal.SIGKILL)
        rest = [line for line in receiver.stdout.read().splitlines(keepends=True) if "\n" in line]
        receiver.stdout.close()
        receiver.wait()
        if "done\n" in (line, *rest):
            break
        killed += 1
        if rest:
            reached = int(rest[-1])
    assert killed >= 2
    assert FileBlobStore(root).path(digest).read_bytes() == data


def test_running_transfers_count_against_the_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=130_000))
    store = FileBlobStore(tmp_path, reserve_bytes=50_000)
    first = store.receive("first", REF)
    with pytest.raises(ResourceExhaustedError, match="50000 bytes are to come, 30000 are free"):
        store.receive("second", REF)
    first.write(DATA[:20_000])  # here the disk's own count would fall
    store.receive("second", REF).discard()
    first.discard()


def test_a_full_disk_keeps_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    writer.write(DATA[:1000])
    monkeypatch.setattr(writer, "_file", FullDisk(writer._file))
    with pytest.raises(ResourceExhaustedError, match="disk is full"):
        writer.write(DATA[1000:])
    writer = store.receive("t", REF)
    assert 1000 <= writer.offset < len(DATA)
    writer.write(DATA[writer.offset :])
    writer.commit()
    assert store.path(REF.digest).read_bytes() == DATA


class FullDisk:
    """A file that takes 100 bytes more."""

    def __init__(self, file: object) -> None:
        self._file = file
        self._left = 100

    def write(self, data: memoryview) -> int:
        if not self._left:
            raise OSError(errno.ENOSPC, "No space left on device")
        count, self._left = self._left, 0
        return self._file.write(data[:count])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_create_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        path.write_bytes(DATA)
        raise OSError(errno.ENOSPC, "No space left on device")

    store = FileBlobStore(tmp_path)
    with pytest.raises(ResourceExhaustedError, match="disk is full"):
        store.create(fill)
    assert files_in(tmp_path) == []


FILLER = """
import os, sys
from pathlib import Path
from flplatform.core.errors import ResourceExhaustedError
from flplatform.core.messages import ModelRef
from flplatform.files import durable
from flplatform.files.digest import digest_of
from flplatform.store.blobs import FileBlobStore

folder = Path(sys.argv[1])
store = FileBlobStore(folder / "blobs")
data = os.urandom(2_500_000)
ref = ModelRef(digest_of(data), len(data))
writer = store.receive("t", ref)
ballast = folder / "ballast"
ballast.write_bytes(bytes(2_000_000))
try:
    for start in range(0, len(data), 100_000):
        writer.write(data[start : start + 100_000])
    sys.exit("it fitted")
except ResourceExhaustedError:
    pass
try:
    store.create(lambda path: path.write_bytes(data) and None)
    sys.exit("it fitted")
except ResourceExhaustedError:
    pass
assert not list((folder / "blobs").glob(".tmp-*"))
ballast.unlink()
writer = store.receive("t", ref)
print(writer.offset)
for start in range(writer.offset, len(data), 100_000):
    writer.write(data[start : start + 100_000])
writer.commit()
assert store.path(ref.digest).read_bytes() == data
"""


def test_a_really_full_disk(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", tmp_path, sys.executable, FILLER]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"]).returncode:
        pytest.skip("no user namespaces here: a small file system cannot be mounted")
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 1_000_000


def test_what_a_transfer_has_left_can_be_forgotten(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    writer.write(DATA[:10])
    store.forget("another")
    writer.suspend()
    assert part_of(tmp_path, "t").exists()
    store.forget("t")
    assert files_in(tmp_path) == []


def test_a_transfer_that_is_forgotten_at_work_leaves_nothing_when_it_breaks(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    writer.write(DATA[:10])
    store.forget("t")
    assert part_of(tmp_path, "t").exists(), "it is at work"
    writer.suspend()
    assert files_in(tmp_path) == []
    again = store.receive("t", REF)
    again.write(DATA[:10])
    again.suspend()
    assert part_of(tmp_path, "t").exists(), "a later one is another matter"


def test_a_transfer_that_is_forgotten_at_work_may_come_to_its_end(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    store.forget("t")
    writer.write(DATA)
    writer.commit()
    assert store.has_whole(REF.digest)


def test_old_parts_are_collected_while_blobs_are_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileBlobStore(tmp_path)
    long_ago = time.time() - blobs.KEEP_PARTS_S - 60
    at_work = store.receive("at work", REF)
    for transfer_id in ("old", "new"):
        store.receive(transfer_id, REF).suspend()
    for transfer_id in ("old", "at work"):
        os.utime(part_of(tmp_path, transfer_id), (long_ago, long_ago))
    store.receive("x", REF).discard()
    assert part_of(tmp_path, "old").exists(), "not yet"
    monkeypatch.setattr(blobs, "SWEEP_S", -1.0)
    store.receive("x", REF).discard()
    assert not part_of(tmp_path, "old").exists()
    assert part_of(tmp_path, "new").exists()
    at_work.write(DATA)
    at_work.commit()
    assert store.has(REF.digest)


def test_room_is_set_aside_in_steps_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_file, "AHEAD_BYTES", 1 << 20)
    data = os.urandom(3 << 20)
    ref = ModelRef(digest_of(data), len(data))
    store = FileBlobStore(tmp_path)
    writer = store.receive("t", ref)
    assert writer.promised_bytes == len(data)
    writer.write(data[:1000])
    if writer.promised_bytes == len(data) - 1000:
        pytest.skip("this file system cannot set room aside")
    assert writer.promised_bytes == len(data) - (1 << 20)
    writer.suspend()
    part = part_of(tmp_path, "t", ref)
    assert part.stat().st_size == 1000
    assert part.stat().st_blocks * 512 < 1 << 20
    writer = store.receive("t", ref)
    for start in range(1000, len(data), 100_000):
        writer.write(data[start : start + 100_000])
        assert writer.promised_bytes <= len(data) - writer.offset
    writer.commit()
    assert store.path(ref.digest).read_bytes() == data


def test_a_kept_part_that_is_damaged_starts_anew_instead_of_blaming_the_sender(
    tmp_path: Path,
) -> None:
    store = FileBlobStore(tmp_path)
    part_of(tmp_path, "t").write_bytes(bytes(1000))  # what a power cut may leave of a part
    writer = store.receive("t", REF)
    assert writer.offset == 1000
    writer.write(DATA[1000:])
    with pytest.raises(UnavailableError, match="interrupted transfer"):
        writer.commit()
    assert files_in(tmp_path) == []
    again = store.receive("t", REF)
    assert again.offset == 0
    again.write(DATA)
    again.commit()
    assert store.path(REF.digest).read_bytes() == DATA


class Failing(part_file.FileIO):
    """A part file of which the calls in `failing` fail, once each."""

    failing: list[str]

    def read(self, size: int = -1) -> bytes:
        self._fail("read")
        return super().read(size) or b""

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if was_open:
            self._fail("close")

    def _fail(self, name: str) -> None:
        if name in self.failing:
            self.failing.remove(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_kept_part_that_cannot_be_read_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every try would meet the same sector."""
    store = FileBlobStore(tmp_path)
    part_of(tmp_path, "t").write_bytes(DATA[:1000])
    monkeypatch.setattr(Failing, "failing", ["read"], raising=False)
    monkeypatch.setattr(part_file, "FileIO", Failing)
    writer = store.receive("t", REF)
    assert writer.offset == 0
    writer.write(DATA)
    writer.commit()
    assert store.path(REF.digest).read_bytes() == DATA


def test_a_part_that_fails_to_close_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system tells only then that a write has failed."""
    store = FileBlobStore(tmp_path)
    monkeypatch.setattr(Failing, "failing", ["close"], raising=False)
    monkeypatch.setattr(part_file, "FileIO", Failing)
    writer = store.receive("t", REF)
    writer.write(DATA[:1000])
    with pytest.raises(OSError, match="Input/output"):
        writer.suspend()
    writer.suspend()
    again = store.receive("t", REF)
    assert again.offset == 1000
    again.suspend()


def test_a_part_that_cannot_be_deleted_holds_up_no_other_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    writer.write(DATA[:1000])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(OSError, match="Input/output"):
            writer.discard()
    again = store.receive("t", REF)
    assert again.offset == 1000
    again.suspend()


AS_OWNER = """
import os, sys
from pathlib import Path
from flplatform.core.messages import ModelRef
from flplatform.store.blobs import FileBlobStore

root, data = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
if os.geteuid() == 0:  # who may open everything
    os.setegid(65534)
    os.seteuid(65534)
writer = FileBlobStore(root).receive("t", ModelRef(sys.argv[3], len(data)))
assert writer.offset == len(data), writer.offset
writer.commit()
"""


def test_a_part_that_was_read_only_already_is_gone_on_with_by_its_owner(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        source, root = Path(folder) / "source", Path(folder) / "blobs"
        source.write_bytes(DATA)
        part = part_of(root, "t")
        part.parent.mkdir(parents=True)
        part.write_bytes(DATA)
        part.chmod(0o444)  # killed between that and the rename
        Path(folder).chmod(0o755)
        if os.geteuid() == 0:
            for path in (root, root / "incoming", part):
                os.chown(path, 65534, 65534)
        subprocess.run(
            [sys.executable, "-c", AS_OWNER, root, source, REF.digest], check=True, cwd=ROOT
        )
        assert (root / NAME).read_bytes() == DATA
        assert stat.S_IMODE((root / NAME).stat().st_mode) == 0o444


def damaged(root: Path) -> FileBlobStore:
    """Return a store that finds a blob on its disk that is not what it was."""
    FileBlobStore(root).create(lambda path: path.write_bytes(DATA) and None)
    path = root / NAME
    path.chmod(0o600)
    path.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    return FileBlobStore(root)


def test_a_damaged_blob_is_named(tmp_path: Path) -> None:
    store = damaged(tmp_path)
    with pytest.raises(DataLossError, match=NAME):
        store.checked(REF.digest)
    assert store.has(REF.digest)  # it is there to be looked at


def test_a_damaged_blob_makes_room_for_another(tmp_path: Path) -> None:
    store = damaged(tmp_path)
    assert not store.has_whole(REF.digest)
    assert not store.has(REF.digest)
    writer = store.receive("t", REF)
    assert writer.offset == 0
    writer.write(DATA)
    writer.commit()
    assert store.has_whole(REF.digest)


def test_a_damaged_blob_is_received_again(tmp_path: Path) -> None:
    writer = damaged(tmp_path).receive("t", REF)
    assert writer.missing_bytes == len(DATA)
    writer.discard()


def test_a_blob_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FileBlobStore(tmp_path).create(lambda path: path.write_bytes(DATA) and None)
    read = []
    real = blobs.demand_digest
    monkeypatch.setattr(
        blobs, "demand_digest", lambda path, digest: (read.append(path), real(path, digest))[1]
    )
    store = FileBlobStore(tmp_path)
    made = store.create(lambda path: path.write_bytes(b"written by this process") and None)
    for _ in range(2):
        assert store.checked(REF.digest) == tmp_path / NAME
        assert store.checked(made.digest)
    assert read == [tmp_path / NAME]
    store.delete(REF.digest)
    with pytest.raises(NotFoundError):
        store.checked(REF.digest)


def test_no_name_is_given_that_cannot_be_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of a descriptor for the folder; the sender comes again."""
    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    writer.write(DATA)
    real, refusals = os.open, [OSError(errno.EMFILE, "Too many open files")]

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECTORY and refusals:
            raise refusals.pop()
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceExhaustedError):
        writer.commit()
    assert not refusals
    assert not store.has(REF.digest)


def test_whoever_comes_again_after_a_failed_sync_has_the_name_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileBlobStore(tmp_path)
    writer = store.receive("t", REF)
    writer.write(DATA)
    synced: list[int] = []

    def sync(handle: int, data_only: bool = False) -> None:
        if not data_only:
            synced.append(handle)
            if len(synced) == 1:
                raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable, "sync", sync)
    with pytest.raises(ResourceExhaustedError):
        writer.commit()
    assert store.receive("t", REF).missing_bytes == 0
    assert len(synced) == 2


def test_what_cannot_be_read_now_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FileBlobStore(tmp_path).create(lambda path: path.write_bytes(DATA) and None)
    store = FileBlobStore(tmp_path)

    def fail(path: Path, digest: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(blobs, "demand_digest", fail)
    with pytest.raises(UnavailableError, match="cannot be read"):
        store.has_whole(REF.digest)
    monkeypatch.undo()
    assert store.has_whole(REF.digest)


def test_a_copy_that_cannot_be_read_makes_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FileBlobStore(tmp_path).create(lambda path: path.write_bytes(DATA) and None)
    store = FileBlobStore(tmp_path, copies=True)

    def fail(errno_: int) -> None:
        def demand(path: Path, digest: str) -> None:
            raise OSError(errno_, os.strerror(errno_))

        monkeypatch.setattr(blobs, "demand_digest", demand)

    fail(errno.EMFILE)
    with pytest.raises(ResourceExhaustedError):
        store.has_whole(REF.digest)
    assert store.has(REF.digest), "it is the process that is short of something"
    fail(errno.EIO)
    assert not store.has_whole(REF.digest)
    assert not store.has(REF.digest)


def test_what_can_be_received_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=130_000))
    store = FileBlobStore(tmp_path, reserve_bytes=60_000)
    assert store.free_bytes() == 70_000
    writer = store.receive("t", REF)
    assert store.free_bytes() == 20_000
    writer.discard()
    assert FileBlobStore(tmp_path, reserve_bytes=150_000).free_bytes() == -20_000


def test_many_who_need_a_blob_read_it_once_and_no_late_verdict_takes_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real, read = damaged(tmp_path), blobs.demand_digest, []

    def slowly(path: Path, digest: str) -> None:
        read.append(path)
        time.sleep(0.05)
        real(path, digest)

    monkeypatch.setattr(blobs, "demand_digest", slowly)

    def receive_again(number: int) -> None:
        writer = store.receive(f"t{number}", REF)
        if writer.missing_bytes:
            writer.write(DATA[writer.offset :])
        writer.commit()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(receive_again, range(8)))
    assert len(read) == 1
    assert (tmp_path / NAME).read_bytes() == DATA


def test_a_foreign_file_is_no_blob(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    blob = store.create(lambda path: path.write_bytes(b"bytes") and None)
    for name in ("README", "0" * 63, "A" * 64, ".hidden"):
        (tmp_path / name).write_text("about this folder")
    assert store.digests() == [blob.digest]
