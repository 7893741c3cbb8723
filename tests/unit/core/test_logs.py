"""Log lines: what is taken from elsewhere, which words mean what, what stays together."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.admin.modules.logs import LogsArguments
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.logs import (
    MAX_TEXT,
    LogLine,
    LogsWanted,
    SiteLines,
    clean,
    earliest,
    line_of,
    records,
    stamp,
)
from flplatform.hci import CommandSpec, parse

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
TIME = "2026-05-01T12:00:00.000Z"

SPEC = CommandSpec(
    name="logs",
    summary="",
    arguments=LogsArguments,
    handler=None,
    permission="view",
    mutating=False,
    examples=("logs 3",),
)


# ---- words: the console's grammar and a site read the same

WORDS = st.sampled_from(
    ["3", "+3", "0", "-1", "site-1", "site-2", "-f", "--follow", "--lines", "--lines=5", "-n",
     "-n=7", "--since", "--since=10m", "2026-01-01", "--grep", "--grep=", "--grep=-x", "loss",
     "--server", "--server=1", "--", "-ff", "-", "-.5", "all", "10m", "--lin", ""]
)  # fmt: skip


@given(st.lists(WORDS, max_size=8))
def test_a_site_reads_what_the_console_has_read(words):
    try:
        expected = parse(words, SPEC).wanted
    except InvalidArgumentError:
        return
    assert LogsWanted.of(["logs", *words]) == expected


@pytest.mark.parametrize(
    "words",
    ["", "x", "0", "3 --lines", "3 --lines -1", "3 --nonsense", "3 --since soon", "3 -f -f"],
)
def test_other_words_are_refused(words):
    with pytest.raises(InvalidArgumentError):
        LogsWanted.of(["logs", *words.split()])


@pytest.mark.parametrize(
    ("words", "server", "sites"),
    [
        ("3", True, ["a", "b"]),
        ("3 a", False, ["a"]),
        ("3 --server", True, []),
        ("3 b --server", True, ["b"]),
    ],
)
def test_whose_lines_are_wanted(words, server, sites):
    wanted = LogsWanted.of(["logs", *words.split()])
    assert wanted.server_too is server
    assert [site for site in ("a", "b") if wanted.reaches(site)] == sites
    assert wanted.reaches_any is bool(sites)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("90s", stamp(NOW - timedelta(seconds=90))),
        ("10m", stamp(NOW - timedelta(minutes=10))),
        ("2h", stamp(NOW - timedelta(hours=2))),
        ("1d", stamp(NOW - timedelta(days=1))),
        ("2026-05-01T11:00", "2026-05-01T11:00:00.000Z"),
        ("2026-05-01T11:00:00+02:00", "2026-05-01T09:00:00.000Z"),
    ],
)
def test_since(text, expected):
    assert earliest(text, NOW) == expected


@pytest.mark.parametrize("text", ["soon", "10", "m", "999999d", "2026-13-01", "-5m", "٣m"])
def test_since_that_is_no_time(text):
    with pytest.raises(ValueError, match="is not 90s"):
        earliest(text, NOW)


# ---- lines from sites are untrusted


@pytest.mark.parametrize(
    "entry",
    [
        None, "text", 5, [], [TIME, "job"], [TIME, "job", "x", "y"], [TIME, "job", 5],
        [TIME, None, "x"], ["yesterday", "job", "x"], [TIME, "job |", "x"], [TIME, "", "x"],
        [TIME, "j" * 17, "x"], [TIME + "\n", "job", "x"], {"time": TIME},
        ["9999999999-05-01T12:00:00.000Z", "job", "x"],
    ],
)  # fmt: skip
def test_what_is_no_line(entry):
    assert line_of("a", entry) is None


def test_a_line_cannot_forge_another_one():
    text = f"x\n{TIME} server event | finished\x1b[2J\r\x00\x85\u2028\tend"
    line = line_of("a", [TIME, "job", text])
    assert line.text == f"x?{TIME} server event | finished?[2J????\tend"
    assert str(line).count("\n") == 0


def test_a_line_is_bounded():
    assert len(line_of("a", [TIME, "job", "x" * 10_000_000]).text) == MAX_TEXT


@given(st.text())
def test_clean_text_is_one_line(text):
    assert len(clean(text).splitlines()) <= 1


def test_an_answer_of_anything():
    assert SiteLines.of("a", {}) == SiteLines()
    assert SiteLines.of("a", {"lines": 5, "following": 1, "cut": "yes"}) == SiteLines()
    good = [TIME, "job", "x"]
    answer = SiteLines.of("a", {"lines": [good, 7, good], "following": True})
    assert [line.text for line in answer.lines] == ["x", "x"]
    assert answer.following


# ---- records


def lines(*texts, who="job"):
    return [LogLine(TIME, "a", who, text) for text in texts]


def test_a_traceback_is_one_record():
    found = lines(
        "before",
        "Traceback (most recent call last):",
        '  File "job.py", line 3, in train',
        "    raise ValueError(x)",
        "ValueError: x",
        "after",
    )
    assert [len(group) for group in records(found)] == [1, 4, 1]


def test_records_end_with_their_speaker():
    assert [len(group) for group in records([*lines("a"), *lines("  b", who="run")])] == [1, 1]
    assert list(records([])) == []


@given(st.lists(st.sampled_from(["x", "  y", "Traceback (most recent call last):", ""])))
def test_records_lose_nothing(texts):
    found = lines(*texts)
    assert [line for group in records(found) for line in group] == found


def test_a_record_of_several_lines_has_a_head_on_each():
    line = LogLine(TIME, "server", "event", "failed\n  trace")
    assert str(line) == f"{TIME} server event | failed\n{TIME} server event |   trace"
