"""The run's log: bounded in every direction."""

import json
import re

import pytest

from flplatform.client import run_log
from flplatform.client.run_log import MAX_LINE_BYTES, Mark, RunLog, mark, tail

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.log"


def texts(path):
    return [re.sub(f"^{TIME} ", "", line) for line in path.read_text().splitlines()]


def test_lines(path):
    log = RunLog(path)
    log.note("process starts")
    log.feed(b"one\ntw")
    log.feed(b"o\r\n\x1b[31mred \xff\ttab\n\nlast")
    log.close()
    assert texts(path) == [
        "run | process starts",
        "job | one",
        "job | two",
        "job | ?[31mred �\ttab",
        "job | ",
        "job | last",
    ]
    assert log.tail == "one\ntwo\n?[31mred �\ttab\n\nlast"
    assert path.stat().st_mode & 0o777 == 0o600
    log.note("too late")


def test_it_is_continued(path):
    for number in (1, 2):
        log = RunLog(path)
        log.note(str(number))
        log.close()
    assert texts(path) == ["run | 1", "run | 2"]


def test_long_lines_are_cut(path):
    log = RunLog(path)
    log.feed(b"x" * (3 * MAX_LINE_BYTES + 1))
    log.feed(b"y" * 2 * MAX_LINE_BYTES + b"\n")
    log.close()
    assert max(len(text) for text in texts(path)) <= MAX_LINE_BYTES + len("job | ")
    assert sum(text.count("x") for text in texts(path)) == 3 * MAX_LINE_BYTES + 1


def test_size_is_bounded(path):
    log = RunLog(path, max_bytes=10_000)
    for number in range(1000):
        log.feed(b"%d %s\n" % (number, b"x" * 50))
    log.close()
    assert sorted(item.name for item in path.parent.iterdir()) == ["run.log", "run.log.1"]
    assert all(item.stat().st_size <= 10_000 for item in path.parent.iterdir())
    numbers = [
        int(text.split()[2])
        for file in (f"{path}.1", path)
        for text in texts(path.with_name(str(file).rpartition("/")[2]))
    ]
    assert numbers == list(range(numbers[0], 1000))


def test_a_full_disk_loses_lines_and_says_so(path, monkeypatch):
    log = RunLog(path)
    file = log._file

    class Full:
        closed = False

        def tell(self):
            return 0

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "_file", Full())
    log.feed(b"one\ntwo\n")
    log.note("three")
    monkeypatch.setattr(log, "_file", file)
    log.feed(b"four\n")
    log.close()
    assert texts(path) == ["job | 4 lines lost: the disk was full", "job | four"]


# ---- reading the end


def logged(path, count, max_bytes=10_000):
    log = RunLog(path, max_bytes=max_bytes)
    for number in range(count):
        log.feed(b"line %d\n" % number)
    log.close()


def last(path, lines=10, max_bytes=1 << 20, end=None, **options):
    return tail(path, end or mark(path), lines=lines, max_bytes=max_bytes, **options)


def test_the_end_of_both_files(path):
    logged(path, 300)
    found, cut = last(path, 280)
    assert [text for _, _, text in found] == [f"line {number}" for number in range(20, 300)]
    assert not cut
    assert {who for _, who, _ in found} == {"job"}
    assert len(path.read_text().splitlines()) < 280  # both were read


def test_the_older_file_is_read_to_its_beginning(path):
    logged(path, 200)
    found, _ = last(path, 1000)
    assert [text for _, _, text in found] == [f"line {number}" for number in range(200)]


def test_the_end_is_bounded_in_bytes_and_says_so(path):
    logged(path, 100)
    found, cut = last(path, 100, max_bytes=600)
    assert cut
    assert sum(len(json.dumps(entry)) for entry in found) <= 600
    assert found[-1][2] == "line 99"
    assert last(path, 0) == ([], False)


def test_only_what_is_wanted(path):
    logged(path, 100)
    found, _ = last(path, 3, grep="7")
    assert [text for _, _, text in found] == ["line 78", "line 79", "line 87", "line 97"][-3:]
    assert last(path, earliest="2999-01-01T00:00:00.000Z") == ([], False)


def test_what_comes_after_the_mark_is_not_read(path):
    logged(path, 5)
    end = mark(path)
    logged(path, 5)
    assert [text for _, _, text in last(path, end=end)[0]] == [f"line {n}" for n in range(5)]


def test_a_new_file_begun_since_the_mark(path):
    logged(path, 100)
    end = mark(path)
    logged(path, 250)  # the marked file is the older one by now
    found, _ = last(path, 5, end=end)
    assert [text for _, _, text in found] == [f"line {number}" for number in range(95, 100)]
    assert last(path, 5, end=Mark(0, 100)) == ([], False)  # of a file that is gone


def test_there_is_no_log(path):
    assert mark(path) is None


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_of_any_size(path, monkeypatch, block):
    monkeypatch.setattr(run_log, "BLOCK_BYTES", block)
    logged(path, 30)
    with path.open("ab") as file:
        file.write(b"torn by a full disk")
    assert [text for _, _, text in last(path, 3)[0]] == ["line 27", "line 28", "line 29"]


# ---- listening


def test_lines_are_heard_as_they_are_written(path):
    heard = []
    log = RunLog(path, on_lines=lambda time, who, texts: heard.append((who, list(texts))))
    log.note("process starts")
    log.feed(b"one\ntw")
    log.feed(b"o\n\x1b[2J\n")
    log.close()
    assert heard == [("run", ["process starts"]), ("job", ["one"]), ("job", ["two", "?[2J"])]
