"""Reading an audit from its end, and the signed checkpoints behind which no tail can be cut."""

import dataclasses
import errno
import json
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from flplatform.core.errors import DataLossError
from flplatform.security import audit, audit_files, audit_query
from flplatform.security.audit import AuditLog, KitSeal, newest, records, verify
from flplatform.security.audit_query import AuditQuestion, answer
from tests.support.federation import provision

AMY = {"name": "amy", "role": "lead", "organisation": "a"}
BOB = {"name": "bob"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return provision(tmp_path_factory.mktemp("audit"))


@pytest.fixture
def seal(federation):
    return KitSeal(federation.open("site-1"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def write(path, count, seal=None, **options):
    log = AuditLog(path, "site-1", seal=seal, **options)
    for number in range(count):
        who = BOB if number % 5 == 0 else AMY
        log.record(who, "abort", "allowed", target=str(number), details={"order": f"{number:04}"})
    return log


@pytest.mark.parametrize("block", [1, 7, 400, 1 << 20])
@pytest.mark.parametrize("rotate", [1000, 1 << 20])
def test_backwards_is_forwards_reversed(path, monkeypatch, block, rotate):
    monkeypatch.setattr(audit_files, "_BLOCK_BYTES", block)
    write(path, 9, rotate_bytes=rotate).close()
    if block == 1:
        monkeypatch.setattr(audit_files, "_BLOCK_BYTES", 50)
    assert list(newest(path)) == list(records(path))[::-1]


def test_a_record_that_is_being_written_is_left_out(path):
    write(path, 3).close()
    with path.open("ab") as file:
        file.write(b'{"seq": 4, "half')
    assert [record["seq"] for record in newest(path)] == [3, 2, 1]


def test_questions(path):
    write(path, 20).close()

    def asked(**fields):
        return [int(r["target"]) for r in answer(path, AuditQuestion(**fields)).records]

    assert asked(last=3) == [19, 18, 17]
    assert asked(user="bob") == [15, 10, 5, 0]
    assert asked(action="start") == asked(decision="denied") == []
    assert asked(order="001", last=2) == [19, 18]
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert asked(since=soon.isoformat()) == []
    assert len(asked(since=(soon - timedelta(hours=2)).isoformat())) == 20
    for last in (0, 1001):
        with pytest.raises(ValidationError):
            AuditQuestion(last=last)


def test_answers_are_bounded_and_say_so(path, monkeypatch):
    write(path, 20).close()
    monkeypatch.setattr(audit_query, "MAX_ANSWER_BYTES", 1000)
    found = answer(path, AuditQuestion())
    assert 0 < len(found.records) < 5
    assert "narrow the question" in found.note
    monkeypatch.setattr(audit_query, "MAX_SCANNED", 3)
    assert "only the last 3 records" in answer(path, AuditQuestion(user="nobody")).note


def test_a_changed_record_is_named(path):
    write(path, 3).close()
    path.write_bytes(path.read_bytes().replace(b'"target": "1"', b'"target": "7"'))
    with pytest.raises(DataLossError, match="was changed"):
        answer(path, AuditQuestion())


def test_a_cut_tail_behind_a_checkpoint_is_found_though_the_head_was_written_anew(path, seal):
    write(path, 5, seal).close()
    assert verify(path, seal).seq == 5
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    last = json.loads(lines[2])
    head = path.with_name("audit.jsonl.head")
    head.write_text(f"{3:020d} {last['hash']}\n")
    assert verify(path).seq == 3  # without the checkpoint nothing is seen
    with pytest.raises(DataLossError, match="record 5 was written"):
        verify(path, seal)


def test_a_rewritten_log_does_not_fit_its_checkpoint(path, seal, tmp_path):
    write(path, 5, seal).close()
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "audit.jsonl"
    write(other, 6).close()
    for name in ("audit.jsonl", "audit.jsonl.head"):
        (tmp_path / name).write_bytes((other.parent / name).read_bytes())
    assert verify(path).seq == 6
    with pytest.raises(DataLossError, match=":5: record 5 is not the one that was signed"):
        verify(path, seal)


def test_a_checkpoint_of_another_host_or_none_is_found(path, seal, federation, monkeypatch):
    monkeypatch.setattr(audit, "CHECKPOINT_EVERY", 4)
    log = write(path, 9, seal)
    checkpoint = path.with_name("audit.jsonl.checkpoint")
    assert json.loads(audit.Signed.from_bytes(checkpoint.read_bytes()).payload)["seq"] == 8
    log.close()
    assert verify(path, seal).seq == 9
    foreign = KitSeal(federation.open("site-2"))
    text = audit.Signed.from_bytes(checkpoint.read_bytes()).payload
    checkpoint.write_bytes(foreign.sign(text).to_bytes())
    with pytest.raises(DataLossError, match="is not a checkpoint"):
        verify(path, seal)
    checkpoint.write_bytes(b"{}")
    with pytest.raises(DataLossError, match="is not a checkpoint"):
        verify(path, seal)
    checkpoint.unlink()
    with pytest.raises(DataLossError, match="was taken away"):
        verify(path, seal)


def last_checkpoint(caplog):
    (said,) = [each for each in caplog.records if "no checkpoint of record" in each.getMessage()]
    return said.levelname


@pytest.mark.parametrize("gone", ["kit", "state"])
def test_at_the_end_a_missing_folder_is_not_told_as_an_error_of_its_own(
    tmp_path, federation, caplog, gone
):
    """Why it is missing was told before, as the error that ends the process."""
    kit = shutil.copytree(federation.open("site-1").folder, tmp_path / "kit")
    (tmp_path / "state").mkdir()
    seal = KitSeal(dataclasses.replace(federation.open("site-1"), folder=kit))
    log = write(tmp_path / "state" / "audit.jsonl", 3, seal)
    shutil.move(tmp_path / gone, tmp_path / "elsewhere")
    log.close()
    assert last_checkpoint(caplog) == "WARNING"


def test_another_failure_of_the_last_checkpoint_is_an_error(path, seal, monkeypatch, caplog):
    log = write(path, 3, seal)
    monkeypatch.setattr(audit, "write_atomic", full)
    log.close()
    assert last_checkpoint(caplog) == "ERROR"


def test_a_key_that_is_missing_while_the_log_goes_on_is_an_error(path, seal, monkeypatch, caplog):
    monkeypatch.setattr(audit, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(KitSeal, "sign", missing)
    log = write(path, 3, seal)
    assert last_checkpoint(caplog) == "ERROR"
    log.close()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def missing(*_):
    raise FileNotFoundError(errno.ENOENT, "No such file or directory")
