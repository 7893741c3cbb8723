"""A site's own errors and numbers."""

import asyncio
import logging

import pytest

from flplatform.client.stats import stats_verbs
from flplatform.files.counters import Counters


@pytest.fixture
def verbs():
    root = logging.getLogger()
    before = list(root.handlers)
    counters = Counters()
    counters.add("tasks_done", amount=3)
    counters.add("received_bytes", amount=500)
    yield {verb.name: verb for verb in stats_verbs(counters, lambda: 2, lambda: 4)}
    root.handlers[:] = before


def act(verb):
    return asyncio.run(verb.act(None))


def test_rights(verbs):
    assert {name: (verb.permission, verb.mutating) for name, verb in verbs.items()} == {
        "show_errors": ("view", False),
        "reset_errors": ("operate", True),
        "show_stats": ("view", False),
    }
    assert not any(verb.repeatable for verb in verbs.values())


def test_errors(verbs):
    act(verbs["reset_errors"])
    logging.getLogger("flplatform.client.test").error("it broke")
    (count,) = act(verbs["show_errors"])["counts"]
    assert count == ["ERROR", "flplatform.client.test", 1]
    assert act(verbs["reset_errors"]) == {"reset": 1}
    assert act(verbs["show_errors"])["counts"] == []


def test_stats(verbs):
    found = act(verbs["show_stats"])
    assert found["uptime_s"] >= 0
    assert {name: found[name] for name in found if name != "uptime_s"} == {
        "runs_active": 2,
        "tasks_done": 3,
        "tasks_failed": 0,
        "received_bytes": 500,
        "sent_bytes": 0,
        "reconnects": 3,
        "loop_lag": {},
    }
