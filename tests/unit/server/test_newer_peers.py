"""A round between a server and sites of which each says more than the other one knows, or less."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from flplatform.client import session
from flplatform.rpc.channel import open_channel
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.support.federation import Federation, provision
from tests.support.wire import newer
from tests.unit.server.scene import play, until
from tests.unit.server.test_server import SiteAt, serving, submit

LATER_FIELDS = {
    "RegisterRequest": ("version", "isolation", "runs"),
    "GetTaskRequest": ("runs",),
    "RetrieveRequest": ("received",),
}
"""What the protocol can do without: a site that leaves it out is served all the same."""


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return provision(tmp_path, reserve_bytes=0, waiting_call_s=20.0)


def more(message: Any) -> Any:
    return newer(message)


def less(message: Any) -> Any:
    for name in LATER_FIELDS.get(message.DESCRIPTOR.name, ()):
        message.ClearField(name)
    return message


@pytest.mark.parametrize("change", [more, less])
def test_a_round_with_sites_of_another_release(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    changed: set[str] = set()

    def open_changed(address: str, **settings: Any) -> aio.Channel:
        channel = open_channel(address, **settings)
        plain = channel.unary_unary

        def unary_unary(method: str, **options: Any) -> Any:
            out, back = options["request_serializer"], options["response_deserializer"]

            def send(request: Any) -> bytes:
                changed.add(request.DESCRIPTOR.name)
                return bytes(out(change(request)))

            def receive(data: bytes) -> Any:
                reply = back(data)
                changed.add(reply.DESCRIPTOR.name)
                return back(change(reply).SerializeToString())

            changed_ones = {"request_serializer": send, "response_deserializer": receive}
            return plain(method, **options | changed_ones)

        channel.unary_unary = unary_unary  # type: ignore[method-assign]
        return channel

    monkeypatch.setattr(session, "open_channel", open_changed)

    async def it() -> None:
        async with serving(federation) as server:
            sites = [SiteAt(federation, name) for name in ("site-1", "site-2")]
            for site in sites:
                await site.session.training(
                    "Heartbeat", pb.HeartbeatRequest(runs=[pb.RunReport(run=1, phase="idle")])
                )
            await until(lambda: server.clients.live() == {"site-1", "site-2"})
            assert await submit(server) == 1
            await asyncio.gather(*(site.start() for site in sites))
            answers = [await site.train(number) for number, site in enumerate(sites, 1)]
            assert answers == ["accepted", "accepted"]
            assert (await server.control.wait_ended(1)).status == "finished"
            for site in sites:
                await site.session.close("done")

    play(it())
    assert {
        "RegisterRequest", "RegisterReply", "HeartbeatRequest", "GetTaskRequest", "GetTaskReply",
        "SubmitResultRequest", "SubmitResultReply", "RetrieveRequest", "RetrieveReply", "SiteReply",
    } <= changed  # fmt: skip
