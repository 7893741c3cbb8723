"""What every state store must do, run against each implementation."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.core.errors import AlreadyExistsError, ResourceExhaustedError, UnavailableError
from flplatform.core.ports import Row, StateStore
from flplatform.store.state import SqlStateStore
from tests.support.postgres import Cluster
from tests.support.stores import MemoryStateStore


@dataclass
class Subject:
    """A store under test, how to break it, and what it reported as fatal."""

    store: StateStore
    fill_up: Callable[[], None]
    free_up: Callable[[], None]
    break_writes: Callable[[], None]
    fatal: list[BaseException] = field(default_factory=list)


def memory(_request: pytest.FixtureRequest, _folder: Path) -> Subject:
    fatal: list[BaseException] = []
    store = MemoryStateStore(fatal.append)

    def set_full(full: bool) -> None:
        store.full = full

    def break_writes() -> None:
        store.failure = OSError("broken")

    return Subject(store, lambda: set_full(True), lambda: set_full(False), break_writes, fatal)


def sqlite(_request: pytest.FixtureRequest, folder: Path) -> Subject:
    fatal: list[BaseException] = []
    path = folder / "state.db"
    store = SqlStateStore(path, fatal.append)

    def limit_pages(pages: int) -> None:  # a limit that the writer's connection alone has
        store._connection.connection.execute(f"PRAGMA max_page_count={pages}")

    def break_writes() -> None:
        connection = sqlite3.connect(path)
        connection.execute("DROP TABLE events")
        connection.close()

    return Subject(store, lambda: limit_pages(1), lambda: limit_pages(1 << 30), break_writes, fatal)


FILL_UP = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
END $$;
CREATE TRIGGER full_disk BEFORE INSERT ON events EXECUTE FUNCTION refuse();
"""


def postgres(request: pytest.FixtureRequest, _folder: Path) -> Subject:
    cluster: Cluster = request.getfixturevalue("postgres")
    schema = cluster.new_schema()
    fatal: list[BaseException] = []
    store = SqlStateStore(cluster.url(schema), fatal.append)

    def do(text: str) -> Callable[[], None]:
        def act() -> None:
            cluster.execute(text, schema=schema)

        return act

    return Subject(
        store, do(FILL_UP), do("DROP FUNCTION refuse CASCADE"), do("DROP TABLE events"), fatal
    )


MAKERS = (memory, sqlite, postgres)


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    made = request.param(request, tmp_path)
    yield made
    made.store.close()


def row(stream: str, seq: int, body: str = "{}") -> Row:
    return Row(stream, seq, "2026-01-02T03:04:05Z", "Type", 1, body)


def append(store: StateStore, *rows: Row) -> None:
    store.append(rows).result(10)


def append_until_refused(store: StateStore, seq: int) -> None:
    for number in range(seq, seq + 50):
        append(store, row("s", number, "x" * 9000))


def test_what_was_appended_is_read_in_order(subject: Subject) -> None:
    rows = [row("run/1", seq, f'{{"n": {seq}, "text": "Zürich \\u0000 🚀"}}') for seq in (1, 2, 3)]
    append(subject.store, rows[0])
    append(subject.store, *rows[1:])
    assert subject.store.read("run/1") == rows
    assert subject.store.read("run/1", after=2) == rows[2:]
    assert subject.store.read("run/1", after=3) == []
    assert subject.store.read("run/2") == []


def test_one_append_may_span_streams(subject: Subject) -> None:
    append(subject.store, row("federation", 1), row("run/1", 1), row("federation", 2))
    assert [r.seq for r in subject.store.read("federation")] == [1, 2]
    assert [r.seq for r in subject.store.read("run/1")] == [1]


def test_streams_are_listed_by_exact_prefix(subject: Subject) -> None:
    for name in ("run/10", "run/1", "Run/1", "federation", "run_1", "run%"):
        append(subject.store, row(name, 1), row(name, 2))
    assert subject.store.streams("run/") == ["run/1", "run/10"]
    assert subject.store.streams("run%") == ["run%"]
    assert subject.store.streams() == sorted(
        ["run/10", "run/1", "Run/1", "federation", "run_1", "run%"]
    )
    assert subject.store.streams("none") == []


def test_streams_are_counted(subject: Subject) -> None:
    assert subject.store.extents() == {}
    append(subject.store, row("federation", 1), row("run/1", 1), row("federation", 2))
    assert subject.store.extents() == {"federation": (2, 2), "run/1": (1, 1)}


def test_an_empty_append_stores_nothing(subject: Subject) -> None:
    append(subject.store)
    assert subject.store.streams() == []


