"""`SiteClient`: a site's parent process. It owns the parts, starts and stops them in order."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flplatform.client.denials import DenialBook
from flplatform.client.deploying import deploy_verb
from flplatform.client.logs import SiteLogs
from flplatform.client.officer import Officer
from flplatform.client.policy import Policy
from flplatform.client.policy_file import PolicyFile
from flplatform.client.requests import RequestAgent, basic_verbs
from flplatform.client.run_verbs import delete_verb
from flplatform.client.sandbox import available_level, sweep_scratch
from flplatform.client.seen import SeenIds
from flplatform.client.session import WAITING_CALL_S, Session
from flplatform.client.shell import SiteShell
from flplatform.client.site_runs import SiteRuns
from flplatform.client.spool import Spool
from flplatform.client.stats import stats_verbs
from flplatform.client.task_loop import TaskLoop
from flplatform.client.troubles import Troubles
from flplatform.client.validating import validation_verb
from flplatform.client.verbs import SiteVerb
from flplatform.client.why import why_verb
from flplatform.core.config import Isolation
from flplatform.core.errors import FLError
from flplatform.core.messages import ModelRef
from flplatform.files.counters import watch_loop
from flplatform.files.durable import private_dir
from flplatform.files.loops import supervise
from flplatform.files.system import system_info
from flplatform.files.threads import in_thread
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.audit import AuditLog, KitSeal
from flplatform.security.identity import TrustStore
from flplatform.security.kit import Kit
from flplatform.store.blobs import FileBlobStore

log = logging.getLogger(__name__)

TRUST_RELOAD_S = 30.0
POLICY_RELOAD_S = 5.0
REPLY_S = 2.0
"""How long a process that ends waits for its last replies to be sent."""

METRICS_WAITING = 1000
"""Points that wait to be sent; while the server is away further ones are dropped."""


class SiteClient:
    """A site that registers, obeys signed orders within its own policy, and does tasks.

    Args:
        kit: the site's verified kit.
        end: called with whether to restart, when an admin ends the process.
    """

    def __init__(self, kit: Kit, end: Callable[[bool], None]) -> None:
        folder = private_dir(kit.state_folder())
        level = available_level()
        log.info("isolation of job code: %s (%s)", level.name, level.reason)
        self._kit = kit
        self._isolation: Isolation = level.name
        self._trust = kit.trust
        self._audit = AuditLog(folder / "audit.jsonl", kit.identity.name, seal=KitSeal(kit))
        self._metrics: asyncio.Queue[bytes] = asyncio.Queue(METRICS_WAITING)
        self._denials = DenialBook(
            folder / "denials.json", self._current_trust, kit.site.clock_skew_s
        )
        self._policy_file = PolicyFile(kit.folder / "local" / "policy.yml", kit.local.site_policy)
        policy = Policy(kit, level.name, self._denials.denials, lambda: self._policy_file.policy)
        reserve_bytes = kit.local.resources.reserve_bytes
        blobs = FileBlobStore(folder / "blobs", reserve_bytes, copies=True)
        self._blobs = blobs
        self._downloads = Troubles()
        self._session = Session(kit, level.name, lambda: self._runs.numbers())
        self._logs = SiteLogs(
            private_dir(kit.folder / "logs"),
            self._send_logs,
            over=lambda run: self._runs.over(run),
            submitter=lambda run: self._runs.submitter(run),
        )
        spool = Spool(folder / "spool")
        self._runs = SiteRuns(
            kit,
            policy,
            self._fetch,
            spool,
            lambda run: self._tasks.stop(run),
            self._current_trust,
            self._on_metric,
            self._logs.publish,
            self._logs.ended,
        )
        self._tasks = TaskLoop(
            self._session,
            self._runs,
            spool,
            blobs,
            kit.local.site_policy,
            folder / "work",
            kit.local.resources.blob_cache_bytes,
        )
        verbs = self._verbs(policy, end)
        self._policy_file.load([verb.name for verb in verbs])
        self._tasks.policy = self._policy_file.policy
        self._agent = RequestAgent(
            trust=self._current_trust,
            policy=policy,
            seen=SeenIds(folder / "seen.json", kit.site.clock_skew_s),
            skew_s=kit.site.clock_skew_s,
            runs=self._runs,
            audit=self._audit,
            verbs=verbs,
            denials=self._denials.take,
        )
        self._end = end
        self._loops: list[asyncio.Task[None]] = []
        self._replies: set[asyncio.Task[None]] = set()
        self._received: list[str] = []

    def _verbs(self, policy: Policy, end: Callable[[bool], None]) -> list[SiteVerb]:
        """Return the closed table of signed commands; a new one is added here."""
        facts = {"sys_info": self._system, "check_status": self._status}
        officer = Officer(
            self._kit,
            policy,
            self._policy_file,
            self._audit.path,
            KitSeal(self._kit),
            self._isolation,
            self._runs.busy,
        )
        verbs = [
            *officer.verbs(),
            *basic_verbs(policy, end, facts),
            deploy_verb(policy),
            validation_verb(policy, self._runs.busy),
            delete_verb(self._runs, self._kit.folder / "logs", self._kit.state_folder() / "runs"),
            why_verb(self._runs, self._downloads, self._kit.state_folder()),
            *SiteShell(
                self._kit, lambda: self._policy_file.policy, self._audit, self._isolation
            ).verbs(),
            self._logs.verb(),
            *stats_verbs(
                self._tasks.counters,
                lambda: len(self._runs.numbers()),
                lambda: self._session.registrations,
            ),
        ]
        officer.know(verbs)
        return verbs

    def _current_trust(self) -> TrustStore:
        return self._trust

    async def _fetch(self, blob: ModelRef) -> Path:
        return await self._tasks.fetch(blob, self._downloads)

    async def start(self) -> Mapping[str, Any]:
        """Bring accepted runs back and begin to serve; the server need not be there yet."""
        self._runs.open(self._blobs.path)
        loops = {
            "tasks": self._tasks.run(),
            "requests": self._session.repeat("get requests", self._retrieve),
            "heartbeat": self._session.repeat("heartbeat", self._beat),
            "metrics": self._session.repeat("send metrics", self._send_metric),
            "trust": self._keep_trust_fresh(),
            "loop": watch_loop(self._tasks.counters.took),
            "policy": self._keep_policy_fresh(),
        }
        sweeping = in_thread(sweep_scratch, self._kit.folder)
        self._loops = [*supervise(loops, self._end), asyncio.create_task(sweeping, name="sweep")]
        return {"isolation": self._isolation}

    async def stop(self) -> None:
        """End all work and say goodbye; spooled results and accepted runs stay."""
        if self._replies:  # among them the answer to the command that ends this process
            await asyncio.wait(self._replies, timeout=REPLY_S)
        for loop in (*self._loops, *self._replies):
            loop.cancel()
        await asyncio.gather(*self._loops, *self._replies, return_exceptions=True)
        await self._logs.close()
        await self._tasks.close()
        await self._runs.close()
        await self._session.close("stopped")
        self._audit.close()

    # ---- loops ----

    async def _beat(self) -> None:
        reports = [
            pb.RunReport(run=run, round=number, phase=phase, since_s=since, isolation=isolation)
            for run, number, phase, since, isolation in self._runs.reports()
        ]
        await self._session.training("Heartbeat", pb.HeartbeatRequest(runs=reports))
        await asyncio.sleep(self._session.heartbeat_s)

    async def _retrieve(self) -> None:
        request = pb.RetrieveRequest(received=self._received)
        reply = await self._session.admin("Retrieve", request, WAITING_CALL_S)
        self._received = [item.id for item in reply.requests]
        for item in reply.requests:
            task = asyncio.create_task(self._answer(item), name=f"reply {item.topic}")
            self._replies.add(task)
            task.add_done_callback(self._replies.discard)

    async def _answer(self, request: pb.SiteRequest) -> None:
        reply = await self._agent.handle(request)
        try:
            await self._session.persist(
                f"reply to {request.topic}", lambda: self._session.admin("SendReply", reply)
            )
        except FLError as error:
            log.debug("reply to %s: %s", request.topic, error)  # nobody waits for it any more

    async def _send_logs(self, batch: bytes) -> None:
        result = pb.SiteResult(topic="logs", body=batch)
        await self._session.persist("send logs", lambda: self._session.admin("SendResult", result))

    async def _send_metric(self) -> None:
        body = await self._metrics.get()
        try:
            await self._session.admin("SendResult", pb.SiteResult(topic="metrics", body=body))
        except FLError as error:  # progress only: losing a point changes no model
            log.debug("a metric is lost: %s", error)

    def _on_metric(self, run: int, number: int, name: str, value: float, step: int | None) -> None:
        if not self._metrics.full():
            point = {"run": run, "round": number, "name": name, "value": value, "step": step}
            self._metrics.put_nowait(json.dumps(point).encode())

    async def _keep_trust_fresh(self) -> None:
        while True:
            await asyncio.sleep(TRUST_RELOAD_S)
            try:
                self._trust = await asyncio.to_thread(self._kit.reload_trust)
            except Exception as error:  # noqa: BLE001 - whatever is wrong, it must look again
                known = isinstance(error, FLError | OSError)
                log.error(
                    "revocation lists not reloaded, the old ones stay: %s",
                    error,
                    exc_info=None if known else error,
                )

    async def _keep_policy_fresh(self) -> None:
        while True:
            await asyncio.sleep(POLICY_RELOAD_S)
            if await asyncio.to_thread(self._policy_file.reload):
                self._tasks.policy = self._policy_file.policy

    # ---- facts ----

    def _system(self) -> Mapping[str, Any]:
        return {**system_info(self._kit.state_folder()), "isolation": self._isolation}

    def _status(self) -> Mapping[str, Any]:
        days = (self._kit.identity.not_after - datetime.now(UTC)).total_seconds() / 86400
        runs: list[dict[str, Any]] = []
        processes = {each.run: each.plan.processes for each in self._runs.all()}
        for run, number, phase, since, isolation in self._runs.reports():
            report = {"run": run, "round": number, "phase": phase, "since_s": since}
            runs.append({**report, "isolation": isolation, "processes": processes.get(run, 0)})
        return {"isolation": self._isolation, "runs": runs, "certificate_days": days}
