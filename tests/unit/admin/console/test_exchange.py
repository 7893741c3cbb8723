import asyncio

import pytest

from flplatform.admin.console import exchange
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.core.errors import NotFoundError, UnavailableError
from tests.unit.admin.console.conftest import DONE, Screen, data, done, error


def test_ask_returns_rows_and_data_and_remembers(transport):
    screen = Screen(transport)
    row = {"type": "row", "target": "a", "status": "refused", "detail": "", "cells": {}}
    remember = {"type": "session", "key": "run", "value": 7}
    transport.replies = [[row, data("x", 1), remember, done(1)]]
    items = asyncio.run(ask(transport, screen.shell, ["preflight", "{}"], b"more"))
    assert items == [row, data("x", 1)]
    assert data_of(items, "x") == 1
    assert data_of(items, "y") is None
    assert screen.shell.remembered == {"run": 7}
    assert transport.sent == [(["preflight", "{}"], b"more")]
    assert screen.lines == []


def test_a_refusal_is_shown_and_its_code_kept(transport):
    screen = Screen(transport)
    transport.replies = [[error("max may not"), done(3)]]
    with pytest.raises(Refused) as caught:
        asyncio.run(ask(transport, screen.shell, ["submit"]))
    assert caught.value.exit_code == 3
    assert "max may not" in screen.err.getvalue()


def test_a_reply_that_breaks_off(transport):
    screen = Screen(transport)
    transport.replies = [[data("x", 1)]]
    with pytest.raises(UnavailableError):
        asyncio.run(ask(transport, screen.shell, ["submit"]))


def steps(*outcomes):
    waiting = list(outcomes)

    async def step():
        outcome = waiting.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return step


def test_persist_tries_again_only_while_the_connection_is_broken(transport, monkeypatch):
    screen = Screen(transport)
    gone = UnavailableError("gone")
    assert asyncio.run(persist(screen.shell, steps(gone, gone, 7))) == 7
    assert screen.lines == ["gone; trying again in 0.0 s"] * 2
    with pytest.raises(NotFoundError):
        asyncio.run(persist(screen.shell, steps(NotFoundError("x"), 7)))
    monkeypatch.setattr(exchange, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(UnavailableError):
        asyncio.run(persist(screen.shell, steps(*[gone] * (exchange.TRIES + 1))))


def test_done_is_what_a_reply_ends_with(transport):
    transport.replies = [[DONE]]
    assert asyncio.run(ask(transport, Screen(transport).shell, ["x"])) == []
