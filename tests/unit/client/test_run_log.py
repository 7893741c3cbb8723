"""The run's log: bounded in every direction."""

import re

import pytest

from flplatform.client.run_log import MAX_LINE_BYTES, RunLog

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
