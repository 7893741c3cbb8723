"""Every damage is found, and named."""

import base64
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flplatform.core import events as ev
from flplatform.core.errors import NotFoundError
from flplatform.core.ports import Row
from flplatform.files.lock import held
from flplatform.security.audit import AuditLog, KitSeal
from flplatform.server.upkeep import history
from flplatform.server.upkeep.findings import Finding
from flplatform.server.upkeep.place import Place, needs_of
from flplatform.server.upkeep.streams import GAPLESS
from flplatform.server.upkeep.verify import verify_state
from tests.support.golden import rows as golden_rows

Sql = Callable[..., None]


def problems(place: Place, deep: bool = False) -> list[Finding]:
    return verify_state(place, deep).problems


def the_one(place: Place, deep: bool = False) -> str:
    """The one problem of a state, as it is shown."""
    (found,) = problems(place, deep)
    return str(found)


def rows_of(place: Place, stream: str, kind: type[ev.Event]) -> list[Row]:
    with place.snapshot() as log:
        return [row for row in log.read(stream) if row.type == kind.__name__]


def change(sql: Sql, row: Row, **fields: object) -> None:
    """Change fields of an event's body."""
    body = json.dumps(json.loads(row.body) | fields).replace("'", "''")
    sql(f"UPDATE events SET body='{body}' WHERE stream='{row.stream}' AND seq={row.seq}")


def test_a_sound_state(place: Place) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}
    report = verify_state(place, deep=True)
    assert not report.findings
    assert (report.runs, report.audit_records) == (2, 5)
    assert report.events > 25
    assert report.blobs > 10
    after = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}
    for path in (place.folder / "events.db", place.folder / "audit.jsonl"):
        assert before[path] == after[path]
    assert before.keys() <= after.keys()


# ---- the log


def test_a_missing_event(place: Place, sql: Sql) -> None:
    sql("DELETE FROM events WHERE stream='run/1' AND seq IN (4, 5)")
    assert the_one(place).startswith("run/1 #4: I1 gapless stream: events 4 to 5 are missing;")


def test_a_missing_first_event(place: Place, sql: Sql) -> None:
    sql("DELETE FROM events WHERE stream='run/2' AND seq=1")
    assert the_one(place).startswith("run/2 #1: I1 gapless stream: event 1 is missing;")


def test_an_unreadable_event(place: Place, sql: Sql) -> None:
    sql("UPDATE events SET body='{\"round\": \"one\"}' WHERE stream='run/1' AND seq=6")
    assert the_one(place).startswith("run/1 #6: readable event: ")


def test_an_event_of_a_newer_release(place: Place, sql: Sql) -> None:
    sql("UPDATE events SET version=9 WHERE stream='run/1' AND seq=6")
    assert "use the release that wrote it" in the_one(place)


def test_a_time_that_is_none(place: Place, sql: Sql) -> None:
    sql("UPDATE events SET time='noon' WHERE stream='run/1' AND seq=6")
    assert the_one(place).startswith("run/1 #6: readable event: ")


def test_a_result_accepted_twice(place: Place, sql: Sql) -> None:
    first, second = rows_of(place, "run/1", ev.UpdateAccepted)[:2]
    sql(f"UPDATE events SET body='{first.body}' WHERE stream='run/1' AND seq={second.seq}")
    found = [str(each) for each in problems(place)]
    task = json.loads(first.body)["task_id"]
    assert found[0].startswith(
        f"run/1 #{second.seq}: I2 accepted once: task {task} was accepted in #{first.seq} already;"
    )
    assert any("I3 closed set: no update of" in each for each in found)


def test_a_closed_round_that_counts_what_was_not_accepted(place: Place, sql: Sql) -> None:
    row = rows_of(place, "run/1", ev.RoundClosed)[1]
    contributions = json.loads(row.body)["contributions"]
    contributions[1]["digest"] = contributions[0]["digest"]
    change(sql, row, contributions=contributions)
    assert the_one(place).startswith(f"run/1 #{row.seq}: I3 closed set: round 2 counts blake3:")
    change(sql, row, contributions=contributions[:1])
    assert "the accepted update of b is not counted in round 2" in the_one(place)
    change(sql, row, contributions=[*contributions[:1], contributions[1] | {"site": "c"}])
    assert [each.rule for each in problems(place)] == ["I3 closed set"] * 2


