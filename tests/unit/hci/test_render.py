import io
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.hci.render import JsonRenderer, TextRenderer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(target: str, status: str = "ok", detail: str = "", **cells) -> dict:
    return {"type": "row", "target": target, "status": status, "detail": detail, "cells": cells}


def text_of(*items: dict, terminal: bool = False, env: dict | None = None) -> tuple[str, str]:
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    renderer = TextRenderer(out, err, env or {})
    for item in items:
        renderer.show(item)
    renderer.finish(0, 0.043)
    return out.getvalue(), err.getvalue()


def test_rows_are_aligned_and_summed_up():
    out, err = text_of(
        row("server", state="serving", last_seen_s=None, load=0.25),
        row("cleveland", state="training", last_seen_s=0.1, load=12.0),
    )
    assert out == (
        "TARGET     STATE     LAST SEEN  LOAD\n"
        "server     serving           –  .250\n"
        "cleveland  training      0.1 s    12\n"
        "2 ok                          0.04 s\n"
    )
    assert err == ""


def test_failures_get_a_status_column():
    out, _ = text_of(
        row("a", state="up"),
        row("b", "no_reply", "after 2.0 s"),
        row("c", "refused", "rule byoc = none"),
        row("d", "unknown", "target (did you mean a?)"),
        row("e", "error", "disk full"),
        row("f", "late"),
        row("g", "late", "by far"),
    )
    assert out.splitlines() == [
        "TARGET  STATUS                            STATE",
        "a       ok                                up",
        "b       no reply after 2.0 s              –",
        "c       refused: rule byoc = none         –",
        "d       unknown target (did you mean a?)  –",
        "e       error: disk full                  –",
        "f       late                              –",
        "g       late: by far                      –",
        "1 ok · 6 failed                          0.04 s",
    ]


def test_rows_without_cells_say_ok():
    assert text_of(row("a"))[0] == "TARGET  STATUS\na       ok\n1 ok    0.04 s\n"


def test_a_table_a_text_and_no_summary():
    out, _ = text_of(
        {"type": "table", "name": "m", "columns": ["x", "y"], "rows": [[1, True], [20, "[b]z"]]},
        {"type": "text", "text": "a\tb\nc"},
        {"type": "data", "name": "d", "value": 1},
    )
    assert out == " X  Y\n 1  yes\n20  [b]z\na       b\nc\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, ".123"), (123456.7, "123457"), (1e20, "1e+20"), (math.nan, "nan"), ([1], "[1]")],
)
def test_values(value, shown):
    out, _ = text_of({"type": "table", "name": "m", "columns": ["x"], "rows": [[value]]})
    assert out.split()[1] == shown


def test_errors_go_to_err():
    out, err = text_of(
        {"type": "error", "message": "bad", "field": "f", "hint": "usage: x", "rule": "r"},
        {"type": "error", "message": "two\nlines"},
    )
    assert out == ""
    assert err == "error: f: bad (rule: r)\n  usage: x\nerror: two\nlines\n"


def test_rows_come_before_what_follows_them():
    out, _ = text_of(row("a"), {"type": "text", "text": "later"}, row("b"))
    assert [line.split()[0] for line in out.splitlines()] == [
        "TARGET", "a", "later", "TARGET", "b", "2",
    ]  # fmt: skip


def test_flush_shows_rows_before_a_question():
    out = io.StringIO()
    renderer = TextRenderer(out, out, {})
    renderer.show(row("a"))
    assert out.getvalue() == ""
    renderer.flush()
    assert "a       ok" in out.getvalue()


def test_a_pipe_never_breaks_a_line_unless_told_its_width():
    long = "x" * 150
    assert long in text_of(row(long))[0]
    assert long not in text_of(row(long), env={"COLUMNS": "80"})[0]


def test_a_terminal_gets_colour_and_an_indent():
    env = {"COLUMNS": "80"}
    out, err = text_of(row("a", "error", "x"), terminal=True, env=env)
    assert re.search(r"^  .*TARGET", out)
    out, err = text_of({"type": "error", "message": "bad"}, terminal=True, env=env)
    assert "error: bad" in err


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_terminals_get_no_escape_sequence(env):
    out, err = text_of(
        row("a", "error", "x"),
        {"type": "error", "message": "bad"},
        {"type": "plot", "name": "p", "x": "n", "series": {"a": [1, 2]}},
        terminal=True,
        env={"COLUMNS": "80", **env},
    )
    assert "\x1b" not in out + err
    assert "p  a" in out


