"""`validate`: ask which models and who would take part, sign, open the run, follow it, show it.

The server chooses the models; the console signs a start of the source run's package only after
it has verified that package itself, and only for measuring models.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpc import aio

from flplatform.admin import units
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.packing import sign_start
from flplatform.admin.console.submit import accepts
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.console.wait import follow
from flplatform.admin.modules.validating import VALIDATE_BEGIN, VALIDATE_PLAN, wanted
from flplatform.core.errors import InvalidArgumentError, UnavailableError
from flplatform.core.messages import ModelRef
from flplatform.core.validation import Wanted
from flplatform.files.scratch import scratch_folder
from flplatform.hci.connection import ExitCode, Item
from flplatform.hci.shell import Shell
from flplatform.rpc.transfers import fetch_blob
from flplatform.security.package import Package, open_package
from flplatform.store.blobs import FileBlobStore

_SUBMISSION = re.compile(r"[0-9a-f]{32}")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server says a validation would be about.

    Attributes:
        plan: a `core.validation.ValidationPlan` as JSON.
        answers: a row per data site: would it take part?
        package: the source run's package, not verified yet.
    """

    plan: Mapping[str, Any]
    answers: tuple[Item, ...]
    package: Path

    @property
    def sites(self) -> tuple[str, ...]:
        """The data sites; those that would refuse, too: their refusal is part of the matrix."""
        return tuple(str(row["target"]) for row in self.answers if row["status"] != "unknown")


async def validate(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Validate models of a run and return the exit code: 5 if the validation failed.

    Raises:
        FLError: why it is refused.
        OSError: a file cannot be written.
    """
    values = shell.parse(argv)
    what = wanted(values["owner"], values["site"], values["owners"], values["sites"])
    submission = values["submission"] or secrets.token_hex(16)
    if not _SUBMISSION.fullmatch(submission):
        raise InvalidArgumentError("is not 32 hex digits", field="--submission")

    def say(text: str) -> None:
        if not values["csv"]:
            shell.show({"type": "text", "text": text})

    with scratch_folder("fl-validate-") as folder:
        try:
            run = await _open(transport, shell, say, values["run"], what, submission, folder)
        except Refused as refused:
            return refused.exit_code
    if isinstance(run, ExitCode):
        return run
    if values["no_wait"]:
        return ExitCode.OK
    return await _see_through(transport, shell, say, run, csv=values["csv"])


async def _open(
    transport: GrpcTransport,
    shell: Shell,
    say: Say,
    source: int | None,
    what: Wanted,
    submission: str,
    folder: Path,
) -> int:
    """Return the number of the opened run, or an `ExitCode` if none was opened."""
    words = [*(["--run", str(source)] if source else []), *_words(what)]
    offer = await persist(shell, lambda: _offer(transport, shell, words, folder))
    package = await asyncio.to_thread(
        open_package, offer.package, transport.credentials.kit.trust, datetime.now(UTC)
    )
    plan = offer.plan
    say("\n".join(_plan(offer, package)))
    if all(row["status"] in ("refused", "unknown") for row in offer.answers):
        for row in offer.answers:
            shell.show(row)
        return ExitCode.REFUSED
    models = units.count(len(plan["models"]), "model")
    at = units.count(len(offer.sites), "site")
    if not await shell.confirm(f"{models} of run {plan['run']} would be measured at {at}. Go on?"):
        say("nothing was validated")
        return ExitCode.INTERRUPTED
    blob = ModelRef(plan["package"]["digest"], plan["package"]["size"])
    signed = sign_start(
        transport.credentials, submission, blob, offer.sites, {}, purpose="validate"
    )
    say(f"submission {submission} (should the connection break: --submission ID)")
    begin = [VALIDATE_BEGIN, "--run", str(plan["run"]), *_words(what)]
    run = data_of(await persist(shell, lambda: ask(transport, shell, begin, signed)), "run")
    author = transport.credentials.kit.admin.name
    say(f"run {run} validates run {plan['run']} · signed by {author}")
    value = {
        "run": run,
        "source_run": plan["run"],
        "submission": submission,
        "sites": list(offer.sites),
        "models": plan["models"],
        "gaps": plan["gaps"],
    }
    shell.show({"type": "data", "name": "validation", "value": value})
    return int(run)


def _words(what: Wanted) -> list[str]:
    owners = ["--owners", ",".join(what.owners)] if what.owners else []
    return owners + (["--sites", ",".join(what.sites)] if what.sites else [])


async def _offer(transport: GrpcTransport, shell: Shell, words: list[str], folder: Path) -> Offer:
    """Ask for the plan, and fetch the package; a grant ends with its session: both in one try."""
    items = await ask(transport, shell, [VALIDATE_PLAN, *words])
    plan = data_of(items, "plan")
    if plan is None:
        raise UnavailableError("the server did not say what would be validated")
    blob = ModelRef(plan["package"]["digest"], plan["package"]["size"])
    blobs = await asyncio.to_thread(FileBlobStore, folder)

    async def fetch(channel: aio.Channel, token: str) -> Path:
        return await fetch_blob(channel, blob, blobs, token=token)

    answers = tuple(item for item in items if item["type"] == "row")
    return Offer(plan, answers, await transport.with_session(fetch))


def _plan(offer: Offer, package: Package) -> list[str]:
    plan, models = offer.plan, offer.plan["models"]
    cells = units.count(len(models) * len(offer.sites), "cell")
    left_out = [f"{site} {reason}" for site, reason in plan["left_out"].items()]
    return [
        f"plan      validate {units.count(len(models), 'model')} of run {plan['run']} "
        f"({plan['status']}, round {plan['round']}/{plan['rounds']}) at "
        f"{units.count(len(offer.sites), 'site')}: {cells}, deadline {plan['deadline_s']:g} s",
        f"          job {package.job.name} packed by {package.author.name}",
        f"models    {' · '.join(_model(owner, model) for owner, model in models.items())}",
        *(f"without   {owner}: {reason}" for owner, reason in plan["gaps"].items()),
        accepts(offer.answers),
        *(f"not       {said}" for said in left_out),
    ]


def _model(owner: str, model: Mapping[str, Any]) -> str:
    words = {"best": "(best, r{})", "latest": "(latest, r{})", "update": "(update of r{})"}
    return f"{owner} {words.get(model['kind'], '').format(model['round'])}".rstrip()


async def _see_through(
    transport: GrpcTransport, shell: Shell, say: Say, run: int, *, csv: bool
) -> int:
    """Follow the run to its end, and show its matrix."""

    def show(item: Item) -> None:
        if not csv or item["type"] not in ("text", "row", "table"):
            shell.show(item)

    try:
        code = await follow(transport, ["wait", str(run)], shell, show)
    except asyncio.CancelledError:
        say(f"run {run} goes on; cross_val {run} shows it")
        raise
    words = ["cross_val", str(run), *(["--csv"] if csv else [])]
    items = await persist(shell, lambda: _items(transport, words))
    for item in items:
        if item["type"] != "done" and (code == ExitCode.OK or item["type"] != "error"):
            shell.show(item)
    shown = next((int(item["exit_code"]) for item in items if item["type"] == "done"), 0)
    return code or shown


async def _items(transport: GrpcTransport, words: list[str]) -> Sequence[Item]:
    async with aclosing(transport.execute(words, False)) as reply:
        items = [item async for item in reply]
    if not items or items[-1]["type"] != "done":
        raise UnavailableError("the reply ended before it was complete")
    return items
