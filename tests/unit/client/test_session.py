"""One registration at a time, and the way back after every break."""

import asyncio
import logging
from types import SimpleNamespace

import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from flplatform.client import retrying
from flplatform.client import session as module
from flplatform.client.retrying import backoff_s
from flplatform.client.session import Session
from flplatform.core.config import SiteConfig
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.rpc.channel import TOKEN_KEY
from flplatform.rpc.errors import REPLACED_TOKEN, abort
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc


class Server(pb_grpc.FederatedTrainingServicer):
    """Admits everybody; a registration ends the token before it.

    Attributes:
        script: what the next calls of a method are refused with; None lets one pass.
        gate: heartbeats with a right token wait for it.
    """

    def __init__(self):
        self.calls: list[str] = []
        self.registered: list[pb.RegisterRequest] = []
        self.script: dict[str, list] = {}
        self.gate: asyncio.Event | None = None
        self.token = "none yet"

    async def _enter(self, method, context):
        self.calls.append(method)
        if self.script.get(method) and (error := self.script[method].pop(0)):
            await abort(context, error)
        token = dict(context.invocation_metadata()).get(TOKEN_KEY)
        if method != "Register" and token != self.token:
            await abort(context, UnauthenticatedError("dead token"))

    async def Register(self, request, context):
        await self._enter("Register", context)
        self.registered.append(request)
        self.token = f"token {len(self.registered)}"
        return pb.RegisterReply(token=self.token, heartbeat_s=2.5)

    async def Heartbeat(self, request, context):
        await self._enter("Heartbeat", context)
        if self.gate:
            await self.gate.wait()
        return pb.HeartbeatReply()

    async def Quit(self, request, context):
        await self._enter(f"Quit {request.reason}", context)
        return pb.QuitReply()


class Pause(float):
    """A pause that knows where it comes from."""

    def __new__(cls, attempt, longest_s):
        self = super().__new__(cls, attempt)
        self.longest_s = longest_s
        return self

    def __eq__(self, other):
        return (float(self), self.longest_s) == other

    __hash__ = float.__hash__


