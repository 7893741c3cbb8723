import asyncio
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flplatform.client.session import Session
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import save
from flplatform.rpc.channel import TOKEN_KEY, open_channel
from flplatform.rpc.errors import REPLACED_TOKEN
from flplatform.rpc.transfers import fetch_blob, send_blob
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security import audit
from flplatform.security.audit import verify
from flplatform.security.package import Package, PackageManifest
from flplatform.server import server as module
from flplatform.server.server import FATAL_EXIT, FederatedServer, Trust
from flplatform.store.blobs import FileBlobStore
from tests.support.federation import Federation, provision
from tests.support.workflows import job
from tests.unit.server.scene import DEADLINE_S, identity, play, refused, settle, until

REFUSED = 30
"""Calls without a token, one after the other."""


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return provision(tmp_path, reserve_bytes=0, waiting_call_s=20.0)


@asynccontextmanager
async def serving(
    federation: Federation, ends: Callable[[bool], None] = lambda _: None
) -> AsyncIterator[FederatedServer]:
    server = FederatedServer(federation.open("server"), ends)
    try:
        await server.start()
        federation.point_to(server.port, 0)
        yield server
    finally:
        await server.stop()


class SiteAt:
    """A site that speaks the protocol by hand."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.name = name
        kit = federation.open(name)
        self.session = Session(kit, "none", list)
        self.blobs = FileBlobStore(kit.state_folder() / "blobs")
        self.folder = kit.folder

    async def start(self) -> pb.SiteRequest:
        """Wait for a signed start, and accept it."""
        reply = await self.session.admin("Retrieve", pb.RetrieveRequest())
        (request,) = reply.requests
        answer = pb.SiteReply(request_id=request.id, status="ok", body=b'{"isolation": "none"}')
        await self.session.admin("SendReply", answer)
        return request

    async def task(self, *held: str) -> pb.Task:
        reply = await self.session.training("GetTask", pb.GetTaskRequest(held=held))
        (task,) = reply.tasks
        return task

    async def upload(self, task: str, path: Path, ref: ModelRef | None = None) -> ModelRef:
        blob = ref or ModelRef(*digest_of_file(path))
        await self.session.transfer(
            lambda channel, token: send_blob(channel, path, blob, task, token=token)
        )
        return blob

    def trained(self, value: float, name: str = "w") -> Path:
        path = self.folder / f"{secrets.token_hex(4)}.safetensors"
        save(path, {name: np.full(300_000, value, "f4")})
        return path

    async def submit(self, task: pb.Task, blob: ModelRef) -> str:
        outcome = pb.TaskOutcome(
            blob=pb.Blob(digest=blob.digest, size=blob.size),
            examples=10,
            trained_from=task.model.digest,
        )
        request = pb.SubmitResultRequest(task_id=task.id, result=outcome)
        return (await self.session.training("SubmitResult", request)).outcome

    async def train(self, value: float) -> str:
        """Do the open task as a site does."""
        task = await self.task()
        blob = ModelRef(task.model.digest, task.model.size)
        await self.session.transfer(
            lambda channel, token: fetch_blob(channel, blob, self.blobs, token=token)
        )
        return await self.submit(task, await self.upload(task.id, self.trained(value)))


async def submit(server: FederatedServer, **fields: Any) -> int:
    """Open a run at both sites."""
    spec = job(**{"wait_after_min_s": 600.0} | fields)
    model = server.blobs.create(lambda path: save(path, {"w": np.zeros(300_000, "f4")}) and None)
    package = server.blobs.create(lambda path: path.write_bytes(b"the package") and None)
    manifest = PackageManifest(
        project="test",
        job=spec.name,
        author="lead",
        model_digest=model.digest,
        model_size=model.size,
        files=(),
    )
    return await server.runs.submit(
        Package(Path(), identity("lead"), manifest, spec),
        identity("lead"),
        order=b"signed",
        submission_id=secrets.token_hex(16),
        blob=package,
        sites=("site-1", "site-2"),
        min_clients=None,
    )


def test_a_round_over_the_wire(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            one, two = SiteAt(federation, "site-1"), SiteAt(federation, "site-2")
            waiting = asyncio.create_task(
                one.session.training("GetTask", pb.GetTaskRequest(), timeout_s=30)
            )
            await two.session.training("Heartbeat", pb.HeartbeatRequest())
            await until(lambda: server.clients.live() == {"site-1", "site-2"})
            assert await submit(server) == 1
            request = await one.start()
            assert (request.topic, request.signed) == ("start", b"signed")
            body = json.loads(request.body)
            assert body["run"] == 1
            package = ModelRef(body["digest"], body["size"])
            await one.session.transfer(
                lambda channel, token: fetch_blob(channel, package, one.blobs, token=token)
            )
            assert one.blobs.path(package.digest).read_bytes() == b"the package"
            await two.start()
            (task,) = (await waiting).tasks
            assert task.id == "1/1/train/site-1"
            assert await one.train(1.0) == "accepted"
            assert await two.train(3.0) == "accepted"
            view = await server.control.wait_ended(1)
            assert view.status == "finished"
            reply = await one.session.training("GetTask", pb.GetTaskRequest(runs=[1]))
            assert [(item.run, item.status) for item in reply.ended] == [(1, "finished")]
            for site in (one, two):
                await site.session.close("done")
            assert server.clients.live() == set()

    play(it())


def test_what_a_site_may_not_do(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            one, two = SiteAt(federation, "site-1"), SiteAt(federation, "site-2")
            await submit(server)
            await one.start()
            await two.start()
            task = await one.task()
            good = one.trained(1.0)
            blob = ModelRef(*digest_of_file(good))
            bad = one.trained(float("nan"))
            wrong: list[tuple[Any, type[FLError]]] = [
                (two.upload(task.id, good), PermissionDeniedError),
                (one.upload("1/1/train/site-2", good), PermissionDeniedError),
                (one.upload("1/2/train/site-1", good), FailedPreconditionError),
                (one.upload("2/1/train/site-1", good), NotFoundError),
                (one.upload(task.id, bad), ModelFormatError),
                (one.upload(task.id, one.trained(1.0, "v")), ModelFormatError),
                (one.upload(task.id, good, ModelRef(blob.digest, 7)), InvalidArgumentError),
                (one.submit(task, blob), FailedPreconditionError),
                (two.submit(task, blob), PermissionDeniedError),
            ]
            for call, error in wrong:
                assert type(await refused(call)) is error
            assert not server.blobs.has(blob.digest)
            await one.upload(task.id, good)
            assert await one.submit(task, blob) == "accepted"
            assert await one.submit(task, blob) == "duplicate"
            assert type(await refused(one.submit(task, ModelRef("blake3:" + "0" * 64, 1)))) is (
                AlreadyExistsError
            )
            other = ModelRef(*digest_of_file(one.trained(2.0)))
            error = await refused(
                one.session.transfer(
                    lambda channel, token: fetch_blob(channel, blob, two.blobs, token=token)
                )
            )
            assert type(error) is NotFoundError, "an update is nobody's to download"
            assert not server.blobs.has(other.digest)
            await one.session.close("done")
            await two.session.close("done")

    play(it())


def test_a_restart_loses_nothing_but_tokens(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            port = server.port
            one, two = SiteAt(federation, "site-1"), SiteAt(federation, "site-2")
            await submit(server)
            await one.start()
            await two.start()
            task = await one.task()
            path = one.trained(1.0)
            blob = await one.upload(task.id, path)
            assert await one.submit(task, blob) == "accepted"
            tokens = one.session.token, two.session.token
        federation.local("server", "overrides.yml", f'fl_address: "127.0.0.1:{port}"\n')
        async with serving(federation) as server:
            assert server.port == port
            assert server.clients.live() == {"site-1", "site-2"}, "expected"
            assert server.clients.clients() == []
            outcome = await one.session.persist("again", lambda: one.submit(task, blob))
            assert outcome == "duplicate"
            assert await two.session.persist("train", lambda: two.train(3.0)) == "accepted"
            assert (await server.control.wait_ended(1)).status == "finished"
            assert {one.session.token, two.session.token}.isdisjoint(tokens)
            await one.session.close("done")
            await two.session.close("done")

    play(it())


def test_a_site_follows_the_server_to_its_next_address(federation: Federation) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]

    async def it() -> None:
        async with serving(federation) as server:
            addresses = f'["localhost:1", "localhost:{server.port}", "localhost:{free}"]'
            federation.local("site-1", "overrides.yml", f"servers: {addresses}\n")
            one = SiteAt(federation, "site-1")

            async def beat() -> None:
                await one.session.training("Heartbeat", pb.HeartbeatRequest())

            await one.session.persist("beat", beat)
            assert server.clients.live() == {"site-1"}
        federation.local("server", "overrides.yml", f'fl_address: "127.0.0.1:{free}"\n')
        async with serving(federation) as server:
            federation.local("site-1", "overrides.yml", "")
            await one.session.persist("beat", beat)
            assert server.clients.live() == {"site-1"}
            await one.session.close("done")

    play(it())


def test_the_port_may_be_taken(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            other = provision(federation.folder.parent / "other", reserve_bytes=0)
            address = f"127.0.0.1:{server.port}"
            other.local("server", "overrides.yml", f'fl_address: "{address}"\n')
            second = FederatedServer(other.open("server"), lambda _: None)
            error = await refused(second.start())
            assert type(error) is UnavailableError
            assert f"cannot listen on {address}" in str(error)
            assert "local/overrides.yml" in str(error)
            await second.stop()
        other.local("server", "overrides.yml", "")
        async with serving(other):
            pass

    play(it())


def test_one_process_at_a_time_works_on_a_state(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation):
            with pytest.raises(FailedPreconditionError, match="in use by process"):
                FederatedServer(federation.open("server"), lambda _: None)

    play(it())


def test_stopping_does_not_wait_for_waiting_calls(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            one = SiteAt(federation, "site-1")
            await one.session.training("Heartbeat", pb.HeartbeatRequest())
            waiting = [
                asyncio.create_task(one.session.training("GetTask", pb.GetTaskRequest())),
                asyncio.create_task(one.session.admin("Retrieve", pb.RetrieveRequest())),
            ]
            await until(lambda: server.training._changed and server.relay._boxes)
            before = time.monotonic()
        assert time.monotonic() - before < module.DRAIN_S / 2
        for each in waiting:
            assert not (await each).ListFields()
        await one.session.close("done")

    play(it())


def test_a_silent_site_is_dropped(tmp_path: Path) -> None:
    federation = provision(tmp_path, reserve_bytes=0, dead_after_s=0.2)

    async def it() -> None:
        async with serving(federation) as server:
            one = SiteAt(federation, "site-1")
            await one.session.register("")
            assert server.clients.live() == {"site-1"}
            await until(lambda: not server.clients.live())
            await one.session.training("Heartbeat", pb.HeartbeatRequest())
            assert server.clients.live() == {"site-1"}, "it has registered again"
            await one.session.close("done")

    play(it())


def test_health(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            kit = federation.open("site-2")
            async with open_channel(
                f"localhost:{server.port}",
                key_pem=kit.key_pem(),
                chain_pem=kit.chain,
                trusted_pem=kit.trust.tls_roots("server"),
            ) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert server.clients.live() == set(), "asking is not registering"

    play(it())


def test_who_has_ever_registered_is_remembered(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            path = federation.open("server").state_folder() / "sites.json"
            one, two = SiteAt(federation, "site-1"), SiteAt(federation, "site-2")
            await one.session.register("")
            await until(path.exists)
            write = module.write_atomic

            def full(*_: object) -> None:
                raise OSError("no space left")

            monkeypatch.setattr(module, "write_atomic", full)
            await two.session.register("")
            await until(lambda: "no space left" in caplog.text)
            monkeypatch.setattr(module, "write_atomic", write)
            await one.session.close("bye")
            await until(lambda: "site-2" in path.read_text())
            await two.session.close("bye")
        async with serving(federation) as server:
            views = {view.name: (view.state, view.organisation) for view in server.control.sites()}
            assert views == {"site-1": ("away", "site-1"), "site-2": ("away", "site-2")}

    with caplog.at_level(logging.ERROR):
        play(it())


def test_without_a_thread_it_goes_on(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def it() -> None:
        ends: list[bool] = []
        async with serving(federation, ends.append) as server:

            def none(_: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            one = SiteAt(federation, "site-1")
            await settle()  # all loops are at work
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", none)
                server.clients.register(identity("site-2"), "peer")
                await until(lambda: "sites.json cannot be written: no thread" in caplog.text)
            await one.session.register("")
            path = server._sites_file
            await until(lambda: path.exists() and "site-1" in path.read_text())
            assert ends == []
            await one.session.close("bye")

    play(it())


def test_what_a_worker_could_not_begin_is_not_done_for_nobody(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the part of an upload: nobody would let go of it, and the upload could never go on."""

    async def it() -> None:
        async with serving(federation) as server:
            done: list[str] = []

            def none(_: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", none)
                with pytest.raises(ResourceExhaustedError):
                    server.workers.submit(done.append, "refused")
            server.workers.submit(done.append, "later").result()
            assert done == ["later"]

    play(it())


# ---- trust and audit ----------------------------------------------------------------------------


def test_revoking_reaches_a_running_server(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TRUST_RELOAD_S", 0.01)

    async def it() -> None:
        async with serving(federation) as server:
            one, two = SiteAt(federation, "site-1"), SiteAt(federation, "site-2")
            for site in (one, two):
                await site.session.training("Heartbeat", pb.HeartbeatRequest())
            lists = federation.server / "startup" / "crl.pem"
            good = lists.read_bytes()
            lists.write_text("rubbish")
            await until(lambda: "the old ones stay" in caplog.text)
            await one.session.training("Heartbeat", pb.HeartbeatRequest())
            lists.write_bytes(good)
            federation.revoke("site-1")
            serial = federation.open("site-2").trust.revoked
            await until(lambda: server.trust.store.revoked == serial)
            with pytest.raises(aio.AioRpcError, match="revoked"):
                await _heartbeat(one)
            await two.session.training("Heartbeat", pb.HeartbeatRequest())
            await two.session.close("done")
            await one.session._close_channels()
        refusals = [line for line in _audit(federation) if "revoked" in line["reason"]]
        assert refusals
        assert refusals[0]["decision"] == "refused"
        assert refusals[0]["action"].endswith("/Heartbeat")

    async def _heartbeat(site: SiteAt) -> Any:
        stub = pb_grpc.FederatedTrainingStub(site.session._open()[0])
        sent = ((TOKEN_KEY, site.session.token),)
        return await stub.Heartbeat(pb.HeartbeatRequest(), metadata=sent, timeout=30)

    with caplog.at_level(logging.ERROR):
        play(it())


def _audit(federation: Federation) -> list[dict[str, Any]]:
    path = federation.open("server").state_folder() / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_whom_a_certificate_speaks_for(federation: Federation, tmp_path: Path) -> None:
    trust = Trust(federation.open("server"))
    site = federation.open("site-1")
    assert trust.identify("site", site.chain).name == "site-1"
    other = provision(tmp_path / "other", project="elsewhere").open("site-1")
    for kind, kit in (("admin", site), ("site", federation.open("admin")), ("site", other)):
        with pytest.raises(UnauthenticatedError) as caught:
            trust.identify(kind, kit.chain)
        assert caught.value.rule == "identity"
    federation.revoke("site-1")
    trust.identify("site", site.chain)
    trust.store = federation.open("server").trust
    with pytest.raises(UnauthenticatedError, match="revoked"):
        trust.identify("site", site.chain)
    expired = provision(tmp_path / "expired", days=1, now=datetime(2026, 1, 1, tzinfo=UTC))
    chain = (expired.kit("site-1") / "startup" / "participant.crt").read_bytes()
    with pytest.raises(UnauthenticatedError, match="expired"):
        Trust(federation.open("server")).identify("site", chain)


def test_refusals_are_audited_but_for_dead_tokens(federation: Federation) -> None:
    async def it() -> None:
        async with serving(federation) as server:
            server.note_refusal("/m", "a", "peer", PermissionDeniedError("no", rule="r"))
            server.note_refusal("/m", "", "peer", UnauthenticatedError("who?"))
            server.note_refusal("/m", "a", "peer", UnauthenticatedError("dead", rule="token"))
            again = UnauthenticatedError("dead", rule=REPLACED_TOKEN)
            server.note_refusal("/m", "a", "peer", again)
        records = [(line["actor"], line["reason"]) for line in _audit(federation)]
        assert records == [("a", "no (rule: r)"), ("unknown", "who?")]

    play(it())


def test_a_refusal_does_not_wait_until_the_disk_has_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes its time for the audit while a site calls without a token."""
    held, writing, freely = threading.Event(), threading.Event(), audit.sync

    def sync(file: int) -> None:
        writing.set()
        assert held.wait(DEADLINE_S / 2), "somebody waits for the disk on the event loop"
        freely(file)

    async def it() -> None:
        async with serving(federation):
            one, two = SiteAt(federation, "site-1"), SiteAt(federation, "site-2")
            await two.session.register("")
            monkeypatch.setattr(audit, "sync", sync)
            stub = pb_grpc.FederatedTrainingStub(one.session._open()[0])
            for _ in range(REFUSED):
                with pytest.raises(aio.AioRpcError, match="no token"):
                    await stub.GetTask(pb.GetTaskRequest(), timeout=DEADLINE_S)
            await until(writing.is_set)
            await two.session.training("Heartbeat", pb.HeartbeatRequest())
            held.set()
            await two.session.close("done")
            await one.session._close_channels()
        lines = [line for line in _audit(federation) if line["action"].endswith("/GetTask")]
        assert sum(int(line["details"]["times"]) for line in lines) == REFUSED
        assert len(lines) <= 2
        verify(federation.open("server").state_folder() / "audit.jsonl")

    play(it())


def test_a_failed_write_ends_the_process(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)

    async def it() -> None:
        async with serving(federation) as server:
            server._on_fatal(OSError("fsync failed"))

    play(it())
    assert exits == [FATAL_EXIT]
