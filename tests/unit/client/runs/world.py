"""A site that takes runs on, without a server and without real processes."""

import asyncio
import dataclasses
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flplatform.client.policy import Policy
from flplatform.client.requests import StartBody
from flplatform.client.site_run import SiteRun
from flplatform.client.site_runs import SiteRuns
from flplatform.client.spool import Spool
from flplatform.core.config import Dataset, Datasets, Environment, Environments, SitePolicy
from flplatform.core.errors import PermissionDeniedError
from flplatform.core.messages import ModelRef, Task, TaskId
from flplatform.security.kit import Local
from flplatform.security.package import pack
from flplatform.security.signing import StartOrder, sign_order
from flplatform.store.blobs import FileBlobStore

JOB = "name: tiny\nexecutor: {module: job}\ninitial_model: {file: m}\nargs: {lr: 1}\n"
MODEL = ModelRef("blake3:" + "0" * 64, 100)
TASK = Task(TaskId(1, 4, "train", "site-1"), 5)


class FakeProcess:
    """A `RunProcess` that starts nothing.

    Attributes:
        made: all of them, the newest last.
        gate: what `start` waits for.
        script: what the next calls of `execute` come to; then `done`.
    """

    made: list["FakeProcess"]
    gate: asyncio.Event | None
    script: list[BaseException]

    def __init__(self, spec, on_phase, on_metric):
        self.spec, self.on_phase, self.on_metric = spec, on_phase, on_metric
        self.state = "made"
        self.spent = False
        self.made.append(self)

    async def start(self):
        self.state = "starting"
        try:
            if self.gate:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.state = "cancelled"
            raise
        self.state = "running"

    async def execute(self, task, model, work):
        assert self.state == "running"
        outcome = self.script.pop(0) if self.script else "done"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def abort(self):
        self.state = "aborted"


class World:
    """A site's folder, and a server that offers packages."""

    def __init__(self, people, folder: Path) -> None:
        self.people, self.folder = people, folder
        self.kit = dataclasses.replace(people.kit, folder=folder)
        self.trust = people.kit.trust
        self.blobs = FileBlobStore(folder / "blobs")
        self.fetched: list[str] = []
        self.stopped: list[int] = []
        self.metrics: list[tuple[object, ...]] = []
        self.gate: asyncio.Event | None = None

    def local(self, max_runs: int = 5, **policy) -> None:
        environments = {"default": Environment(max_runs=max_runs), "fast": Environment()}
        local = Local(
            site_policy=SitePolicy(**policy), environments=Environments(environments=environments)
        )
        self.kit = dataclasses.replace(self.kit, local=local)

    async def fetch(self, blob: ModelRef) -> Path:
        self.fetched.append(blob.digest)
        if self.gate:
            await self.gate.wait()
        return self.blobs.path(blob.digest)

    def spool(self) -> Spool:
        return Spool(self.kit.state_folder() / "spool")

    async def stop_tasks(self, run: int) -> None:
        self.stopped.append(run)

    def runs(self) -> SiteRuns:
        """The runs of a process that has just been started."""
        policy = Policy(self.kit, "sandbox")
        runs = SiteRuns(
            self.kit,
            policy,
            self.fetch,
            self.spool(),
            self.stop_tasks,
            lambda: self.trust,
            lambda *m: self.metrics.append(m),
        )
        runs.open(self.blobs.path)
        return runs

    def mount(self, path: Path) -> None:
        """Map the dataset `mnist` to a path."""
        mnist = Datasets(datasets={"mnist": Dataset(path=str(path), allow=("any",))})
        self.kit = dataclasses.replace(
            self.kit, local=dataclasses.replace(self.kit.local, datasets=mnist)
        )

    def packed(
        self, who: str = "amy", environment: str = "default", code: str = "x = 1", text: str = JOB
    ) -> bytes:
        key, certificate = self.people.signers[who]
        text = f"{text}environment: {environment}\n"
        files = {"job.yml": text.encode(), "code/job.py": code.encode()}
        fields = {"project": "test", "author": who, "job": "tiny"}
        return pack(files, MODEL, **fields, key=key, certificate=certificate)

    def offer(self, run: int = 1, number: int = 1, who: str = "amy", data: bytes = b"", **order):
        """Sign a start of a package and return what `accept` takes."""
        data = data or self.packed()
        blob = self.blobs.create(lambda path: path.write_bytes(data))
        now = datetime.now(UTC)
        fields = {
            "project": "test",
            "issued_at": now,
            "not_after": now + timedelta(hours=1),
            "submission_id": f"{number:032x}",
            "job_digest": blob.digest.partition(":")[2],
            "sites": ("site-1", "site-2"),
        }
        start = StartOrder(**fields | order)
        identity = self.people.before.verify_chain(self.people.signers[who][1], "admin")
        signed = sign_order(start, *self.people.signers[who])
        return signed, start, identity, StartBody(run=run, digest=blob.digest, size=blob.size)

    @property
    def home(self) -> Path:
        return self.folder / "state" / "runs"


def play(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(bounded())


async def end(runs: SiteRuns, number: int, status: str) -> None:
    runs.end(number, status)
    await runs.until_ended(number)
    await until_deleted(runs)


async def until_deleted(runs: SiteRuns) -> None:
    """Wait until nothing is left to delete."""
    while deletions := runs._endings._deletions:
        await asyncio.wait(deletions)


def at_work(runs: SiteRuns, number: int) -> SiteRun | None:
    """Return a run that can work."""
    found = runs.held(number)
    return found if isinstance(found, SiteRun) else None


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def refused(coroutine, rule="", error=PermissionDeniedError):
    with pytest.raises(error) as caught:
        await coroutine
    assert rule in caught.value.rule
    return str(caught.value)


def short(number):
    """Return a disk that is full, and so on, once."""
    return OSError(number, os.strerror(number))
