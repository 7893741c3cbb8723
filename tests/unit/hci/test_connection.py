import asyncio
import json

import pytest

from flplatform.core.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from flplatform.hci.connection import Connection, ExitCode, error_item, exit_code_of


def replies(session, handler, **options) -> list[dict]:
    """What a handler writes, read at the end; followed by done."""

    async def main() -> list[dict]:
        connection = Connection(session, **options)
        await handler(connection)
        await connection.done(0.5)
        items = [await connection.next_item()]
        while items[-1]["type"] not in ("done", "confirm"):
            items.append(await connection.next_item())
        return items

    return asyncio.run(main())


def test_every_item_is_plain_json(session):
    async def handler(c: Connection) -> None:
        await c.row("a", {"state": "up", "load": None}, status="ok", detail="d")
        await c.table("t", ("x", "y"), [(1, 2.5)], marks={(0, 1): "best"})
        await c.text("hello")
        await c.error(PermissionDeniedError("no", field="f", hint="h", rule="r"))
        await c.progress("up", 1, None, "B")
        await c.plot("auc", "step", {"a": (0.1, 0.2)})
        await c.data("result", {"x": [1]})
        await c.remember("current", 7)

    items = replies(session, handler)
    assert items == json.loads(json.dumps(items))
    assert items == [
        {
            "type": "row",
            "target": "a",
            "status": "ok",
            "detail": "d",
            "cells": {"state": "up", "load": None},
        },
        {"type": "table", "name": "t", "columns": ["x", "y"], "rows": [[1, 2.5]]}
        | {"marks": [[0, 1, "best"]], "verbatim": False},
        {"type": "text", "text": "hello"},
        {
            "type": "error",
            "code": "permission_denied",
            "message": "no",
            "field": "f",
            "hint": "h",
            "rule": "r",
        },
        {"type": "progress", "label": "up", "done": 1, "total": None, "unit": "B"},
        {"type": "plot", "name": "auc", "x": "step", "series": {"a": [0.1, 0.2]}},
        {"type": "data", "name": "result", "value": {"x": [1]}},
        {"type": "session", "key": "current", "value": 7},
        {"type": "done", "exit_code": 3, "ok": 1, "failed": 0, "seconds": 0.5},
    ]


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (PermissionDeniedError("no", rule="byoc = none"), "refused", "rule byoc = none"),
        (PermissionDeniedError("not yours"), "refused", "not yours"),
        (DeadlineExceededError("after 2.0 s"), "no_reply", "after 2.0 s"),
        (NotFoundError("target", hint="did you mean a?"), "unknown", "target; did you mean a?"),
        (UnavailableError("gone"), "error", "gone"),
    ],
)
def test_an_error_of_one_target_is_its_row(session, error, status, detail):
    async def handler(c: Connection) -> None:
        await c.failed("a", error)

    row = replies(session, handler)[0]
    assert (row["status"], row["detail"]) == (status, detail)


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ((), 0),
        (("ok", "ok"), 0),
        (("ok", "refused"), 1),
        (("refused", "no_reply"), 1),
        (("refused", "refused"), 3),
        (("error",), 1),
    ],
)
def test_exit_code_follows_the_rows(session, statuses, code):
    async def handler(c: Connection) -> None:
        for status in statuses:
            await c.row("a", status=status)

    done = replies(session, handler)[-1]
    assert done["exit_code"] == code
    assert done["ok"] == statuses.count("ok")
    assert done["failed"] == len(statuses) - statuses.count("ok")


def test_exit_code_of_the_handler_wins_then_the_first_error(session):
    async def errors(c: Connection) -> None:
        await c.row("a", status="error")
        await c.error(InvalidArgumentError("bad"))
        await c.error(InternalError("worse"))

    async def chosen(c: Connection) -> None:
        await errors(c)
        c.exit_code = 5

    assert replies(session, errors)[-1]["exit_code"] == ExitCode.USAGE
    assert replies(session, chosen)[-1]["exit_code"] == 5


def test_exit_codes_of_errors():
    assert exit_code_of(InvalidArgumentError("x")) == 2
    assert exit_code_of(PermissionDeniedError("x")) == 3
    assert exit_code_of(UnavailableError("x")) == 1
    assert error_item(InternalError("x"))["code"] == "internal"


def test_a_slow_reader_holds_the_writer_but_not_progress(session):
    async def main() -> None:
        connection = Connection(session, max_pending=2)
        await connection.text("1")
        await connection.text("2")
        await connection.progress("dropped", 1, 2)
        writer = asyncio.create_task(connection.text("3"))
        await asyncio.sleep(0)
        assert not writer.done()
        assert [(await connection.next_item())["text"] for _ in range(3)] == ["1", "2", "3"]
        await writer

    asyncio.run(main())


def test_confirm_carries_the_question(session):
    async def handler(c: Connection) -> None:
        await c.confirm("sure?")

    assert replies(session, handler) == [{"type": "confirm", "question": "sure?"}]


def test_rows_are_sent_in_the_order_that_was_said(session):
    async def handler(c: Connection) -> None:
        c.in_order(["b", "a", "silent", "c"])
        await c.row("a", {"n": 1})
        await c.data("soon", 1)
        await c.row("other")
        await c.row("b")
        await c.row("c")
        await c.text("what follows the rows")

    items = replies(session, handler)
    assert [item.get("target", item["type"]) for item in items] == [
        *("data", "other", "b", "a", "c", "text", "done"),
    ]
    assert items[-1]["ok"] == 4


def test_rows_that_wait_are_sent_before_an_error_and_at_the_end(session):
    async def failing(c: Connection) -> None:
        c.in_order(["b", "a"])
        await c.row("a")
        await c.error(UnavailableError("gone"))

    async def ending(c: Connection) -> None:
        c.in_order(["b", "a"])
        await c.row("a")

    assert [item["type"] for item in replies(session, failing)] == ["row", "error", "done"]
    assert [item["type"] for item in replies(session, ending)] == ["row", "done"]
