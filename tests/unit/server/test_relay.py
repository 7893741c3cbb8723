import asyncio
import json

import pytest

from flplatform.core.errors import NotFoundError
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server import relay as module
from flplatform.server.relay import Reply, RequestRelay
from tests.unit.server.scene import play, settle


def answer(request: pb.SiteRequest, **fields: object) -> pb.SiteReply:
    body = json.dumps(fields.pop("body", {})).encode()
    return pb.SiteReply(request_id=request.id, status="ok", body=body, **fields)


async def fetch(relay: RequestRelay, site: str = "a", *received: str) -> list[pb.SiteRequest]:
    return await relay.retrieve(site, received, 0.0)


def test_a_request_reaches_its_site_and_its_reply_the_asker() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        future = relay.post("a", "check_status", signed=b"signed", body={"n": 1})
        assert await fetch(relay, "b") == []
        (request,) = await fetch(relay)
        assert (request.topic, request.signed, request.body) == (
            "check_status",
            b"signed",
            b'{"n": 1}',
        )
        relay.reply("a", answer(request, body={"x": 2}, message="hi", rule="r"))
        assert await future == Reply("ok", {"x": 2}, "hi", "r")
        assert await fetch(relay) == []

    play(scene())


def test_a_waiting_call_returns_with_the_request() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        waiting = asyncio.create_task(relay.retrieve("a", [], 60.0))
        await settle()
        assert not waiting.done()
        relay.post("a", "t")
        assert [request.topic for request in await waiting] == ["t"]

    play(scene())


def test_two_waiting_calls_of_a_site_both_return() -> None:
    """The old connection may linger beside the new one."""

    async def scene() -> None:
        relay = RequestRelay()
        calls = [asyncio.create_task(relay.retrieve("a", [], 60.0)) for _ in range(2)]
        await settle()
        relay.post("a", "t")
        assert [len(await call) for call in calls] == [1, 1]

    play(scene())


def test_a_waiting_call_ends_empty() -> None:
    async def scene() -> None:
        assert await RequestRelay().retrieve("a", [], 0.01) == []

    play(scene())


def test_a_lost_answer_is_given_again_until_the_site_names_it() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        relay.post("a", "one")
        first = await fetch(relay)
        again = await fetch(relay)
        assert first == again
        assert await fetch(relay, "a", first[0].id) == []
        relay.post("a", "two")
        assert [request.topic for request in await fetch(relay)] == ["two"]

    play(scene())


def test_what_a_dead_site_had_received_is_sent_again_when_it_comes_back() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        future = relay.post("a", "one")
        (one,) = await fetch(relay)
        relay.post("a", "two")
        assert [request.topic for request in await fetch(relay, "a", one.id)] == ["two"]
        relay.reset("a")
        assert [request.topic for request in await fetch(relay)] == ["one", "two"]
        relay.reply("a", answer(one))
        await future
        relay.reset("a")
        assert [request.topic for request in await fetch(relay)] == ["two"]
        relay.reset("nobody")

    play(scene())


def test_coming_back_wakes_the_waiting_call() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        relay.post("a", "one")
        (one,) = await fetch(relay)
        waiting = asyncio.create_task(relay.retrieve("a", [one.id], 60.0))
        await settle()
        relay.reset("a")
        assert await waiting == [one]

    play(scene())


def test_only_the_asked_site_can_answer_and_only_once() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        future = relay.post("a", "t")
        (request,) = await fetch(relay)
        with pytest.raises(NotFoundError):
            relay.reply("b", answer(request))
        assert not future.done()
        relay.reply("a", answer(request))
        with pytest.raises(NotFoundError):
            relay.reply("a", answer(request))
        with pytest.raises(NotFoundError):
            relay.reply("a", pb.SiteReply(request_id="x" * 999))
        assert (await future).status == "ok"

    play(scene())


def test_a_late_reply_is_dropped() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        replies = await relay.ask(["a"], "t", timeout_s=0.0)
        assert replies["a"].status == "no_reply"
        await settle()
        assert await fetch(relay) == [], "what nobody waits for is not delivered"
        future = relay.post("a", "t")
        (request,) = await fetch(relay)
        future.cancel()
        await settle()
        with pytest.raises(NotFoundError):
            relay.reply("a", answer(request))

    play(scene())


