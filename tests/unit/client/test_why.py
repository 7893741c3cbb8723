"""What a site says of itself: held up by what, and its last errors."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from flplatform.client.troubles import MAX_LINES, Troubles
from flplatform.client.verbs import everyone
from flplatform.client.why import why_verb
from flplatform.core.errors import (
    ConfigError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)


def test_the_last_errors_stay():
    troubles = Troubles()
    for number in range(MAX_LINES + 2):
        troubles.note(f"error {number}\n  in two lines")
    troubles.note("again")
    troubles.note("again")
    texts = [line["text"] for line in troubles.lines]
    assert len(texts) == MAX_LINES
    assert texts[-1] == "again"
    assert texts[-2] == f"error {MAX_LINES + 1} in two lines"
    troubles.note("x" * 5000)
    assert len(troubles.lines[-1]["text"]) == 300


def test_a_step_that_is_tried_again():
    troubles = Troubles()
    refusal = PermissionDeniedError("not yours")
    script = [
        ResourceExhaustedError("the disk is full"), UnavailableError("gone"), "done",
        UnavailableError("gone"), refusal,
    ]  # fmt: skip

    async def step():
        outcome = script.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def go():
        with pytest.raises(ResourceExhaustedError):
            await troubles.watch(step)
        assert troubles.held_up == "retries: resource_exhausted"
        with pytest.raises(UnavailableError):
            await troubles.watch(step)
        assert troubles.held_up == "retries: unavailable"
        assert await troubles.watch(step) == "done"
        assert troubles.held_up == ""
        with pytest.raises(UnavailableError):
            await troubles.watch(step)
        with pytest.raises(PermissionDeniedError):
            await troubles.watch(step)
        assert troubles.held_up == "", "a refusal is not tried again"

    asyncio.run(go())
    texts = [line["text"] for line in troubles.lines]
    assert texts == ["the disk is full", "gone", "not yours"]


class Runs:
    def __init__(self):
        self.left = Troubles()
        self.left.note("out of memory")

    def reports(self):
        return [(3, 2, "train, crashed 1 of 3", 4.0, "none"), (5, 1, "idle", 1.0, "none")]

    def troubles(self, run):
        return self.left if run == 3 else Troubles()


def asked(**body):
    return SimpleNamespace(body=json.dumps(body).encode() if body else b"")


def test_the_verb(tmp_path):
    downloads = Troubles()
    verb = why_verb(Runs(), downloads, tmp_path)
    assert (verb.name, verb.permission, verb.mutating) == ("why", "view", False)
    assert verb.reaches is everyone
    answer = asyncio.run(verb.act(asked(run=3)))
    assert answer["runs"] == [
        {"run": 3, "round": 2, "phase": "train, crashed 1 of 3", "since_s": 4.0}
    ]
    assert [line["text"] for line in answer["errors"]] == ["out of memory"]
    assert answer["disk_free_bytes"] > 0
    assert len(json.dumps(answer)) < 10_000
    everything = asyncio.run(verb.act(asked()))
    assert [each["run"] for each in everything["runs"]] == [3, 5]
    assert everything["errors"] == []
    downloads.note("the disk is full")
    downloads.held_up = "retries: resource_exhausted"
    unknown = asyncio.run(verb.act(asked(run=4)))
    assert unknown["held_up"] == "downloading the package, retries: resource_exhausted"
    assert [line["text"] for line in unknown["errors"]] == ["the disk is full"]
    assert asyncio.run(verb.act(asked(run=3)))["held_up"] == ""
    with pytest.raises(ConfigError):
        asyncio.run(verb.act(asked(run=-1)))
