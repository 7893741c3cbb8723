import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import InvalidArgumentError
from flplatform.files.linear_regex import LinearPattern

ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "\\d", "\\w", "\\.", "^", "$", "1"])


def _grow(inner):
    quiet = inner.filter(lambda text: text not in ("^", "$"))
    return st.one_of(
        st.builds(lambda x, y: x + y, inner, inner),
        st.builds(lambda x, y: f"({x}|{y})", inner, inner),
        st.builds(lambda x, sign: f"({x}){sign}", quiet, st.sampled_from("*+?")),
    )


PATTERNS = st.recursive(ATOMS, _grow, max_leaves=8)


@given(PATTERNS, st.text(alphabet="ab1.\t ", max_size=12))
def test_it_finds_what_the_backtracking_engine_finds(pattern, text):
    assert LinearPattern(pattern).search(text) == bool(re.search(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("run [0-9]+", "run 12 opened", True),
        ("^WARN", "x WARN", False),
        ("a|", "zzz", True),
        ("[]a]", "]", True),
        ("[a-]", "-", True),
        ("[^\\d]", "7", False),
        ("a\\[b", "a[b", True),
        ("x$", "x y", False),
        ("", "", True),
    ],
)
def test_examples(pattern, text, found):
    assert LinearPattern(pattern).search(text) is found


def test_case():
    assert LinearPattern("eRRor [A-Z]", ignore_case=True).search("ERROR x")
    assert not LinearPattern("error").search("ERROR")


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a)", "*", "a**", "a{2}", "(?:a)", "(?=a)", "\\1", "\\b", "[", "[z-a]", "a\\",
     "a" * 201, "(" * 30 + ")" * 30],
)  # fmt: skip
def test_what_is_not_supported_is_named(pattern):
    with pytest.raises(InvalidArgumentError) as caught:
        LinearPattern(pattern)
    assert caught.value.field == "PATTERN"


@pytest.mark.parametrize(
    "pattern", ["(a*)*b", "(a|a)*b", "(a|aa)+$", "(.*)(.*)(.*)(.*)x", "(a?)" * 40]
)
def test_patterns_that_stop_other_engines_take_time_by_length(pattern):
    search = LinearPattern(pattern).search
    started = time.process_time()
    search("a" * 50_000)
    assert time.process_time() - started < 5