def test_every_site_asked_has_a_row() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        asking = asyncio.create_task(relay.ask(["c", "a", "b", "a"], "t", timeout_s=1.0))
        await settle()
        for site, status in (("a", "ok"), ("b", "refused")):
            (request,) = await fetch(relay, site)
            reply = pb.SiteReply(request_id=request.id, status=status, message="m", rule="r")
            relay.reply(site, reply)
        replies = await asking
        assert list(replies) == ["c", "a", "b"]
        assert replies["c"] == Reply("no_reply", message="no reply after 1.0 s")
        assert (replies["a"].status, replies["b"].status) == ("ok", "refused")
        assert await relay.ask([], "t", timeout_s=60.0) == {}

    play(scene())


def test_an_asker_who_leaves_takes_the_request_back() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        asking = asyncio.create_task(relay.ask(["a"], "t", timeout_s=60.0))
        await settle()
        assert len(await fetch(relay)) == 1
        asking.cancel()
        await settle()
        assert await fetch(relay) == []
        assert relay._waiters == {}

    play(scene())


def test_the_outbox_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OUTBOX", 3)

    async def scene() -> None:
        relay = RequestRelay()
        futures = [relay.post("a", "t") for _ in range(2)]
        received = [request.id for request in await fetch(relay)]
        await fetch(relay, "a", *received)
        futures += [relay.post("a", "t") for _ in range(3)]
        assert [future.done() for future in futures] == [False, False, False, True, True]
        assert (await futures[3]).status == "error"
        assert relay.post("b", "t").done() is False, "a full outbox is one site's"
        futures[0].cancel()
        await settle()
        assert not relay.post("a", "t").done()

    play(scene())


@pytest.mark.parametrize("status", ["no_reply", "", "OK", "error", "anything"])
def test_a_site_cannot_forge_a_status(status: str) -> None:
    async def scene() -> None:
        relay = RequestRelay()
        future = relay.post("a", "t")
        (request,) = await fetch(relay)
        relay.reply("a", pb.SiteReply(request_id=request.id, status=status))
        assert (await future).status == "error"

    play(scene())


@pytest.mark.parametrize(
    "body",
    [
        *(b"[]", b"7", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000),
        *(b" " * (module.MAX_BODY_BYTES + 1), b'{"a": -1e999}', b'{"a": 1' + b"0" * 30 + b"}"),
        b'{"a": ' + b"[" * module.MAX_DEPTH + b"]" * module.MAX_DEPTH + b"}",
    ],
    ids=["list", "number", "torn", "bytes", "nan", "deep", "long", "infinite", "huge", "nested"],
)
def test_a_reply_that_cannot_be_read_is_an_error_row(body: bytes) -> None:
    async def scene() -> None:
        relay = RequestRelay()
        future = relay.post("a", "t")
        (request,) = await fetch(relay)
        relay.reply("a", pb.SiteReply(request_id=request.id, status="ok", body=body))
        reply = await future
        assert (reply.status, reply.body) == ("error", {})
        assert "cannot be read" in reply.message

    play(scene())


def test_texts_are_cut() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        future = relay.post("a", "t")
        (request,) = await fetch(relay)
        relay.reply("a", answer(request, message="m" * 9999, rule="r" * 9999))
        reply = await future
        assert (len(reply.message), len(reply.rule)) == (2000, 200)

    play(scene())


def test_closing_lets_all_waiting_calls_return() -> None:
    async def scene() -> None:
        relay = RequestRelay()
        calls = [asyncio.create_task(relay.retrieve(site, [], 60.0)) for site in "ab"]
        await settle()
        relay.close()
        assert [await call for call in calls] == [[], []]
        assert await relay.retrieve("c", [], 60.0) == []

    play(scene())


def test_a_site_that_registers_is_told_of_and_requests_are_counted() -> None:
    async def it() -> None:
        relay = RequestRelay()
        returned: list[str] = []
        relay.returned = returned.append
        relay.reset("a")
        assert returned == ["a"]
        first, second = relay.post("a", "x"), relay.post("b", "x")
        assert (relay.posted, relay.outstanding) == (2, 2)
        first.cancel()
        await asyncio.sleep(0)
        assert (relay.posted, relay.outstanding) == (2, 1)
        second.cancel()
        await asyncio.sleep(0)
        assert relay.outstanding == 0

    asyncio.run(it())