def test_a_model_without_a_closed_round(place: Place, sql: Sql) -> None:
    row = rows_of(place, "run/1", ev.ModelPublished)[1]
    change(sql, row, round=1)
    assert any(
        str(each).startswith(f"run/1 #{row.seq}: I3 published model: a model of round 1, which")
        for each in problems(place)
    )


def test_rounds_out_of_order(place: Place, sql: Sql) -> None:
    row = rows_of(place, "run/1", ev.RoundOpened)[1]
    change(sql, row, round=1)
    assert str(problems(place)[0]).startswith(
        f"run/1 #{row.seq}: I4 round order: round 1 was opened after round 1;"
    )


def test_events_after_the_end(place: Place, sql: Sql) -> None:
    (row,) = rows_of(place, "run/1", ev.RunEnded)
    sql(
        "INSERT INTO events SELECT stream, seq + 1, time, type, version, body FROM events "
        f"WHERE stream='run/1' AND seq={row.seq}"
    )
    assert the_one(place).startswith(f"run/1 #{row.seq + 1}: I6 one end: RunEnded after")


def test_events_that_do_not_fit_together(place: Place, sql: Sql) -> None:
    (row,) = rows_of(place, "run/1", ev.StepStarted)
    change(sql, row, index=99)  # replay itself does not look
    assert not problems(place)
    opened = rows_of(place, "run/1", ev.RoundOpened)[0]
    sql(
        f"UPDATE events SET type='{row.type}', body='{row.body}' "
        f"WHERE stream='run/1' AND seq={opened.seq}"
    )
    assert any(each.rule == "replay" for each in problems(place))


def test_a_number_without_a_stream_and_the_reverse(place: Place, sql: Sql) -> None:
    sql("UPDATE events SET stream='run/7' WHERE stream='run/2'")
    found = "\n".join(str(each) for each in problems(place))
    assert "federation #3: run numbers: run 2 has a number, but no stream;" in found
    assert "run/7 #1: run numbers: RunOpened is of run 2;" in found
    assert "run/7: run numbers: the federation gave no such number;" in found


def test_a_number_given_twice(place: Place, sql: Sql) -> None:
    first, second = rows_of(place, "federation", ev.RunNumbered)
    change(sql, second, run=1)
    texts = [str(each) for each in problems(place)]
    assert f"federation #{second.seq}: run numbers: number 1 was given twice" in texts[0]
    change(sql, second, submission_id=json.loads(first.body)["submission_id"])
    assert any("became run 2, and run 1 before" in str(each) for each in problems(place))


def test_a_summary_that_lies(place: Place, sql: Sql) -> None:
    (row,) = rows_of(place, "federation", ev.RunSummarised)
    change(sql, row, status="failed")
    assert the_one(place).startswith(
        f"federation #{row.seq}: summary: run 1 was summed up as ('failed', 'all steps done', 3"
    )
    change(sql, row, run=5)
    assert "RunSummarised of run 5, which has no number" in the_one(place)
    change(sql, row)
    early = json.dumps(json.loads(row.body) | {"run": 2})
    sql(f"INSERT INTO events VALUES ('federation', 4, '{row.time}', '{row.type}', 1, '{early}')")
    assert "#4: summary: run 2 was summed up as finished, but its stream has no" in the_one(place)


def test_the_log_of_another_place(place: Place, sql: Sql) -> None:
    sql("DELETE FROM events")
    shown = the_one(place)
    assert shown.startswith("event log: I1 database: it is empty, but there are ")
    assert "another state_url" in shown
    for path in place.blobs.root.glob("?" * 64):
        path.unlink()
    assert not problems(place)  # people sign in before anything is submitted
    audit = AuditLog(place.folder / "audit.jsonl", "server", seal=KitSeal(place.kit))
    audit.record({"name": "lead"}, "submit", "allowed")
    audit.close()
    assert "it is empty, but the audit tells of 1 submissions" in the_one(place)


def test_a_strange_stream(place: Place, sql: Sql) -> None:
    sql("UPDATE events SET stream='run/02' WHERE stream='run/2'")
    assert any(str(each).startswith("run/02: streams: ") for each in problems(place))


