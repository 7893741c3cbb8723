import errno
import itertools
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flplatform.core.errors import DataLossError, FailedPreconditionError
from flplatform.core.ports import AuditSink
from flplatform.security import audit
from flplatform.security.audit import AuditLog, Head, records, verify
from flplatform.security.audit_files import unfinished_bytes

AMY = {"name": "amy", "role": "lead", "organisation": "a", "fingerprint": "f", "peer": "1.2.3.4"}


def write(path: Path, count: int, first: int = 1) -> None:
    log = AuditLog(path, "server")
    for number in range(first, first + count):
        log.record(AMY, "abort", "allowed", target=f"run {number}", correlation_id=str(number))
    log.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    write(path, 5)
    return path


def test_a_log_is_a_sink(path: Path) -> None:
    log = AuditLog(path, "server")
    sink: AuditSink = log
    sink.record(AMY, "view", "denied", reason="role", details={"run": "3"})
    log.close()
    assert list(records(path))[-1]["details"] == {"run": "3"}


def test_records_say_who_did_what_when(path: Path) -> None:
    first = next(records(path))
    assert first["actor"] == "amy"
    assert {key: first[key] for key in ("role", "organisation", "fingerprint", "peer")} == {
        key: value for key, value in AMY.items() if key != "name"
    }
    assert (first["seq"], first["action"], first["target"]) == (1, "abort", "run 1")
    assert (first["log"], first["decision"], first["correlation_id"]) == ("server", "allowed", "1")
    assert first["time"].endswith("+00:00")
    assert first["monotonic_s"] > 0
    assert first["prev"] == "0" * 64


def test_files_are_private(path: Path) -> None:
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_chain_continues_over_restarts(path: Path) -> None:
    write(path, 3, first=6)
    assert verify(path).seq == 8
    assert [record["seq"] for record in records(path)] == list(range(1, 9))


def test_odd_text_is_escaped_and_bounded(path: Path) -> None:
    log = AuditLog(path, "server")
    nasty = 'x"}\n{"seq": 9\r\x1b[2J\0\u2028\ud800' + "y" * 5000
    log.record({"name": nasty}, nasty, nasty, details={nasty: nasty, **dict.fromkeys("abc", "")})
    log.close()
    assert verify(path).seq == 6
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 7
    assert all(0x20 <= byte < 0x7F for byte in lines[5])
    assert list(records(path))[-1]["action"].startswith('x"}\n{"seq": 9\r\x1b[2J\0')
    assert len(lines[5]) < 20_000


def edit(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b"run 3", b"run 4"), *lines[3:]]


def reseal(lines: list[bytes]) -> list[bytes]:
    record = json.loads(lines[2])
    del record["hash"]
    record["target"] = "run 4"
    return [*lines[:2], audit._seal(record)[0], *lines[3:]]


def reseal_last(lines: list[bytes]) -> list[bytes]:
    record = json.loads(lines[4])
    del record["hash"]
    record["target"] = "run 4"
    return [*lines[:4], audit._seal(record)[0]]


