import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import FLError, PermissionDeniedError, UnauthenticatedError
from flplatform.security.audit import AuditLog, records, verify
from flplatform.security.refused_calls import OTHERS, Refused, RefusedCalls, Tally

DEADLINE_S = 20.0
NO_TOKEN = UnauthenticatedError("the call has no token")
DENIED = PermissionDeniedError("no", rule="r")


class Sink:
    """An audit on a disk that can be held, and be full."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.writing = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.written = threading.Semaphore(0)

    def record(self, actor: Mapping[str, str], action: str, decision: str, **more: Any) -> None:
        self.writing.set()
        assert self.free.wait(DEADLINE_S)
        try:
            if self.failure is not None:
                raise self.failure
            more = more["details"] | {"reason": more["reason"]}
            self.records.append({**actor, "action": action, "decision": decision, **more})
        finally:
            self.written.release()

    def wait(self) -> None:
        """Wait until one more record was tried."""
        assert self.written.acquire(timeout=DEADLINE_S)

    @property
    def counts(self) -> list[int]:
        return [int(each["times"]) for each in self.records]


class Clock:
    """Monotonic seconds that pass when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def calls(sink: Sink, **more: Any) -> Iterator[RefusedCalls]:
    """Refused calls whose writer has ended in the end."""
    made = RefusedCalls(sink, **more)
    try:
        yield made
    finally:
        sink.free.set()
        made.close()


# ---- the writer ---------------------------------------------------------------------------------


def test_a_refusal_is_recorded_at_once() -> None:
    sink = Sink()
    with calls(sink) as refused:
        refused.note("a", "/m", "peer", DENIED)
        sink.wait()
    (record,) = sink.records
    first = record.pop("first")
    assert record == {
        "name": "a",
        "role": "",
        "peer": "peer",
        "action": "/m",
        "decision": "refused",
        "reason": "no (rule: r)",
        "times": "1",
        "last": first,
    }


def test_nobody_waits_for_a_slow_disk_and_nothing_is_lost() -> None:
    sink = Sink()
    sink.free.clear()
    with calls(sink) as refused:
        refused.note("a", "/m", "peer", DENIED)
        assert sink.writing.wait(DEADLINE_S)
        for _ in range(1000):  # returns although nothing can be written
            refused.note("a", "/m", "peer", DENIED)
        refused.note("b", "/m", "peer", DENIED)
        assert sink.records == []
    assert {each["name"] for each in sink.records} == {"a", "b"}
    assert sum(sink.counts) == 1002
    assert len(sink.records) == 3


def test_what_follows_is_one_record_an_interval() -> None:
    sink, clock = Sink(), Clock()
    with calls(sink, clock=clock) as refused:
        refused.note("a", "/m", "peer", DENIED)
        sink.wait()
        for number in range(500):
            refused.note("a", "/m", f"peer {number}", DENIED)
        clock.now += 60.0
        refused.note("a", "/m", "last peer", DENIED)
        sink.wait()
        assert sink.counts == [1, 501]
        assert sink.records[1]["peer"] == "last peer"
        assert sink.records[1]["first"] >= sink.records[0]["last"]
    assert sink.counts == [1, 501]


def test_a_full_disk_loses_none_of_them_and_is_said_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink, clock = Sink(), Clock()
    sink.failure = OSError("no space")
    with calls(sink, clock=clock) as refused:
        for name in ("a", "b", "a", "c"):
            refused.note(name, "/m", "peer", DENIED)
        sink.wait()
        clock.now += 60.0
        refused.note("a", "/m", "peer", DENIED)
        sink.wait()
        sink.failure = None
        clock.now += 60.0
        refused.note("a", "/m", "peer", DENIED)
    assert sum(sink.counts) == 6
    by_name = {each["name"]: int(each["times"]) for each in sink.records}
    assert by_name == {"a": 4, "b": 1, "c": 1}
    said = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert 1 <= len(said) <= 2
    assert all("the audit cannot be written" in each for each in said)
    assert "the audit can be written again" in caplog.text


