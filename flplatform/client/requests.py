"""Requests that reach this site through the server: a closed table of topics.

`start` and the signed commands are verified here against the signer's certificate, this site's
own policy and single use, whatever the server says. Each request gets exactly one reply.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Protocol

from pydantic import Field

from flplatform.client.denials import DENIALS
from flplatform.client.policy import Policy
from flplatform.client.seen import SeenIds
from flplatform.client.verbs import Asked, Body, SiteVerb, everyone, own
from flplatform.core.errors import (
    FLError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from flplatform.core.ports import AuditSink
from flplatform.core.strict import FromNewer, parse_json
from flplatform.files.shortage import shortage_in
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.signing import MAX_SKEW_S, CommandOrder, Signed, StartOrder, open_order

log = logging.getLogger(__name__)

MAX_REMEMBERED = 1000


class StartBody(FromNewer):
    """What the server adds to a signed start: the run's number, and where the package is."""

    run: Annotated[int, Field(ge=1, lt=1 << 31)]
    digest: str
    size: Annotated[int, Field(ge=1)]


class PreflightBody(FromNewer):
    """What a signed preflight asks about."""

    job: str
    has_code: bool
    data: tuple[str, ...]
    environment: str
    sites: tuple[str, ...]
    gpus: dict[str, Annotated[int, Field(ge=1)]] = {}
    processes: Annotated[int, Field(ge=1)] = 1

    def processes_at(self, site: str) -> int:
        """Return how many processes are to work on the job at a site."""
        return self.gpus.get(site, self.processes)


class Starter(Protocol):
    """Accepts runs; see `client.site_runs.SiteRuns`."""

    async def accept(
        self,
        signed: Signed,
        order: StartOrder,
        submitter: Identity,
        body: StartBody,
        record: Callable[[], None],
    ) -> Body:
        """Take a run on, or refuse it; `record` writes the audit, which comes before the deed."""

    def recorded(self, signed: Signed, body: StartBody) -> Body | None:
        """Return the answer given to this very start before."""


