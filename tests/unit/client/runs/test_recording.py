"""A start that the audit cannot record yet: nothing is done for it, and it is not refused."""

import asyncio
import errno
import json
import os
import threading
from pathlib import Path

import pytest

from flplatform.client import retrying
from flplatform.client.policy import Policy
from flplatform.client.requests import RequestAgent, basic_verbs
from flplatform.client.seen import SeenIds
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.audit import AuditLog, records, verify
from tests.unit.client.runs.world import end, play


class Disk:
    """Has no room for an audit, until it has.

    Attributes:
        full: an error, or how many bytes of a record it takes; None if it has room.
        tried: set when a write has found no room.
    """

    def __init__(self, path: Path, monkeypatch) -> None:
        self.full: OSError | int | None = None
        self.tried = threading.Event()
        self._path = path
        self._write = os.write
        monkeypatch.setattr(os, "write", self._take)

    def _take(self, handle: int, data: bytes) -> int:
        if self.full is None or os.readlink(f"/proc/self/fd/{handle}") != str(self._path):
            return self._write(handle, data)
        self.tried.set()
        if isinstance(self.full, OSError):
            raise self.full
        return self._write(handle, data[: self.full])

    async def until_tried(self) -> None:
        """Wait until a further write has found no room."""
        self.tried.clear()
        assert await asyncio.to_thread(self.tried.wait, 20)


@pytest.fixture
def disk(world, monkeypatch):
    world.kit.state_folder().mkdir(exist_ok=True)
    monkeypatch.setattr(retrying, "backoff_s", lambda *_: 0.01)
    return Disk(world.kit.state_folder() / "audit.jsonl", monkeypatch)


@pytest.fixture
def audit(world, disk):
    log = AuditLog(world.kit.state_folder() / "audit.jsonl", "site-1")
    yield log
    log.close()


def decisions(audit: AuditLog) -> list[str]:
    return [record["decision"] for record in records(audit.path)]


def agent_of(world, runs, audit) -> RequestAgent:
    policy = Policy(world.kit, "sandbox")
    return RequestAgent(
        trust=lambda: world.trust,
        policy=policy,
        seen=SeenIds(world.folder / "seen.json"),
        runs=runs,
        audit=audit,
        verbs=basic_verbs(policy, lambda _: None, {}),
    )


def request(offer, number: int = 1) -> pb.SiteRequest:
    signed, _, _, body = offer
    return pb.SiteRequest(
        id=f"r{number}",
        topic="start",
        signed=signed.to_bytes(),
        body=json.dumps({"run": body.run, "digest": body.digest, "size": body.size}).encode(),
    )


@pytest.mark.parametrize(
    "full",
    [331, OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota")],
    ids=["short write", "no space", "quota"],
)
def test_a_start_waits_until_it_can_be_recorded(world, disk, audit, full, caplog):
    async def go():
        runs, offer = world.runs(), world.offer()
        disk.full = full
        task = asyncio.create_task(agent_of(world, runs, audit).handle(request(offer)))
        for _ in range(3):
            await disk.until_tried()
        assert not task.done(), task.result()
        assert runs.numbers() == [1], "the server tells it if the run ends"
        assert (world.fetched, decisions(audit)) == ([], [])
        disk.full = None
        reply = await task
        assert (reply.status, json.loads(reply.body)) == ("ok", {"isolation": "sandbox"}), reply
        assert runs.all()
        assert decisions(audit) == ["allowed"]
        await runs.close()

    play(go())
    assert "record the start of run 1: try 3 failed" in caplog.text
    assert "Traceback" not in caplog.text
    assert verify(audit.path).seq == 1


def test_a_start_that_waits_for_room_ends_with_its_run(world, disk, audit):
    async def go():
        runs, offer = world.runs(), world.offer()
        disk.full = 10
        task = asyncio.create_task(agent_of(world, runs, audit).handle(request(offer)))
        await disk.until_tried()
        await end(runs, 1, "aborted")
        reply = await task
        assert (reply.status, reply.rule) == ("error", "run_ended")
        disk.full = None
        assert (runs.numbers(), world.fetched, decisions(audit)) == ([], [], [])
        await runs.close()

    play(go())


def test_a_site_that_stops_while_a_start_waits_for_room_leaves_it_for_the_next_process(
    world, disk, audit
):
    async def go():
        runs, offer = world.runs(), world.offer()
        disk.full = 10
        task = asyncio.create_task(agent_of(world, runs, audit).handle(request(offer)))
        await disk.until_tried()
        await runs.close()
        assert task.cancelled()
        disk.full = None
        again = world.runs()
        reply = await agent_of(world, again, audit).handle(request(offer))
        assert reply.status == "ok"
        await again.close()

    play(go())


def test_an_audit_that_is_broken_otherwise_fails_the_start(world, disk, audit):
    async def go():
        runs = world.runs()
        disk.full = OSError(errno.EIO, "Input/output error")
        reply = await agent_of(world, runs, audit).handle(request(world.offer()))
        assert (reply.status, reply.message) == ("error", "internal error at the site")
        assert (runs.numbers(), world.fetched) == ([], [])
        await runs.close()

    play(go())
