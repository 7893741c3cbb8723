import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from flplatform.core.errors import ConfigError
from flplatform.core.strict import (
    MAX_TEXT_BYTES,
    FromNewer,
    Strict,
    key_path,
    parse_json,
    parse_yaml,
)


class Inner(Strict):
    name: str
    rate: float = 0.1


class Outer(Strict):
    count: int = Field(1, ge=1)
    on: bool = False
    inner: Inner | None = None
    items: tuple[Inner, ...] = ()
    extra: dict[str, Inner] = {}


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(Outer, text, "f.yml")
    return caught.value.problems


def test_an_empty_document_is_all_defaults() -> None:
    for text in ("", "# only a comment\n", "---\n", "{}"):
        assert parse_yaml(Outer, text, "f.yml") == Outer()


def test_lists_become_tuples_and_floats_take_ints() -> None:
    outer = parse_yaml(Outer, "items: [{name: a, rate: 1}, {name: b, rate: 1e-3}]", "f.yml")
    assert outer.items == (Inner(name="a", rate=1.0), Inner(name="b", rate=0.001))


def test_all_problems_are_listed_at_once_with_line_and_path() -> None:
    text = "count: x\ncuont: 2\nitems:\n  - name: a\n  - nmae: b\n    rate: '1'\nextra:\n  k: {}\n"
    assert problems_of(text) == (
        "f.yml:1: count: should be a valid integer, got 'x'",
        "f.yml:2: cuont: unknown key; did you mean 'count'?",
        "f.yml:5: items[1].name: is required",
        "f.yml:5: items[1].nmae: unknown key; did you mean 'name'?",
        "f.yml:6: items[1].rate: should be a valid number, got '1'",
        "f.yml:8: extra.k.name: is required",
    )


def test_an_unlike_key_lists_the_known_ones() -> None:
    (problem,) = problems_of("inner: {name: a, zzz: 1}")
    assert problem == "f.yml:1: inner.zzz: unknown key; known keys: name, rate"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count: 1\ncount: 2", "f.yml:2: count: key given twice, first in line 1"),
        ("extra: &x {}\ninner: *x", "f.yml:2: inner: aliases are not supported"),
        ("on: !!python/name:os.system 1", "tag tag:yaml.org,2002:python/name:os.system"),
        ("count: !!binary aGk=", "tag tag:yaml.org,2002:binary is not supported"),
        ("{}\n--- {}", "f.yml:2: only one document per file"),
        ("? [a]\n: 1", "f.yml:1: a key must be plain text"),
        ("inner: {name: a, rate: .inf}", "inner.rate: '.inf' is not a float"),
        ("inner: {name: a, rate: .nan}", "inner.rate: '.nan' is not a float"),
        ("count: 0b_", "count: '0b_' is not a int"),
        ("count: 1.0", "count: should be a valid integer"),
        ("count: yes", "count: should be a valid integer, got True"),
        ("count: 0", "count: should be greater than or equal to 1, got 0"),
        ("- 1", "the document: should be an object, got 'list'"),
        ("count: [", "f.yml:2:"),
        ("count: \x00", "f.yml: unacceptable character"),
        ("inner: {<<: {name: a}}", "inner.<<: unknown key"),
        ("count: " + "[" * 100_000, "nested deeper than 32"),
    ],
)
def test_refusals(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems_of(text)), problems_of(text)


def test_text_that_looks_like_a_date_stays_text() -> None:
    assert parse_yaml(Inner, "name: 2024-01-01", "f.yml").name == "2024-01-01"


def test_a_check_between_fields_is_placed_by_its_path() -> None:
    def check(outer: Outer) -> list[tuple[tuple[str | int, ...], str]]:
        return [(("items", 0, "name"), "is taken")] if outer.items else []

    with pytest.raises(ConfigError) as caught:
        parse_yaml(Outer, "count: 1\nitems:\n  - name: a\n", "f.yml", check)
    assert caught.value.problems == ("f.yml:3: items[0].name: is taken",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"count": 1, "count": 2}', "count: key given twice"),
        ('{\n"count": "1"}', "f.json:2: count: should be a valid integer"),
        ('{"inner": {"name": "a", "rate": NaN}}', "inner.rate"),
        ('{"inner": {"name": "\\ud800"}}', "f.json: the document"),
        ('{"count": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"count"', "f.json:1:"),
        ("[" * 100_000, "RecursionError"),
        ("null", "should be an object"),
    ],
)
def test_json_refusals(text: str, expected: str) -> None:
    for given_text in (text, text.encode()):
        with pytest.raises(ConfigError) as caught:
            parse_json(Outer, given_text, "f.json")
        assert any(expected in problem for problem in caught.value.problems)


def test_json_bytes_must_be_utf8() -> None:
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        parse_json(Outer, b'{"\xff": 1}', "f.json")


def test_a_text_too_large_is_refused_unread() -> None:
    for parse in (parse_yaml, parse_json):
        with pytest.raises(ConfigError, match="larger than"):
            parse(Outer, " " * (MAX_TEXT_BYTES + 1), "f")


def test_key_path() -> None:
    assert key_path(("sites", 2, "name")) == "sites[2].name"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_arbitrary_json_is_parsed_or_refused_by_config_error(value: object) -> None:
    text = json.dumps({"extra": value})
    with contextlib.suppress(ConfigError):
        parsed = parse_json(Outer, text, "f.json")
        assert parse_json(Outer, parsed.model_dump_json(), "f.json") == parsed


@given(st.text(max_size=200))
def test_arbitrary_text_is_parsed_or_refused_by_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_yaml(Outer, text, "f.yml")


def test_what_a_newer_release_adds_is_passed_over_and_nothing_else() -> None:
    class Body(FromNewer):
        run: int

    assert parse_json(Body, b'{"run": 3, "new": {"deep": [1]}}', "body").run == 3
    for text in (b'{"new": 1}', b'{"run": "3"}', b'{"run": 3, "run": 4}', b'{"run": NaN}'):
        with pytest.raises(ConfigError):
            parse_json(Body, text, "body")