TAMPERED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "edit": (edit, ":3: this record was changed"),
    "edit and hash again": (reseal, ":4: does not continue the record before"),
    "edit and hash the last": (reseal_last, ":5: record 5 is not the one that was written"),
    "delete first": (lambda lines: lines[1:], ":1: record 2 follows record 0"),
    "delete inside": (lambda lines: lines[:2] + lines[3:], ":3: record 4 follows record 2"),
    "reorder": (lambda s: [s[0], s[2], s[1], *s[3:]], ":2: record 3 follows record 1"),
    "repeat": (lambda lines: [*lines, lines[-1]], ":6: record 5 follows record 5"),
    "insert": (lambda lines: [*lines[:3], b"{}\n", *lines[3:]], ":4: this record was changed"),
    "cut the tail": (lambda lines: lines[:-1], "ends with record 4, but record 5 was written"),
    "cut everything": (lambda _: [], "ends with record 0, but record 5 was written"),
    "tear the tail": (lambda s: [*s[:4], s[4][:-20]], "with record 4, but record 5 was written"),
    "other line ends": (lambda s: [line[:-1] + b"\r\n" for line in s], ":1: this record was"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_noticed(path: Path, case: str) -> None:
    change, complaint = TAMPERED[case]
    with path.open("rb") as file:
        lines = list(file)
    path.write_bytes(b"".join(change(lines)))
    with pytest.raises(DataLossError) as caught:
        verify(path)
    assert complaint in str(caught.value)


def test_a_missing_file_is_noticed(path: Path) -> None:
    path.unlink()
    with pytest.raises(DataLossError, match="record 5 was written"):
        verify(path)
    with pytest.raises(DataLossError, match="record 5 was written"):
        AuditLog(path, "server")


def test_opening_a_cut_or_damaged_log_fails(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    with pytest.raises(DataLossError, match="ends with record 4"):
        AuditLog(path, "server")
    path.write_bytes(whole.replace(b"run 5", b"run 6"))
    with pytest.raises(DataLossError, match="the end of .* this record was changed"):
        AuditLog(path, "server")
    path.write_bytes(whole)
    AuditLog(path, "server").close()


def test_a_torn_record_is_moved_aside_and_the_repair_recorded(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"seq": 6, "monoto')
    write(path, 1)
    assert verify(path).seq == 7
    (torn,) = path.parent.glob("*.torn-*")
    assert torn.read_bytes() == b'{"seq": 6, "monoto'
    repair = list(records(path))[5]
    assert (repair["action"], repair["target"]) == ("audit.repair", torn.name)


def test_the_head_may_lag_after_a_power_cut(path: Path) -> None:
    head = path.with_name("audit.jsonl.head")
    record = list(records(path))[2]
    head.write_bytes(audit._head_text(Head(3, record["hash"])))
    assert verify(path).seq == 5
    head.write_bytes(audit._head_text(Head(3, "0" * 64)))
    with pytest.raises(DataLossError, match="record 3 is not the one that was written"):
        verify(path)


def test_rotation_keeps_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for start in (1, 11):
        log = AuditLog(path, "server", rotate_bytes=1500)
        for number in range(start, start + 10):
            log.record(AMY, "abort", "allowed", target=str(number))
        log.close()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[:3] == ["audit.jsonl", "audit.jsonl.000001", "audit.jsonl.000002"]
    assert verify(path).seq == 20
    assert [record["target"] for record in records(path)] == [str(n) for n in range(1, 21)]
    (tmp_path / "audit.jsonl.000002").unlink()
    with pytest.raises(DataLossError, match="follows record"):
        verify(path)


def fail(call: str, times: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let some of the calls of `os.open` or `os.rename` find the disk full."""
    real, calls = getattr(os, call), itertools.count()

    def full(*args: object, **more: object) -> object:
        if next(calls) in times:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **more)

    monkeypatch.setattr(os, call, full)


@pytest.mark.parametrize(("call", "at"), [("open", 0), ("open", 1), ("rename", 0), ("rename", 1)])
def test_where_no_new_file_can_be_begun_the_old_one_goes_on(
    path: Path, call: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path, "server", rotate_bytes=1)
    before = sorted(path.parent.iterdir())
    with monkeypatch.context() as patch:
        fail(call, range(at, at + 1), patch)
        log.record(AMY, "abort", "allowed", target="full")  # it is durable
    assert sorted(path.parent.iterdir()) == before
    with (path.parent / "other").open("wb") as other:  # takes a number that was free
        log.record(AMY, "abort", "allowed", target="after")
        assert os.fstat(other.fileno()).st_size == 0
    log.close()
    assert [record["target"] for record in records(path)][-2:] == ["full", "after"]
    assert verify(path).seq == 7
    assert path.with_name("audit.jsonl.000001").exists()


def test_a_log_that_cannot_be_put_back_takes_no_more_records(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path, "server", rotate_bytes=1)
    with monkeypatch.context() as patch:
        fail("rename", range(1, 9), patch)
        log.record(AMY, "abort", "allowed", target="full")
    with pytest.raises(OSError, match="an earlier write failed"):
        log.record(AMY, "abort", "allowed", target="after")
    log.close()
    assert verify(path).seq == 6
    write(path, 1)
    assert verify(path).seq == 7


def test_a_missing_head_is_noticed(path: Path) -> None:
    path.with_name("audit.jsonl.head").unlink()
    with pytest.raises(DataLossError, match=r"audit\.jsonl\.head is missing"):
        verify(path)


def test_what_was_never_acknowledged_is_no_damage(path: Path) -> None:
    assert unfinished_bytes(path) == 0
    with path.open("ab") as file:
        file.write(b'{"seq": 6, "monoto')
    assert verify(path).seq == 5
    assert unfinished_bytes(path) == 18


def test_a_second_process_is_kept_out(path: Path) -> None:
    log = AuditLog(path, "server")
    with pytest.raises(FailedPreconditionError, match="open in another process"):
        AuditLog(path, "server")
    log.close()
    AuditLog(path, "server").close()


def test_a_full_disk_raises_and_leaves_the_chain_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path, "server")
    real = os.write

    def half(handle: int, data: bytes) -> int:
        real(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            log.record(AMY, "abort", "allowed")
        patch.setattr(os, "write", lambda handle, data: real(handle, data[:10]))
        with pytest.raises(OSError, match="the disk took 10 of") as caught:
            log.record(AMY, "abort", "allowed")
        assert caught.value.errno == errno.ENOSPC
    log.record(AMY, "abort", "allowed", target="after")
    log.close()
    assert verify(path).seq == 6


def test_after_a_failed_fsync_nothing_more_is_accepted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path, "server")

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            log.record(AMY, "abort", "allowed")
    with pytest.raises(OSError, match="an earlier write failed"):
        log.record(AMY, "abort", "allowed")
    log.close()


def test_a_closed_log_refuses(path: Path) -> None:
    log = AuditLog(path, "server")
    log.close()
    with pytest.raises(OSError, match="closed"):
        log.record(AMY, "abort", "allowed")


def test_threads_share_a_log(path: Path) -> None:
    log = AuditLog(path, "server")
    threads = [threading.Thread(target=log.record, args=(AMY, "x", "allowed")) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.head.seq == 45
    log.close()
    assert verify(path).seq == 45
