import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.hci.escape import MAX_LINE, escape, escape_lines

anything = st.text(st.characters())  # surrogates included


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cleveland", "cleveland"),
        ("Zürich – 日本 😀", "Zürich – 日本 😀"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\u2028b\udc80", "a\\u2028b\\udc80"),
    ],
)
def test_what_a_terminal_would_obey_is_made_visible(text, shown):
    assert escape(text) == shown


def test_length_is_bounded():
    assert escape("x" * 300) == "x" * 199 + "…"
    assert escape("x" * 10, 10) == "x" * 10
    assert len(escape("\x1b" * 10, 10)) == 10
    assert len(escape_lines("y" * 10_000)) == MAX_LINE


def test_lines_stay_lines_and_tabs_become_spaces():
    assert escape_lines("a\tb\r\n\x1bc\n") == "a       b\n\\x1bc"
    assert escape_lines("a\rb") == "a\\rb"


@given(anything, st.integers(1, 50))
def test_no_control_character_ever_gets_through(text, limit):
    shown = escape(text, limit)
    assert len(shown) <= limit
    assert shown.isprintable()
    assert escape_lines(text).replace("\n", "").isprintable()


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200))
def test_plain_text_is_unchanged(text):
    assert escape(text) == text