def test_a_damaged_database(place: Place) -> None:
    path = place.folder / "events.db"
    data = bytearray(path.read_bytes())
    data[4096:12288] = os.urandom(8192)
    path.write_bytes(data)
    assert any(each.rule == "I1 database" for each in problems(place))
    path.write_bytes(b"not a database at all, but a text" * 100)
    assert any(each.rule == "I1 database" for each in problems(place))


def test_no_log(place: Place) -> None:
    (place.folder / "events.db").unlink()
    shown = str(problems(place)[0])
    assert f"there is no event log {place.folder}/events.db, but there are " in shown
    assert "another state_url" in shown
    shutil.rmtree(place.folder)
    with pytest.raises(NotFoundError, match="was a server started"):
        verify_state(place)


def test_a_flipped_bit_in_a_signed_order(place: Place, sql: Sql) -> None:
    (row,) = rows_of(place, "run/1", ev.RunOpened)
    envelope = json.loads(base64.b64decode(json.loads(row.body)["order"]))
    for name in ("payload", "signature", "certificate"):
        text = envelope[name]
        at = len(text) // 2
        spoilt = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        order = base64.b64encode(json.dumps(envelope | {name: spoilt}).encode()).decode()
        change(sql, row, order=order)
        assert the_one(place).startswith("run/1 #1: signed order: ")
    change(sql, row, order="?")
    assert the_one(place).startswith("run/1 #1: signed order: ")
    (other,) = rows_of(place, "run/2", ev.RunOpened)
    change(sql, row, order=json.loads(other.body)["order"])
    assert "signed order: the order is for submission" in the_one(place)
    blob = json.loads(row.body)["job_blob"] | {"digest": f"blake3:{'0' * 64}"}
    change(sql, row, job_blob=blob)
    assert any("signed order: the order is to start" in str(each) for each in problems(place))


# ---- blobs


def blob_of(place: Place, run: int) -> Path:
    needs = needs_of(place.history())
    digest = next(key for key, need in needs.items() if need.runs[:1] == (run,) and need.is_model)
    return place.blobs.file(digest)


def test_a_missing_blob(place: Place) -> None:
    path = blob_of(place, 2)
    path.unlink()
    assert the_one(place).startswith(
        f"blob blake3:{path.name}: blob is there: it is missing, run 2 needs it; put it back"
    )


def test_foreign_files_are_named(place: Place) -> None:
    (place.blobs.root / "README").write_text("about this folder")
    (place.blobs.root / "README").chmod(0o444)
    report = verify_state(place)
    assert not report.problems
    assert "blobs/README: foreign file: it is no blob" in str(report.notes[0])
    assert all("README" not in digest for digest in place.blobs.digests())


def test_a_cut_blob(place: Place) -> None:
    path = blob_of(place, 1)
    os.truncate(path, 20)
    assert f"blob blake3:{path.name}: I5 blob size: it has 20 bytes" in the_one(place)


def test_a_flipped_bit_is_found_by_reading(place: Place) -> None:
    path = blob_of(place, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o444)
    assert not problems(place)
    assert f"blob blake3:{path.name}: I5 blob digest: " in the_one(place, deep=True)


def test_what_nobody_needs_is_information(place: Place) -> None:
    blobs = place.folder / "blobs"
    (blobs / ("0" * 64)).write_bytes(b"upload")
    (blobs / ("0" * 64)).chmod(0o444)
    (blobs / "incoming" / "x.part").write_bytes(b"half")
    (place.folder / ".tmp-1-users.json").write_bytes(b"{")
    report = verify_state(place)
    assert not report.problems
    assert [note.rule for note in report.notes] == [
        "unreferenced blob",
        "partial upload",
        "temporary file",
    ]


def test_a_run_that_was_deleted_needs_nothing(place: Place, sql: Sql) -> None:
    deleted = ev.RunDeleted(run=1, by="lead").model_dump_json()
    sql(
        "INSERT INTO events SELECT stream, max(seq) + 1, time, 'RunDeleted', 1, "
        f"'{deleted}' FROM events WHERE stream='federation'"
    )
    needs = needs_of(place.history())
    assert {need.runs for need in needs.values()} == {(2,)}


# ---- files and the audit


