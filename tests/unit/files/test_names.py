import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import InvalidArgumentError
from flplatform.files.names import check_component, check_path, collision

BAD = [
    "",
    ".",
    "..",
    "../x",
    "..%2f",
    "%2e%2e",
    "%252e%252e%252f",
    "..\\x",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "-rf",
    "--help",
    ".hidden",
    "a.",
    "a ",
    " a",
    "C:",
    "CON:x",
    "a*",
    "a?",
    "a|b",
    "a<b",
    "‮txt.exe",
    "e\u0301",
    "\ud800",
    "a" * 256,
    "é" * 128,
]


@pytest.mark.parametrize("name", BAD)
def test_names_that_could_mean_a_place_are_refused(name):
    with pytest.raises(InvalidArgumentError):
        check_component(name)


@pytest.mark.parametrize("name", ["a", "run-7.csv", "Übung 1.txt", "x" * 255, "_", "~", "$HOME"])
def test_plain_names_are_taken(name):
    assert check_component(name) == name


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "a//b", "a/", "/", "a/../b", "a/./b", "a/-b", "a/.b", "//a", "a/%2e%2e/b",
     "a/" * 40 + "b", "/".join(["x" * 100] * 3), "~/../x", *BAD],
)  # fmt: skip
def test_paths_that_leave_or_hide_are_refused(path):
    with pytest.raises(InvalidArgumentError):
        check_path(path)


def test_a_path_is_its_components():
    assert check_path("runs/7/metrics.csv") == ("runs", "7", "metrics.csv")


@given(st.text(max_size=300))
def test_whatever_is_taken_stays_below_any_folder(text):
    try:
        parts = check_path(text)
    except InvalidArgumentError:
        return
    assert "/".join(parts) == text
    assert len(text.encode()) <= 255
    for part in parts:
        assert part not in ("", ".", "..")
        assert part[0] not in ".-"
        assert not set("/\\%\0") & set(part)
        assert part.isprintable()
        assert unicodedata.normalize("NFC", part) == part


@pytest.mark.parametrize(
    ("path", "other"),
    [("A", "a"), ("a/b", "A/c"), ("a", "a/b"), ("a/b", "a"), ("straße", "STRASSE"), ("x/Y", "x/y")],
)
def test_names_that_cannot_lie_side_by_side(path, other):
    assert collision(path, ["z", other]) == other


def test_names_that_can():
    assert collision("a/b", ["a/c", "a/b", "ab", "b/a"]) is None
