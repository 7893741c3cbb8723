"""The FL port: decode → one call → encode. Who calls is known from the certificate."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from flplatform.core.errors import FailedPreconditionError, FLError, InvalidArgumentError
from flplatform.rpc.channel import CHUNK_BYTES
from flplatform.rpc.interceptors import Rule, caller
from flplatform.rpc.streams import DOWNLOAD, UPLOAD
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.server.client_manager import ClientManager, RunReport
from flplatform.server.relay import RequestRelay
from flplatform.server.training import TrainingService

PROTOCOL = 1
"""The wire protocol of this release; see federated.proto."""

MAX_ITEMS = 10_000

FL_RULES = {
    "/flplatform.v1.FederatedTraining/Register": Rule(token=False),
    "/flplatform.v1.FederatedTraining/Heartbeat": Rule(),
    "/flplatform.v1.FederatedTraining/Quit": Rule(),
    "/flplatform.v1.FederatedTraining/GetTask": Rule(),
    "/flplatform.v1.FederatedTraining/SubmitResult": Rule(),
    "/flplatform.v1.AdminCommunicating/Retrieve": Rule(),
    "/flplatform.v1.AdminCommunicating/SendReply": Rule(),
    "/flplatform.v1.AdminCommunicating/SendResult": Rule(),
    UPLOAD: Rule(),
    DOWNLOAD: Rule(),
}
"""What each method of the FL port demands; one that is missing is refused."""


class FederatedTrainingServicer(pb_grpc.FederatedTrainingServicer):
    """Registration, liveness, tasks and results."""

    def __init__(
        self,
        clients: ClientManager,
        relay: RequestRelay,
        training: TrainingService,
        heartbeat_s: float,
        refused: Callable[[str, str, FLError], None] = lambda *_: None,
        registered: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._refused = refused
        self._registered = registered
        self._clients = clients
        self._relay = relay
        self._training = training
        self._heartbeat_s = heartbeat_s

    async def Register(self, request: pb.RegisterRequest, _context: Any) -> pb.RegisterReply:
        """Admit the calling site."""
        try:
            return self._register(request)
        except FLError as error:
            self._refused(caller().identity.name, "Register", error)
            raise

    def _register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        if request.protocol != PROTOCOL:
            raise FailedPreconditionError(
                f"this server speaks protocol {PROTOCOL}, the site {request.protocol}",
                rule="protocol",
                hint="install the server's release of flplatform at the site",
            )
        me = caller()
        token = self._clients.register(
            me.identity, me.peer, request.version[:50], request.isolation[:20]
        )
        self._relay.reset(me.identity.name)
        self._registered(me.identity.name)
        return pb.RegisterReply(
            token=token,
            heartbeat_s=self._heartbeat_s,
            dead_after_s=self._clients.dead_after_s,
            chunk_bytes=CHUNK_BYTES,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, _context: Any) -> pb.HeartbeatReply:
        """Take in what the calling site is doing."""
        now = time.monotonic()
        _bounded(request.runs, "runs")
        self._clients.heartbeat(
            caller().identity.name,
            (
                RunReport(
                    report.run,
                    report.round,
                    report.phase[:60],
                    now - (max(0.0, report.since_s) if math.isfinite(report.since_s) else 0.0),
                    report.isolation[:20],
                )
                for report in request.runs
            ),
        )
        return pb.HeartbeatReply()

    async def Quit(self, _request: pb.QuitRequest, _context: Any) -> pb.QuitReply:
        """Let the calling site go."""
        self._clients.remove(caller().identity.name)
        return pb.QuitReply()

    async def GetTask(self, request: pb.GetTaskRequest, _context: Any) -> pb.GetTaskReply:
        """Wait for the calling site's open tasks to change."""
        _bounded(request.held, "held")
        _bounded(request.runs, "runs")
        tasks, ended = await self._training.get_task(
            caller().identity.name, request.held, request.runs
        )
        reply = pb.GetTaskReply()
        for task in tasks:
            reply.tasks.add(
                id=str(task.id),
                model=pb.Blob(digest=task.model.digest, size=task.model.size)
                if task.model
                else None,
                seed=task.seed,
                run=task.id.run,
                round=task.id.round,
                kind=task.id.kind,
                codec=task.codec,
                wire=pb.Blob(digest=task.wire.digest, size=task.wire.size) if task.wire else None,
                wire_codec=task.wire_codec,
            )
        for run, status in ended.items():
            reply.ended.add(run=run, status=status)
        return reply

    async def SubmitResult(
        self, request: pb.SubmitResultRequest, _context: Any
    ) -> pb.SubmitResultReply:
        """Bind a result of the calling site to its task."""
        outcome = await self._training.submit_result(caller().identity.name, request)
        return pb.SubmitResultReply(outcome=outcome)


class SiteResultProcessor(Protocol):
    """Takes asynchronous results of one topic."""

    @property
    def topic(self) -> str:
        """The topic."""

    def process(self, site: str, body: bytes) -> None:
        """Take one result of a site; it is untrusted.

        Raises:
            FLError: refused.
        """


class AdminCommunicatingServicer(pb_grpc.AdminCommunicatingServicer):
    """Requests to sites and what comes back.

    Args:
        relay: holds the requests.
        processors: take asynchronous results, each those of its topic.
        wait_s: how long a waiting call waits.
    """

    def __init__(
        self, relay: RequestRelay, processors: Iterable[SiteResultProcessor], wait_s: float
    ) -> None:
        self._wait_s = wait_s
        self._relay = relay
        self._processors = {processor.topic: processor for processor in processors}

    async def Retrieve(self, request: pb.RetrieveRequest, _context: Any) -> pb.RetrieveReply:
        """Wait for requests to the calling site."""
        _bounded(request.received, "received")
        requests = await self._relay.retrieve(
            caller().identity.name, request.received, self._wait_s
        )
        return pb.RetrieveReply(requests=requests)

    async def SendReply(self, request: pb.SiteReply, _context: Any) -> pb.Empty:
        """Take in the calling site's reply to one request."""
        self._relay.reply(caller().identity.name, request)
        return pb.Empty()

    async def SendResult(self, request: pb.SiteResult, _context: Any) -> pb.Empty:
        """Take in an asynchronous result of the calling site."""
        processor = self._processors.get(request.topic)
        if processor is None:
            raise InvalidArgumentError(
                f"nobody processes {request.topic[:60]!r} results", field="topic"
            )
        processor.process(caller().identity.name, request.body)
        return pb.Empty()


def _bounded(items: Any, field: str) -> None:
    if len(items) > MAX_ITEMS:
        raise InvalidArgumentError(f"has more than {MAX_ITEMS} entries", field=field)
