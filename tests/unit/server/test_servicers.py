import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flplatform.core.errors import FailedPreconditionError, FLError, InvalidArgumentError
from flplatform.rpc import interceptors
from flplatform.rpc.channel import CHUNK_BYTES
from flplatform.rpc.streams import DOWNLOAD, UPLOAD
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server import servicers
from flplatform.server.metric_log import MetricLog
from flplatform.server.servicers import (
    FL_RULES,
    PROTOCOL,
    AdminCommunicatingServicer,
    FederatedTrainingServicer,
)
from tests.unit.server.scene import Scene, caller, play, refused, settle, until


@contextmanager
def calling(name: str) -> Iterator[None]:
    """As if the call came from this site."""
    token = interceptors._CALLER.set(caller(name))
    try:
        yield
    finally:
        interceptors._CALLER.reset(token)


@pytest.fixture
def training(scene: Scene) -> FederatedTrainingServicer:
    return FederatedTrainingServicer(scene.clients, scene.relay, scene.training, 10.0)


@pytest.fixture
def admin(scene: Scene, tmp_path: Path) -> AdminCommunicatingServicer:
    metrics = MetricLog(tmp_path / "metrics", lambda *_: True)
    return AdminCommunicatingServicer(scene.relay, (metrics,), 5.0)


async def register(
    training: FederatedTrainingServicer, name: str, **fields: Any
) -> pb.RegisterReply:
    request = pb.RegisterRequest(**{"protocol": PROTOCOL} | fields)
    with calling(name):
        return await training.Register(request, None)


def test_every_method_of_the_wire_has_a_rule() -> None:
    services = pb.DESCRIPTOR.services_by_name
    declared = {
        f"/{services[name].full_name}/{method.name}"
        for name in ("FederatedTraining", "AdminCommunicating")
        for method in services[name].methods
    }
    assert set(FL_RULES) == declared | {UPLOAD, DOWNLOAD}
    assert [name for name, rule in FL_RULES.items() if not rule.token] == [
        "/flplatform.v1.FederatedTraining/Register"
    ]


def test_registering(scene: Scene, training: FederatedTrainingServicer) -> None:
    async def it() -> None:
        reply = await register(training, "a", version="v" * 99, isolation="sandbox")
        assert (reply.heartbeat_s, reply.dead_after_s, reply.chunk_bytes) == (10, 60, CHUNK_BYTES)
        client = scene.clients.get("a")
        assert (client.version, client.isolation, client.peer) == ("v" * 50, "sandbox", "peer")
        scene.clients.check_token(client.identity, reply.token)

    play(it())


@pytest.mark.parametrize("protocol", [0, 2, 99])
def test_another_protocol_is_refused(
    scene: Scene, training: FederatedTrainingServicer, protocol: int
) -> None:
    async def it() -> None:
        error = await refused(register(training, "a", protocol=protocol))
        assert (type(error), error.rule) == (FailedPreconditionError, "protocol")
        assert scene.clients.get("a") is None

    play(it())


def test_who_registers_again_gets_its_requests_again(
    scene: Scene, training: FederatedTrainingServicer, admin: AdminCommunicatingServicer
) -> None:
    async def it() -> None:
        await register(training, "a")
        scene.relay.post("a", "start")
        with calling("a"):
            (request,) = (await admin.Retrieve(pb.RetrieveRequest(), None)).requests
            named = pb.RetrieveRequest(received=[request.id])
            waiting = asyncio.create_task(admin.Retrieve(named, None))
        await settle()
        assert not waiting.done()
        await register(training, "a")
        assert [again.id for again in (await waiting).requests] == [request.id]

    play(it())


@pytest.mark.parametrize(
    ("since_s", "age_s"),
    [(5.0, 5.0), (0.0, 0.0), (-7.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0)],
)
def test_heartbeats(
    scene: Scene,
    training: FederatedTrainingServicer,
    monkeypatch: pytest.MonkeyPatch,
    since_s: float,
    age_s: float,
) -> None:
    monkeypatch.setattr(servicers.time, "monotonic", lambda: 100.0)

    async def it() -> None:
        await register(training, "a")
        report = pb.RunReport(run=1, round=2, phase="p" * 99, since_s=since_s, isolation="i" * 99)
        with calling("a"):
            await training.Heartbeat(pb.HeartbeatRequest(runs=[report]), None)
        (kept,) = scene.clients.get("a").reports
        assert (kept.run, kept.round, kept.phase, kept.isolation) == (1, 2, "p" * 60, "i" * 20)
        assert 100.0 - kept.since == age_s

    play(it())