@pytest.mark.parametrize(
    ("name", "mode", "advice"),
    [
        ("state/users.json", 0o640, "chmod 600"),
        ("state/metrics", 0o755, "chmod 700"),
        ("state/blobs", 0o701, "chmod 700"),
    ],
)
def test_rights(place: Place, name: str, mode: int, advice: str) -> None:
    (place.kit.folder / name).chmod(mode)
    shown = the_one(place)
    assert shown.startswith(f"{name}: rights: mode {mode:04o} lets others in")
    assert advice in shown


def test_a_blob_that_can_be_written(place: Place) -> None:
    blob_of(place, 1).chmod(0o644)
    assert "a blob is never written again" in the_one(place)


def test_a_link(place: Place) -> None:
    (place.folder / "metrics" / "out").symlink_to("/etc/passwd")
    assert "state/metrics/out: rights: is a symbolic link" in the_one(place)


def test_a_torn_file(place: Place) -> None:
    (place.folder / "users.json").write_text('{"a": ')
    assert the_one(place).startswith("state/users.json: I5 whole file: not JSON")


def test_the_audit(place: Place) -> None:
    path = place.folder / "audit.jsonl"
    text = path.read_text()
    path.write_text(text.replace("command 2", "command 9"))
    assert "I7 audit chain: " in the_one(place)
    assert "audit.jsonl:3: this record was changed or cut" in the_one(place)
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    shown = the_one(place)
    assert "ends with record 4, but record 5 was written" in shown
    assert shown.count("keep the evidence") == 1
    path.unlink()
    assert "there is no audit" in the_one(place)


def test_an_audit_whose_end_nobody_can_vouch_for(place: Place) -> None:
    for end in ("head", "checkpoint"):
        (place.folder / f"audit.jsonl.{end}").unlink()
    assert "audit.jsonl.head is missing" in the_one(place)


def test_an_unfinished_record_is_no_damage(place: Place) -> None:
    with (place.folder / "audit.jsonl").open("ab") as file:
        file.write(b'{"seq": 6, "mono')
    report = verify_state(place)
    assert (report.problems, report.audit_records) == ([], 5)
    assert "its last record is unfinished (16 bytes) and was never" in str(report.notes[0])


def test_a_forged_checkpoint(place: Place) -> None:
    (place.folder / "audit.jsonl.checkpoint").write_text("{}")
    assert "is not a checkpoint" in the_one(place)


def test_whether_a_server_runs_is_known_by_its_lock(place: Place) -> None:
    assert not place.running
    with held(place.lock, "the kit"):
        assert place.running
    assert not place.running


# ---- any damage


def streams(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.stream, []).append(row)
    return found


GOLDEN = [
    replace(row, body=re.sub(r'("(?:digest|wire)":")([0-9a-f]{64})"', r'\1blake3:\2"', row.body))
    for row in golden_rows()
]
"""Its digests are made up; here they look like digests."""


def test_the_golden_log_is_sound() -> None:
    checked = history.check_log(streams(GOLDEN))
    for found in checked.findings:  # the golden log holds one run's number of two
        assert not found.problem or found.rule == history.NUMBERS


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_lost_event_is_always_named(data: st.DataObject) -> None:
    """All but the last of a stream: that it was ever there, nothing else can say."""
    lasts = {row.stream: row.seq for row in GOLDEN}
    row = data.draw(st.sampled_from([row for row in GOLDEN if row.seq < lasts[row.stream]]))
    checked = history.check_log(streams([each for each in GOLDEN if each != row]))
    assert any(
        (each.where, each.seq, each.rule) == (row.stream, row.seq, GAPLESS)
        for each in checked.findings
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_damage_stops_the_check(data: st.DataObject) -> None:
    damaged = list(GOLDEN)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        other = data.draw(st.sampled_from(GOLDEN))
        row = damaged[at]
        damaged[at] = data.draw(
            st.sampled_from(
                [
                    replace(row, type=other.type, body=other.body),
                    replace(row, body=other.body),
                    replace(row, body=row.body[: len(row.body) // 2]),
                    replace(row, version=other.version + 1),
                    replace(row, time=""),
                    replace(row, stream=other.stream),
                ]
            )
        )
    by_stream = {
        name: sorted(rows, key=lambda row: row.seq) for name, rows in streams(damaged).items()
    }
    checked = history.check_log(by_stream)
    needs_of(checked)
    assert checked.count <= len(GOLDEN)