@pytest.mark.parametrize("seqs", [(1,), (4,), (3, 3), (3, 5), (3, 2), (0,), (-1,)])
def test_a_taken_seq_or_a_gap_is_refused_and_nothing_stored(
    subject: Subject, seqs: tuple[int, ...]
) -> None:
    append(subject.store, row("s", 1), row("s", 2))
    with pytest.raises(AlreadyExistsError):
        append(subject.store, row("other", 1), *(row("s", seq) for seq in seqs))
    assert [r.seq for r in subject.store.read("s")] == [1, 2]
    assert subject.store.read("other") == []
    append(subject.store, row("s", 3), row("other", 1))


def test_a_refused_append_does_not_spoil_its_neighbours(subject: Subject) -> None:
    futures = [
        subject.store.append([row("a", 1)]),
        subject.store.append([row("a", 1), row("b", 1)]),
        subject.store.append([row("b", 2)]),
        subject.store.append([row("a", 2), row("c", 1)]),
        subject.store.append([row("b", 1)]),
    ]
    outcomes = [future.exception(10) for future in futures]
    assert [type(outcome) for outcome in outcomes] == [
        type(None), AlreadyExistsError, AlreadyExistsError, type(None), type(None),
    ]  # fmt: skip
    assert {s: len(subject.store.read(s)) for s in subject.store.streams()} == {
        "a": 2, "b": 1, "c": 1,
    }  # fmt: skip


def test_without_space_an_append_is_refused_and_the_store_lives_on(subject: Subject) -> None:
    append(subject.store, row("s", 1))
    subject.fill_up()
    with pytest.raises(ResourceExhaustedError):
        append_until_refused(subject.store, 2)
    kept = subject.store.read("s")
    assert [r.seq for r in kept] == list(range(1, len(kept) + 1))
    subject.free_up()
    append(subject.store, row("s", len(kept) + 1))
    assert len(subject.store.read("s")) == len(kept) + 1
    assert subject.fatal == []


def test_a_failed_write_is_fatal_and_refuses_everything_after_it(subject: Subject) -> None:
    append(subject.store, row("s", 1))
    subject.break_writes()
    with pytest.raises(UnavailableError, match="has failed"):
        append(subject.store, row("s", 2))
    assert len(subject.fatal) == 1
    with pytest.raises(UnavailableError, match="has failed"):
        append(subject.store, row("s", 2))
    with pytest.raises(UnavailableError, match="has failed"):
        subject.store.read("s")
    with pytest.raises(UnavailableError, match="has failed"):
        subject.store.streams()
    assert len(subject.fatal) == 1


def test_a_closed_store_refuses_and_closes_again(subject: Subject) -> None:
    last = subject.store.append([row("s", 1)])
    subject.store.close()
    assert last.result(0) is None
    with pytest.raises(UnavailableError, match="closed"):
        append(subject.store, row("s", 2))
    with pytest.raises(UnavailableError, match="closed"):
        subject.store.read("s")
    subject.store.close()


def test_a_store_that_can_be_written_tells_of_no_trouble(subject: Subject) -> None:
    append(subject.store, row("s", 1))
    assert subject.store.trouble == ""


def test_an_accepted_append_cannot_be_cancelled(subject: Subject) -> None:
    future = subject.store.append([row("s", 1)])
    assert not future.cancel()
    future.result(10)


def test_many_threads_append_and_read_at_once(subject: Subject) -> None:
    def work(stream: str) -> None:
        for seq in range(1, 31):
            append(subject.store, row(stream, seq))
            assert len(subject.store.read(stream)) == seq

    threads = [Thread(target=work, args=(f"run/{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(subject.store.read(s)) for s in subject.store.streams("run/")] == [30] * 4


BATCHES = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=4), max_size=12
)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@settings(max_examples=40, deadline=None)
@given(batches=BATCHES)
def test_stores_agree_with_a_dict(
    make: Callable[[pytest.FixtureRequest, Path], Subject],
    batches: list[list[tuple[str, int]]],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store = make(request, tmp_path_factory.mktemp("store")).store
    try:
        expected: dict[str, int] = {}
        futures, admitted = [], []
        for batch in batches:
            futures.append(store.append([row(stream, seq) for stream, seq in batch]))
            after = dict(expected)
            fits = True
            for stream, seq in batch:
                fits = fits and seq == after.get(stream, 0) + 1
                after[stream] = seq
            admitted.append(fits)
            expected = after if fits else expected
        assert [future.exception(10) is None for future in futures] == admitted
        found = {stream: [r.seq for r in store.read(stream)] for stream in store.streams()}
        assert found == {stream: list(range(1, n + 1)) for stream, n in expected.items()}
    finally:
        store.close()