@pytest.fixture
def pauses(monkeypatch):
    """Every pause, none of which takes any time."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def record(seconds):
        found.append(seconds)
        await sleep(0)

    monkeypatch.setattr(module.asyncio, "sleep", record)
    monkeypatch.setattr(module, "backoff_s", Pause)
    monkeypatch.setattr(retrying, "backoff_s", Pause)
    return found


def session_at(*servers: str) -> Session:
    config = SiteConfig(
        project="test", name="site-1", organisation="hub", servers=servers, request_timeout_s=10
    )
    kit = SimpleNamespace(
        site=config,
        chain=b"",
        key_pem=lambda: b"",
        trust=SimpleNamespace(tls_roots=lambda _: b""),
    )
    return Session(kit, "sandbox", lambda: [4, 7])


def play(test, monkeypatch, *before: str):
    """Run `test(session, server)` against a server on a free port; `before` are dead addresses."""
    monkeypatch.setattr(module, "open_channel", lambda address, **_: aio.insecure_channel(address))

    async def go():
        servicer, server = Server(), aio.server()
        pb_grpc.add_FederatedTrainingServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        session = session_at(*before, f"127.0.0.1:{port}")
        try:
            async with asyncio.timeout(60):
                await test(session, servicer)
        finally:
            await session.close("over")
            await server.stop(0)

    asyncio.run(go())


def offline(test):
    """Run `test(session)` without a server."""

    async def go():
        async with asyncio.timeout(60):
            await test(session_at("localhost:1"))

    asyncio.run(go())


@given(st.integers(0, 10**9), st.floats(0.01, 1e6))
def test_backoff(attempt, longest_s):
    pause = backoff_s(attempt, longest_s)
    assert 0 <= pause <= longest_s
    assert pause <= 0.2 * 2 ** min(attempt, 40)


def test_backoff_is_spread():
    found = [backoff_s(10, 30.0) for _ in range(200)]
    assert min(found) < 5
    assert max(found) > 25


# ---- registration and calls


def beat(session):
    return session.training("Heartbeat", pb.HeartbeatRequest())


def test_the_first_call_registers(monkeypatch):
    async def go(session, server):
        await asyncio.gather(beat(session), beat(session), beat(session))
        assert server.calls[0] == "Register"
        assert sorted(server.calls[1:]) == ["Heartbeat"] * 3
        (request,) = server.registered
        assert (request.protocol, request.isolation, list(request.runs)) == (1, "sandbox", [4, 7])
        assert session.heartbeat_s == 2.5
        assert session.connected.is_set()
        await session.close("stopped")
        assert server.calls[-1] == "Quit stopped"

    play(go, monkeypatch)


def test_a_dead_token_is_replaced_once(monkeypatch):
    async def go(session, server):
        await beat(session)
        server.token = "another"
        await asyncio.gather(*(beat(session) for _ in range(4)))
        assert server.calls.count("Register") == 2
        server.script["Heartbeat"] = [UnauthenticatedError("no")] * 2
        with pytest.raises(UnavailableError):  # to be tried again: it may have been overtaken
            await beat(session)
        assert server.calls.count("Register") == 3
        await beat(session)

    play(go, monkeypatch)


@pytest.mark.parametrize("error", [NotFoundError("no"), PermissionDeniedError("no", rule="r")])
def test_a_refusal_is_raised(monkeypatch, error):
    async def go(session, server):
        server.script["Heartbeat"] = [error]
        with pytest.raises(type(error)) as caught:
            await beat(session)
        assert caught.value.rule == error.rule
        assert server.calls == ["Register", "Heartbeat"]

    play(go, monkeypatch)


def test_no_answer_is_a_broken_connection(monkeypatch):
    async def go(session, server):
        server.gate = asyncio.Event()
        with pytest.raises(UnavailableError, match=r"no answer within 0\.05 s"):
            await session.training("Heartbeat", pb.HeartbeatRequest(), 0.05)
        server.gate.set()

    play(go, monkeypatch)


def test_registration_is_tried_until_it_succeeds(monkeypatch, pauses):
    """Whatever the answer is, at the next address."""

    async def go(session, server):
        server.script["Register"] = [ResourceExhaustedError("full"), PermissionDeniedError("no")]
        await beat(session)
        # Tried: dead, full, dead, no, dead, taken.
        assert pauses == [(attempt, 30.0) for attempt in range(5)]
        assert server.calls == ["Register"] * 3 + ["Heartbeat"]

    play(go, monkeypatch, "127.0.0.1:1")


def test_who_cannot_register_says_with_whom(monkeypatch, pauses, caplog):
    async def go(session, server):
        await beat(session)
        assert "cannot register with 127.0.0.1:1: try 1 failed, next in" in caplog.text

    play(go, monkeypatch, "127.0.0.1:1")


REPLACED = UnauthenticatedError("replaced", rule=REPLACED_TOKEN)


def test_whose_registration_is_taken_again_and_again_yields(monkeypatch, pauses, caplog):
    """Another process with this kit does the same: both would register without end."""

    async def go(session, server):
        await beat(session)
        for _ in range(6):
            server.token = "another's"
            server.script["Heartbeat"] = [REPLACED]
            await beat(session)
        # The first may be this process's own; then ever longer.
        assert pauses == [(contest, 30.0) for contest in range(2, 7)]
        assert server.calls.count("Register") == 7
        assert caplog.text.count("is its kit in use elsewhere?") == 2
        session._registered_at -= 60.0  # it was left in peace
        server.script["Heartbeat"] = [REPLACED]
        await beat(session)
        assert len(pauses) == 5

    play(go, monkeypatch)


def test_a_server_that_is_started_again_and_again_slows_nobody(monkeypatch, pauses):
    async def go(session, server):
        for _ in range(20):
            server.token = "none yet"
            await beat(session)
        assert server.calls.count("Register") == 20
        assert pauses == []

    play(go, monkeypatch)


def test_a_channel_that_is_closed_under_a_call_cancels_nobody(monkeypatch, pauses):
    """A registration that fails closes the channels, also under a call that waits for long."""

    async def go(session, server):
        await beat(session)
        server.gate = asyncio.Event()
        waiting = asyncio.create_task(beat(session))
        streaming = asyncio.create_task(session.transfer(wait_for_heartbeat))
        while server.calls.count("Heartbeat") < 3:
            await asyncio.wait([waiting, streaming], timeout=0.005)
        server.script["Register"] = [ResourceExhaustedError("full")]
        await session.register(session.token)
        for task in (waiting, streaming):
            with pytest.raises(UnavailableError, match="the connection was closed"):
                await task
        server.gate = None
        await beat(session)

    async def wait_for_heartbeat(channel, token):
        stub = pb_grpc.FederatedTrainingStub(channel)
        await stub.Heartbeat(pb.HeartbeatRequest(), metadata=((TOKEN_KEY, token),))

    play(go, monkeypatch)


def test_who_is_cancelled_stays_cancelled(monkeypatch):
    async def go(session, server):
        await beat(session)
        server.gate = asyncio.Event()
        waiting = asyncio.create_task(session.persist("beat", lambda: beat(session)))
        while server.calls.count("Heartbeat") < 2:
            await asyncio.wait([waiting], timeout=0.005)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        server.gate.set()

    play(go, monkeypatch)


# ---- transfers


def test_transfers_have_a_channel_and_the_token(monkeypatch):
    async def go(session, server):
        with pytest.raises(UnavailableError):
            _ = session.transfers
        seen = []

        async def move(channel, token):
            seen.append((channel, token))
            if len(seen) == 1:
                raise UnauthenticatedError("dead token")
            return "moved"

        assert await session.transfer(move) == "moved"
        assert [token for _, token in seen] == ["token 1", "token 2"]
        assert seen[0][0] is session.transfers

        async def overtaken(channel, token):
            raise UnauthenticatedError("dead token")

        with pytest.raises(UnavailableError, match="dead token"):
            await session.transfer(overtaken)

    play(go, monkeypatch)


def test_a_stalled_or_closed_transfer_is_a_broken_connection(monkeypatch):
    async def go(session, server):
        async def stall(channel, token):
            raise DeadlineExceededError("nothing came for 60 s")

        async def late(channel, token):
            await channel.close()
            return channel.unary_stream("/a/b")(b"")

        with pytest.raises(UnavailableError, match="nothing came for 60 s"):
            await session.transfer(stall)
        with pytest.raises(UnavailableError, match="the connection was closed"):
            await session.transfer(late)

    play(go, monkeypatch)


# ---- persistence


def failing(*errors, result="done"):
    """Return a step that raises these, one after the other, and then succeeds."""
    left = list(errors)

    async def step():
        if left:
            raise left.pop(0)
        return result

    return step


def test_persist_goes_on_after_what_is_nobodys_fault(pauses):
    async def go(session):
        errors = [UnavailableError("a"), ResourceExhaustedError("b"), InternalError("c")]
        assert await session.persist("step", failing(*errors)) == "done"
        assert pauses == [(0, 30.0), (1, 30.0), (2, 30.0)]

    offline(go)


def test_who_waits_for_the_server_goes_on_when_it_answers_again(monkeypatch):
    """However long the pause after its last try would be."""

    async def go(session, server):
        await beat(session)
        there, gone = session._open, aio.insecure_channel("127.0.0.1:1")
        session._open = lambda: (gone, gone)
        paused = asyncio.Event()
        monkeypatch.setattr(retrying, "backoff_s", lambda *_: paused.set() or 3600.0)
        waiting = asyncio.create_task(session.persist("beat", lambda: beat(session)))
        await paused.wait()
        session._open = there
        await beat(session)  # somebody else's call comes through
        await waiting
        await gone.close()

    monkeypatch.setattr(module, "AT_LEAST_S", 0.0)
    play(go, monkeypatch)


def test_a_server_that_stays_away_is_told_ever_more_rarely(pauses, caplog):
    async def go(session):
        errors = [UnavailableError("a")] * 300
        with caplog.at_level(logging.WARNING, retrying.__name__):
            await session.persist("step", failing(*errors))
        told = [record.message.split(" failed")[0] for record in caplog.records]
        assert told == [f"step: try {n}" for n in (3, 6, 12, 24, 48, 96, 192, 240)]

    offline(go)


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("x"),
        UnauthenticatedError("x"),
        PermissionDeniedError("x"),
        FailedPreconditionError("x"),
        NotFoundError("x"),
        AlreadyExistsError("x"),
        DataLossError("x"),
        DeadlineExceededError("x"),
        OSError("x"),
    ],
)
def test_persist_ends_at_a_refusal(pauses, error):
    async def go(session):
        with pytest.raises(type(error)):
            await session.persist("step", failing(UnavailableError("a"), error))
        assert len(pauses) == 1

    offline(go)


def test_repeat_goes_on_after_everything(pauses, caplog):
    """A refusal, or a defect of this program: no loop of a site ends silently."""

    async def go(session):
        script = [
            None,
            PermissionDeniedError("no"),
            UnavailableError("away"),
            PermissionDeniedError("no"),
            None,
            OSError("too many open files"),
            KeyError("defect"),
            None,
        ]
        over = asyncio.Event()

        async def step():
            if not script:
                over.set()
                await asyncio.Event().wait()
            if error := script.pop(0):
                raise error

        loop = asyncio.create_task(session.repeat("steps", step))
        await over.wait()
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
        # Refused, away, refused again; success begins anew; two defects.
        assert pauses == [(n, 30.0) for n in (0, 0, 1, 0, 1)]

    with caplog.at_level(logging.WARNING):
        offline(go)
    assert "steps: refused" in caplog.text
    assert "a defect of this program" in caplog.text
