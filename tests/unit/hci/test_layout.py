import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from flplatform.hci.layout import Cell, Column, paragraph, table, wrap


def column(title: str, *texts: str, numeric: bool = False) -> Column:
    return Column(title, [Cell(text) for text in texts], numeric)


def plain(*columns: Column, width: int = 80, notes: tuple[str, ...] = ()) -> list[str]:
    return [line.plain for line in table(columns, width, notes)]


def test_with_room_every_column_has_its_width():
    assert plain(column("A", "x", "yy"), column("N", "1", "10", numeric=True)) == [
        "A    N",
        "x    1",
        "yy  10",
    ]


def test_the_widest_text_wraps_at_words_and_numbers_stay_whole():
    reason = "the deadline passed before the quorum was reached"
    lines = plain(column("RUN", "123456", numeric=True), column("REASON", reason), width=30)
    assert lines == [
        "   RUN  REASON",
        "123456  the deadline passed",
        "        before the quorum was",
        "        reached",
    ]


def test_a_word_that_is_too_long_is_cut_and_says_so():
    lines = plain(
        column("N", "1", numeric=True), column("FILE", "a" * 40), column("M", "2"), width=20
    )
    assert "aaa…  2" in lines[1]
    assert all(len(line) <= 20 for line in lines)


def test_columns_that_do_not_fit_follow_in_a_second_block():
    sites = [column(f"site-number-{i}", ".750", ".730", numeric=True) for i in range(6)]
    lines = plain(column("owner", "a", "b"), *sites, width=50)
    assert lines[0] == "owner  site-number-0  site-number-1  site-number-2"
    assert lines[3:5] == ["", "owner  site-number-3  site-number-4  site-number-5"]


def test_a_note_stands_below_its_row():
    lines = plain(
        column("T", "a", "b"),
        notes=("refused: rule role member: shell is not granted", ""),
        width=30,
    )
    assert lines == [
        "T",
        "a",
        "    refused: rule role member:",
        "    shell is not granted",
        "b",
    ]


def test_a_mark_does_not_shift_its_column():
    columns = [Column("x", [Cell(".5", "", "*"), Cell(".25")], numeric=True)]
    assert [line.plain for line in table(columns, 80)] == ["  x", " .5*", ".25"]


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("short", ["short"]),
        ("plan      one two three four", ["plan      one two", "          three four"]),
        ("  indented words that go on", ["  indented words that", "  go on"]),
        ("https://example.org/a/very/long/word", ["https://example.org/a/very/long/word"]),
    ],
)
def test_a_paragraph_hangs_below_its_text(line, lines):
    assert paragraph(line, 21).split("\n") == lines


@given(st.text(), st.integers(1, 30))
def test_wrapping_loses_no_word(text, width):
    assert " ".join(wrap(text, width)).split() == text.split()


@given(
    st.lists(
        st.tuples(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=2, max_size=2)),
        min_size=1,
        max_size=6,
    ),
    st.integers(40, 100),
)
def test_no_line_of_a_table_is_wider_than_its_room(texts, width):
    columns = [column(_clean(title), *map(_clean, cells)) for title, cells in texts]
    for line in table(columns, width):
        assert cell_len(line.plain) <= width


def _clean(text: str) -> str:
    return "".join(filter(str.isprintable, text))