def test_what_cannot_be_recorded_in_the_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    sink.failure = OSError("no space")
    with calls(sink) as refused:
        for _ in range(7):
            refused.note("a", "/m", "peer", DENIED)
    assert "7 refused calls are not in the audit" in caplog.text


def test_a_defect_ends_neither_the_writer_nor_the_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = Sink()
    with calls(sink) as refused:
        sink.failure = ZeroDivisionError()
        refused.note("a", "/m", "peer", DENIED)
        sink.wait()
        sink.failure = None
        refused.note("b", "/m", "peer", DENIED)
        sink.wait()
    assert [each["name"] for each in sink.records] == ["b"]
    assert "1 refused calls of a are not in the audit" in caplog.text


def test_the_chain_holds(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, "server")
    refused = RefusedCalls(audit)
    for number in range(300):
        refused.note(f"site-{number % 3}", "/m", "peer", DENIED)
        audit.record({"name": "amy"}, "abort", "allowed")
    refused.close()
    audit.close()
    assert verify(path).seq == len(list(records(path)))
    counted = [int(each["details"]["times"]) for each in records(path) if each["details"]]
    assert sum(counted) == 300
    assert len(counted) <= 6


# ---- counting -----------------------------------------------------------------------------------


def note(tally: Tally, name: str, now: float = 0.0, error: FLError = DENIED) -> Refused:
    return tally.note(name, "/m", "peer", error, now, f"at {now}")


def test_callers_methods_and_rules_are_counted_apart() -> None:
    tally = Tally(60.0, 100)
    for error in (DENIED, NO_TOKEN, UnauthenticatedError("no token either")):
        for name in ("a", "b"):
            note(tally, name, error=error)
    tally.note("a", "/n", "peer", DENIED, 0.0, "")
    assert sorted(each.times for each in tally.take(0.0)) == [1, 1, 1, 2, 2]


def test_who_has_no_name_is_told_apart_by_the_certificate() -> None:
    tally = Tally(60.0, 100)
    for name in ("a", "a", "b"):
        note(tally, "", error=UnauthenticatedError(f"the certificate of {name} is revoked"))
    taken = tally.take(0.0)
    assert [(each.name, each.times, each.reason[-12:]) for each in taken] == [
        ("unknown", 2, "a is revoked"),
        ("unknown", 1, "b is revoked"),
    ]


def test_beyond_the_bound_all_are_counted_as_one() -> None:
    tally = Tally(60.0, 3)
    for number in range(1000):
        note(tally, f"site-{number}", error=PermissionDeniedError("x" * 10_000, rule="r"))
    assert len(tally._kept) == 4
    taken = tally.take(0.0)
    assert [each.times for each in taken] == [1, 1, 1, 997]
    assert (taken[-1].name, taken[-1].method) == (OTHERS, OTHERS)
    assert taken[-1].reason.startswith("site-999: /m: xxx")
    assert all(len(each.reason) < 1024 for each in taken)


def test_who_stops_calling_is_forgotten() -> None:
    tally = Tally(60.0, 1)
    note(tally, "a")
    assert [each.name for each in tally.take(0.0)] == ["a"]
    assert tally.take(59.0) == []
    assert tally.pause(59.0) == 1.0
    assert tally.take(60.0) == []
    assert tally.pause(60.0) is None
    assert note(tally, "b", 61.0).name == "b"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("note"), st.sampled_from("abcdef")),
            st.tuples(st.sampled_from(["take", "fail"]), st.floats(0, 100)),
        ),
        max_size=60,
    )
)
def test_every_refusal_is_counted_once(story: list[tuple[str, Any]]) -> None:
    tally, now, noted, recorded = Tally(60.0, 3), 0.0, 0, 0
    firsts: dict[str, float] = {}
    for what, value in story:
        if what == "note":
            noted += 1
            note(tally, value, now)
            continue
        now += value
        taken = tally.take(now)
        if what == "fail":
            tally.put_back(taken)
        else:
            recorded += sum(each.times for each in taken)
            for each in taken:
                first = float(each.first[3:])
                assert firsts.get(str(each.key), -1.0) <= first <= float(each.last[3:])
                firsts[str(each.key)] = first
        assert len(tally._kept) <= 4
        assert recorded + tally.times == noted