def test_quitting(scene: Scene, training: FederatedTrainingServicer) -> None:
    async def it() -> None:
        await register(training, "a")
        with calling("a"):
            await training.Quit(pb.QuitRequest(reason="stopped"), None)
        assert scene.clients.live() == set()

    play(it())


def test_tasks_on_the_wire(scene: Scene, training: FederatedTrainingServicer) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit(workflow=["cross_site_validation"])
        with calling("a"):
            reply = await training.GetTask(pb.GetTaskRequest(runs=[1, 8]), None)
            (ended,) = reply.ended
            assert (ended.run, ended.status) == (8, "unknown")
            await until(lambda: scene.runs.tasks.of("a"))
            reply = await training.GetTask(pb.GetTaskRequest(), None)
        (task,) = reply.tasks
        assert (task.id, task.run, task.round, task.kind) == (
            "1/0/submit_model/a",
            1,
            0,
            "submit_model",
        )
        assert not task.HasField("model")
        await scene.do("a")
        await scene.do("b")
        await until(lambda: scene.runs.tasks.of("a"))
        with calling("a"):
            reply = await training.GetTask(pb.GetTaskRequest(), None)
            assert [task.kind for task in reply.tasks] == [
                "validate.a",
                "validate.b",
                "validate.global",
            ]
            assert reply.tasks[0].model.size > 0
            assert reply.tasks[0].seed == scene.runs.tasks.of("a")[0].seed
            request = scene.result(scene.runs.tasks.of("a")[0])
            assert (await training.SubmitResult(request, None)).outcome == "accepted"
            assert (await training.SubmitResult(request, None)).outcome == "duplicate"
        await scene.close()

    play(it())


def test_requests_and_replies(scene: Scene, admin: AdminCommunicatingServicer) -> None:
    async def it() -> None:
        future = scene.relay.post("a", "sys_info", signed=b"s")
        with calling("b"):
            waiting = asyncio.create_task(admin.Retrieve(pb.RetrieveRequest(), None))
        with calling("a"):
            (request,) = (await admin.Retrieve(pb.RetrieveRequest(), None)).requests
            assert (request.topic, request.signed) == ("sys_info", b"s")
            await admin.SendReply(pb.SiteReply(request_id=request.id, status="ok"), None)
        assert (await future).status == "ok"
        assert not waiting.done()
        waiting.cancel()

    play(it())


def test_results_by_topic(tmp_path: Path, admin: AdminCommunicatingServicer) -> None:
    body = b'{"run": 1, "round": 1, "name": "loss", "value": 1.5, "step": null}'

    async def it() -> None:
        with calling("a"):
            await admin.SendResult(pb.SiteResult(topic="metrics", body=body), None)
            error = await refused(admin.SendResult(pb.SiteResult(topic="x" * 99), None))
        assert (type(error), error.field) == (InvalidArgumentError, "topic")

    play(it())
    assert (tmp_path / "metrics" / "run-1.jsonl").exists()


def test_lists_are_bounded(
    training: FederatedTrainingServicer,
    admin: AdminCommunicatingServicer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servicers, "MAX_ITEMS", 2)
    calls = [
        training.Heartbeat(pb.HeartbeatRequest(runs=[pb.RunReport()] * 3), None),
        training.GetTask(pb.GetTaskRequest(held=["x"] * 3), None),
        training.GetTask(pb.GetTaskRequest(runs=[1] * 3), None),
        admin.Retrieve(pb.RetrieveRequest(received=["x"] * 3), None),
    ]

    async def it() -> list[FLError]:
        with calling("a"):
            return [await refused(call) for call in calls]

    async def check() -> None:
        assert {type(error) for error in await it()} == {InvalidArgumentError}

    play(check())


def test_results_go_to_the_processor_of_their_topic(scene: Scene) -> None:
    class Processor:
        def __init__(self, topic: str) -> None:
            self.topic = topic
            self.taken: list[tuple[str, bytes]] = []

        def process(self, site: str, body: bytes) -> None:
            self.taken.append((site, body))

    metrics, logs = Processor("metrics"), Processor("logs")
    servicer = AdminCommunicatingServicer(scene.relay, iter((metrics, logs)), 5.0)

    async def it() -> None:
        with calling("a"):
            await servicer.SendResult(pb.SiteResult(topic="logs", body=b"lines"), None)
            await refused(servicer.SendResult(pb.SiteResult(topic="else"), None))
        assert (metrics.taken, logs.taken) == ([], [("a", b"lines")])

    play(it())