def test_progress_is_drawn_on_a_terminal_only():
    items = [
        {"type": "progress", "label": "up", "done": n, "total": 2, "unit": unit}
        for unit in ("B", "files")
        for n in (1, 2)
    ]
    assert text_of(*items)[0] == ""
    out, _ = text_of(*items, {"type": "text", "text": "x"}, terminal=True, env={"COLUMNS": "80"})
    assert "2/2" in out
    assert "files" in out


def test_what_is_said_meanwhile_stands_above_a_bar():
    bars = [
        {"type": "progress", "label": "up", "done": n, "total": 2, "unit": "cells"} for n in (1, 2)
    ]
    said = {"type": "text", "text": "half of it"}
    out, _ = text_of(bars[0], said, bars[1], terminal=True, env={"COLUMNS": "80"})
    last = out.rpartition("half of it")[2]
    assert "1/2" in last  # drawn again, below
    assert last.index("1/2") < last.index("2/2")


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"type": "new"},
        {"type": "row"},
        {"type": "row", "target": "a", "status": "ok", "cells": 3},
        {"type": "table", "columns": ["a", "b"], "rows": [[1]]},
        {"type": "table", "columns": None, "rows": None},
        {"type": "plot", "name": "p", "x": "x", "series": {"a": 3}},
        {"type": "text"},
        {"type": "error"},
    ],
)
def test_a_malformed_item_is_shown_as_such(item):
    out, err = text_of(item)
    assert err.startswith("unreadable reply: {")


anything = st.text(st.characters(), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | anything
items = st.one_of(
    st.fixed_dictionaries(
        {
            "type": st.just("row"),
            "target": anything,
            "status": st.sampled_from(["ok", "error"]) | anything,
            "detail": anything,
            "cells": st.dictionaries(anything, scalars, max_size=3),
        }
    ),
    st.fixed_dictionaries({"type": st.just("text"), "text": anything}),
    st.fixed_dictionaries(
        {"type": st.just("error"), "message": anything, "hint": anything, "field": anything}
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("table"),
            "name": anything,
            "columns": st.lists(anything, min_size=2, max_size=2),
            "rows": st.lists(st.lists(scalars, min_size=2, max_size=2), max_size=3),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("plot"),
            "name": anything,
            "x": anything,
            "series": st.dictionaries(anything, st.lists(st.floats(), max_size=5), max_size=2),
        }
    ),
    st.dictionaries(anything, anything, max_size=2),
)


@settings(max_examples=60)
@given(st.lists(items, max_size=5))
def test_no_control_byte_of_a_reply_reaches_the_output(sequence):
    out, err = text_of(*sequence)
    output = io.StringIO()
    renderer = JsonRenderer(output, "look")
    for item in sequence:
        renderer.show(item)
    renderer.flush()
    renderer.finish(0, 0.0)
    for written in (out, err, output.getvalue()):
        for char in written:
            assert char == "\n" or char.isprintable()
    json.loads(output.getvalue())
    assert output.getvalue().count("\n") == 1


def test_json_is_one_documented_object():
    out = io.StringIO()
    renderer = JsonRenderer(out, "look all")
    for item in (
        row("a", x=math.nan),
        {"type": "table", "name": "t", "columns": ["c"], "rows": [[1]]},
        {"type": "plot", "name": "p", "x": "n", "series": {"a": [1, math.inf]}},
        {"type": "data", "name": "result", "value": {"n": 1}},
        {"type": "text", "text": "hello\x1b"},
        {"type": "error", "code": "x", "message": "bad"},
        {"type": "progress", "label": "up", "done": 1, "total": 2, "unit": "B"},
    ):
        renderer.show(item)
    renderer.finish(1, 0.25)
    assert json.loads(out.getvalue()) == {
        "schema": "flplatform.command/1",
        "command": "look all",
        "ok": False,
        "exit_code": 1,
        "rows": [{"target": "a", "status": "ok", "detail": "", "cells": {"x": None}}],
        "tables": [{"name": "t", "columns": ["c"], "rows": [[1]]}],
        "plots": [{"name": "p", "x": "n", "series": {"a": [1, None]}}],
        "data": {"result": {"n": 1}},
        "text": ["hello\x1b"],
        "errors": [{"code": "x", "message": "bad"}],
        "operation": None,
        "seconds": 0.25,
    }
    assert "\x1b" not in out.getvalue()


def test_an_odd_locale_does_not_end_the_console():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    renderer = TextRenderer(out, out, {})
    renderer.show(row("Zürich", x=None))
    renderer.finish(0, 0)
    assert b"Z\\xfcrich" in raw.getvalue()
