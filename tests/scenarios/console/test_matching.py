import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scenarios.console.matching import draft, matches, update
from tests.scenarios.console.screen import Screen
from tests.scenarios.console.transcript import Step, Transcript

LINES = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"))), max_size=5)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("3 ok          0.04 s", "3 ok          {seconds}"),
        ("no reply after 2.0 s", "no reply after 2.0 s"),
        ("a  0.4 s   365 d", "a  {seconds} {days}"),
        ("hungary .746 0.7481234567890 *", "hungary {number} {number}        *"),
        ("uploaded 18.2 kB · run 2", "uploaded {bytes} · run 2"),
        ("since 2024-05-01 12:04:10Z", "since {time}"),
        ("signed by admin@example.org, 2024-05-01", "signed by admin@example.org, {date}"),
        (
            "blake3:0123… blake3:0123456789abcdef 0.1.0",
            "blake3:0123… {digest}                {version}",
        ),
        ("steps 1/2 training", "steps 1/2 training"),
    ],
)
def test_what_differs_becomes_a_placeholder(line, expected):
    assert draft(line) == expected
    assert matches([draft(line)], [line])


@given(LINES)
def test_a_draft_matches_what_it_was_made_of(lines):
    assert matches([draft(line) for line in lines], lines)


@given(LINES, LINES)
def test_an_update_matches_and_keeps_what_matched(old, new):
    assert matches(update(old, new), new)
    assert update(update(old, new), new) == update(old, new)


def test_an_update_keeps_lines_that_still_hold():
    old = ["{any} is here", "{number} ok", "gone"]
    assert update(old, ["x is here", "new 1 s", "3 ok"]) == ["{any} is here", "new {seconds}",
                                                             "{number} ok"]  # fmt: skip


def test_a_gap_is_any_number_of_lines():
    assert matches(["a", "…", "z"], ["a", "z"])
    assert matches(["a", "…", "z"], ["a", "b", "c", "z"])
    assert not matches(["a", "…", "z"], ["a", "b"])
    assert not matches(["a"], ["a", "b"])


def test_an_unlike_line_does_not_match():
    assert not matches(["{seconds}"], ["soon"])
    assert not matches(["a {number}"], ["a"])


def shown(*pieces: str) -> list[str]:
    screen = Screen()
    for piece in pieces:
        screen.feed(piece)
    return screen.lines


def test_a_screen():
    assert shown("ab\r\ncd") == ["ab", "cd"]
    assert shown("abc\rx") == ["xbc"]
    assert shown("\x1b[1;31mred\x1b", "[0m") == ["red"]
    assert shown("one\r\ntwo\x1b[1A\x1b[2K\rthree") == ["three", "two"]
    assert shown("abc\x1b[2D\x1b[K") == ["a"]
    assert shown("a\r\nb\r\nc\x1b[2A\r\x1b[J") == [""]
    assert shown("\x1b]0;title\x07a\x1b[?25l\x1b[6n") == ["a"]
    assert shown("a\x1b[H\x1b[2Jb") == ["a", "b"]
    assert shown("a\x1b[3Cb\x1b[?2004h") == ["a   b"]


@given(st.text(), st.integers(0, 50))
def test_a_screen_does_not_care_where_its_input_is_cut(text, at):
    assert shown(text) == shown(text[:at], text[at:])


def test_a_transcript_is_read_as_it_was_written(tmp_path):
    steps = [
        Step("!", "stop slow"),
        Step(">", "shutdown server", ["sure? [y/N]", "< n", "", "  nothing was done"]),
        Step(">", "bye"),
    ]
    Transcript("x", steps, ["# stage: ending"]).save(tmp_path)
    read = Transcript.load(tmp_path / "x.txt")
    assert (read.stage, read.steps) == ("ending", steps)
    assert read.steps[1].answers == ["n"]
    (tmp_path / "x.txt").write_text("what is this")
    with pytest.raises(ValueError, match="x.txt:1"):
        Transcript.load(tmp_path / "x.txt")