class RequestAgent:
    """Handles one request at a time per id; remembers replies, so that a repeat is answered alike.

    Args:
        trust: returns the trust store of now.
        verbs: the closed table of signed commands.
        skew_s: how far a signer's clock may be off.
        denials: takes in the signed denials that the server carries.
    """

    def __init__(
        self,
        *,
        trust: Callable[[], TrustStore],
        policy: Policy,
        seen: SeenIds,
        runs: Starter,
        audit: AuditSink,
        verbs: Iterable[SiteVerb],
        skew_s: float = MAX_SKEW_S,
        denials: Callable[[bytes], Body] | None = None,
    ) -> None:
        self._skew_s = skew_s
        self._denials = denials
        self._trust = trust
        self._policy = policy
        self._seen = seen
        self._runs = runs
        self._audit = audit
        self._verbs = {verb.name: verb for verb in verbs}
        self._replies: dict[str, asyncio.Task[pb.SiteReply]] = {}
        self._processes = {"start": self._start, DENIALS: self._deny}

    async def handle(self, request: pb.SiteRequest) -> pb.SiteReply:
        """Carry out a request and return its reply; the same id again gets the same reply."""
        task = self._replies.get(request.id)
        if task is None:
            while len(self._replies) >= MAX_REMEMBERED:
                del self._replies[next(iter(self._replies))]
            task = asyncio.create_task(self._reply(request), name=f"request {request.topic}")
            self._replies[request.id] = task
        return await asyncio.shield(task)

    async def _reply(self, request: pb.SiteRequest) -> pb.SiteReply:
        actor: dict[str, str] = {"name": "unverified", "role": ""}
        try:
            process = self._processes.get(request.topic, self._command)
            body = json.dumps(await process(request, actor)).encode()
        except FLError as error:
            forged = isinstance(error, UnauthenticatedError)
            refused = forged or isinstance(error, PermissionDeniedError)
            log.warning("%s of %s refused: %s", request.topic, actor["name"], error)
            self._note(actor, request, "refused" if refused else "failed", str(error))
            return pb.SiteReply(
                request_id=request.id,
                status="refused" if refused else "error",
                message=error.message,
                rule=error.rule or ("signature" if forged else ""),
            )
        except Exception as error:
            if shortage := shortage_in(error):
                message, rule = str(shortage), shortage.rule
                log.warning("%s of %s failed: %s", request.topic, actor["name"], shortage)
            else:
                message, rule = "internal error at the site", ""
                log.exception("%s failed", request.topic)
            self._note(actor, request, "failed", str(error))
            return pb.SiteReply(request_id=request.id, status="error", message=message, rule=rule)
        return pb.SiteReply(request_id=request.id, status="ok", body=body)

    def _note(self, actor: Body, request: pb.SiteRequest, decision: str, reason: str) -> None:
        try:
            self._audit.record(
                actor,
                request.topic,
                decision,
                reason=reason,
                details=_shared(actor),
                correlation_id=request.id,
            )
        except OSError as error:
            log.error("the audit cannot be written: %s", error)

    async def _start(self, request: pb.SiteRequest, actor: dict[str, str]) -> Body:
        body = parse_json(StartBody, request.body, "start")
        signed = _signed(request)
        if (answer := self._runs.recorded(signed, body)) is not None:
            return answer
        identity, order = open_order(
            StartOrder, signed, self._trust(), datetime.now(UTC), self._skew_s
        )
        actor.update(identity.as_actor(), order=order.submission_id)
        record = partial(self._allow, actor, request)
        return await self._runs.accept(signed, order, identity, body, record)

    async def _deny(self, request: pb.SiteRequest, actor: dict[str, str]) -> Body:
        """Take in denials, each of them signed by itself; the audit names those that are news."""
        if self._denials is None:
            raise PermissionDeniedError("sites do not obey denials", rule="closed verb table")
        actor.update(name="server", role="carrier")
        self._audit.record(actor, request.topic, "carried", correlation_id=request.id)
        return await asyncio.to_thread(self._denials, request.body)

    async def _command(self, request: pb.SiteRequest, actor: dict[str, str]) -> Body:
        now = datetime.now(UTC)
        identity, order = open_order(
            CommandOrder, _signed(request), self._trust(), now, self._skew_s
        )
        actor.update(identity.as_actor(), order=order.id)
        name = order.argv[0]
        if name != request.topic:
            raise PermissionDeniedError(
                f"{identity.name} signed {name!r}, the server asks for {request.topic!r}",
                rule="signed verb",
            )
        if (verb := self._verbs.get(name)) is None:
            raise PermissionDeniedError(f"sites do not obey {name!r}", rule="closed verb table")
        self._policy.check_command(identity, order.argv, verb)
        if not verb.repeatable:
            self._use_up(order, verb)
        asked = Asked(request.id, identity, order, request.body)
        if not verb.mutating:
            return await verb.act(asked)
        return await self._audited(actor, request, lambda: verb.act(asked))

    def _use_up(self, order: CommandOrder, verb: SiteVerb) -> None:
        try:
            self._seen.use(order.id, order.not_after)
        except OSError as error:
            # A look at a site whose disk is full is how somebody finds that out. Until the id is on
            # the disk, with the next that is, it counts once in this process, see `SeenIds.use`.
            if verb.mutating or verb.permission != "view" or not shortage_in(error):
                raise

    async def _audited(
        self,
        actor: Mapping[str, str],
        request: pb.SiteRequest,
        act: Callable[[], Awaitable[Body]],
    ) -> Body:
        """Write the audit first: what cannot be recorded must not happen."""
        self._allow(actor, request)
        return await act()

    def _allow(self, actor: Mapping[str, str], request: pb.SiteRequest) -> None:
        self._audit.record(
            actor, request.topic, "allowed", details=_shared(actor), correlation_id=request.id
        )


def _shared(actor: Mapping[str, str]) -> dict[str, str]:
    """Return the id of the signed order, under which the server's audit knows the command too."""
    return {"order": actor["order"]} if "order" in actor else {}


def _signed(request: pb.SiteRequest) -> Signed:
    if not request.signed:
        raise PermissionDeniedError(f"{request.topic} came without a signature", rule="unsigned")
    return Signed.from_bytes(request.signed)


def basic_verbs(
    policy: Policy, stop: Callable[[bool], None], facts: Mapping[str, Callable[[], Body]]
) -> list[SiteVerb]:
    """Return the verbs that every site has.

    Args:
        policy: answers preflights.
        stop: ends this process, restarting if told so.
        facts: `sys_info` and `check_status` answers.
    """

    async def preflight(asked: Asked) -> Body:
        if len(asked.order.argv) < 2:
            raise InvalidArgumentError("asks about nothing", field="preflight")
        question = parse_json(PreflightBody, asked.order.argv[1], "preflight")
        plan = policy.check_job(
            asked.signer,
            asked.signer,
            has_code=question.has_code,
            data=question.data,
            environment=question.environment,
            processes=question.processes_at(policy.site),
        )
        return {"isolation": plan.isolation}

    async def tell(asked: Asked) -> Body:
        return facts[asked.order.argv[0]]()

    async def end(asked: Asked) -> Body:
        stop(asked.order.argv[0] == "restart")
        return {}

    return [
        SiteVerb("preflight", "train", preflight, reaches=everyone, submitter=own),
        SiteVerb("check_status", "view", tell),
        SiteVerb("sys_info", "operate", tell),
        SiteVerb("shutdown", "operate", end, mutating=True),
        SiteVerb("restart", "operate", end, mutating=True),
    ]
