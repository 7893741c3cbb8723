"""`start` and `start_mgpu`: fetch and verify what is deployed, ask, sign, start.

The server says what is deployed; the console signs a start of it only after it has verified the
package itself, and shows whose it is.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpc import aio

from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.packing import processes, settings, sign_start
from flplatform.admin.console.submit import accepts, preflight, question_of
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.gpus import gpus_at
from flplatform.admin.modules.starting import BEGIN, START_PLAN
from flplatform.core.errors import UnavailableError
from flplatform.core.job import check_targets
from flplatform.core.messages import ModelRef
from flplatform.core.ports import BlobStore
from flplatform.core.staging import PREPARED
from flplatform.files.scratch import scratch_folder
from flplatform.hci.connection import ExitCode, Item
from flplatform.hci.shell import Shell
from flplatform.rpc.transfers import fetch_blob
from flplatform.security.package import Package, open_package
from flplatform.store.blobs import FileBlobStore


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server says a start would be about.

    Attributes:
        plan: a `core.staging.StartPlan` as JSON, with the sites that are `starting`.
        rows: of targets that are not started.
        package: what is deployed, not verified yet; None if no site is started.
    """

    plan: Mapping[str, Any]
    rows: tuple[Item, ...]
    package: Path | None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites to start."""
        return tuple(self.plan["starting"])

    @property
    def run(self) -> int:
        """The run's number."""
        return int(self.plan["run"])

    @property
    def blob(self) -> ModelRef:
        """The package's digest and size."""
        return ModelRef(self.plan["package"]["digest"], self.plan["package"]["size"])

    @property
    def prepared(self) -> bool:
        """Whether this start opens the run."""
        return str(self.plan["status"]) == PREPARED


async def start(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Start a deployed run, or more sites of one at work, and return the exit code.

    Raises:
        FLError: why it is refused.
        OSError: a file cannot be written.
    """
    values = shell.parse(argv)
    targets = list(values["targets"]) if argv[0] == "start" else ["client", *values["sites"]]
    run = ["--run", str(values["run"])] if values["run"] else []
    with scratch_folder("fl-start-") as folder:
        blobs = await asyncio.to_thread(FileBlobStore, folder)
        try:
            words = [START_PLAN, *targets, *run]
            offer = await persist(shell, lambda: _offer(transport, shell, words, blobs))
            if offer.package is None:
                return _finish(shell, offer.rows)
            package = await asyncio.to_thread(
                open_package, offer.package, transport.credentials.kit.trust, datetime.now(UTC)
            )
            return await _go_on(transport, shell, values, offer, package)
        except Refused as refused:
            return refused.exit_code


async def _offer(
    transport: GrpcTransport, shell: Shell, words: list[str], blobs: BlobStore
) -> Offer:
    """Ask what is deployed, and fetch it; a grant ends with its session, so both in one try."""
    items = await ask(transport, shell, words)
    plan, rows = data_of(items, "plan"), tuple(item for item in items if item["type"] == "row")
    if plan is None:
        raise UnavailableError("the server did not say what is deployed")
    if not plan["starting"]:
        return Offer(plan, rows, None)
    offer = Offer(plan, rows, None)

    async def fetch(channel: aio.Channel, token: str) -> Path:
        return await fetch_blob(channel, offer.blob, blobs, token=token)

    return replace(offer, package=await transport.with_session(fetch))


async def _go_on(
    transport: GrpcTransport,
    shell: Shell,
    values: Mapping[str, Any],
    offer: Offer,
    package: Package,
) -> int:
    """Show the plan, ask, sign and start."""
    answers: list[Item] = []
    asked_for = [str(values["gpus"])] if "gpus" in values else []
    if asked_for or not offer.prepared:  # nobody has asked these sites about that yet
        files = [file.path for file in package.manifest.files]
        question = question_of(package.job, files, offer.sites, asked_for)
        answers = await preflight(transport, shell, question)
    refused = [row for row in answers if row["status"] not in ("ok", "no_reply")]
    sites = tuple(site for site in offer.sites if site not in {row["target"] for row in refused})
    rows = [*offer.rows, *refused]
    if not sites:
        return _finish(shell, rows)
    quorum = values["min"] or package.job.min_clients
    if offer.prepared:
        check_targets(sites, quorum)
    gpus = gpus_at(asked_for, sites)
    lines = [
        settings(package.job, quorum, len(sites)) if offer.prepared else _joining(offer),
        f"          job {package.job.name} packed by {package.author.name}",
        *processes(gpus),
        accepts(answers) if answers else f"deployed  {' · '.join(sites)}",
        *(f"not       {row['target']} {row['detail']}" for row in rows if row["status"] != "ok"),
    ]
    shell.show({"type": "text", "text": "\n".join(lines)})
    verb = f"Start run {offer.run} at" if offer.prepared else f"Have run {offer.run} joined by"
    if not await shell.confirm(f"{verb} {', '.join(sites)}?"):
        shell.show({"type": "text", "text": "nothing was started"})
        return ExitCode.INTERRUPTED
    # A site that was in the run before would take an id that it knows for a start replayed.
    submission = str(offer.plan["submission_id"]) if offer.prepared else secrets.token_hex(16)
    signed = sign_start(transport.credentials, submission, offer.blob, sites, gpus)
    words = [BEGIN, "--run", str(offer.run)]
    words += ["--min", str(values["min"])] if values["min"] and offer.prepared else []
    await persist(shell, lambda: ask(transport, shell, words, signed))
    value = {"run": offer.run, "sites": list(sites), "gpus": gpus}
    shell.show({"type": "data", "name": "started", "value": value})
    return _finish(shell, [*rows, *map(_started, sites)])


def _joining(offer: Offer) -> str:
    there = ", ".join(offer.plan["taking_part"])
    return f"plan      join run {offer.run}, which is {offer.plan['status']} with {there}"


def _started(site: str) -> Item:
    return {"type": "row", "target": site, "status": "ok", "detail": "is starting", "cells": {}}


def _finish(shell: Shell, rows: Sequence[Item]) -> int:
    """Show the rows and return the exit code that they make, as `hci.Connection.done` does."""
    for row in rows:
        shell.show(row)
    failed = [row for row in rows if row["status"] != "ok"]
    if failed and len(failed) == len(rows) and {row["status"] for row in failed} == {"refused"}:
        return ExitCode.REFUSED
    return ExitCode.FAILED if failed else ExitCode.OK
