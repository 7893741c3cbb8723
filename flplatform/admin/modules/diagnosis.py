"""`why`: who is waited for, since when, what comes next, and what one can do about it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flplatform.admin import units
from flplatform.admin.modules.hosts import Cells, Hosts, write_row
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.targets import current_run
from flplatform.core.control import SiteReply
from flplatform.core.diagnosis import Diagnosis
from flplatform.core.errors import InvalidArgumentError
from flplatform.hci import CommandSpec, Connection, ExitCode, argument

MAX_SHOWN = 20
"""Targets of a round in its table; the JSON data has them all."""

MAX_WAITS = 8
MAX_ERRORS = 5
MAX_CHARS = 300


@dataclass(frozen=True)
class WhyArguments:
    """Of `why`.

    What it needs a right for depends on the words: it has `run` or `targets`, never both.
    """

    what: str = argument(
        help="a run's number or a site; default the current or the latest run",
        complete="subject",
        metavar="RUN|SITE",
        default="",
    )
    round: int | None = argument(
        help="a round of that run", metavar="ROUND", minimum=1, default=None
    )

    def __post_init__(self) -> None:
        if self.is_site and self.round is not None:
            raise ValueError(f"only a run has rounds; {self.what!r} is a site")
        if self.is_site:
            object.__setattr__(self, "targets", ("client", self.what))
        else:
            object.__setattr__(self, "run", int(self.what) if self.what else None)

    @property
    def is_site(self) -> bool:
        """Whether it asks about a site; a number alone is a run."""
        return bool(self.what) and not self.what.isdecimal()


class DiagnosisModule:
    """Explanations.

    Args:
        control: knows what the server knows.
        hosts: asks the sites.
        rights: knows which commands there are.
    """

    name = "system"
    summary = "server and sites as machines"

    def __init__(self, control: Control, hosts: Hosts, rights: Rights) -> None:
        self._rights = rights
        self._control = control
        self._hosts = hosts

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="why",
                summary="explains what a run, a round or a site waits for, or how a run ended",
                arguments=WhyArguments,
                handler=self._why,
                permission="view",
                mutating=False,
                examples=("why", "why 7", "why 7 3", "why hospital-a"),
            )
        ]

    async def _why(self, connection: Connection, args: WhyArguments) -> None:
        diagnosis = await self._diagnose(args)
        can = tuple(line for line in diagnosis.can if self._rights.knows(line.split()[0]))
        diagnosis = replace(diagnosis, can=can)
        await connection.text("\n".join(lines_of(diagnosis)))
        if diagnosis.parts:
            rows = [
                (part.site, part.outcome, part.took_s, part.why or None)
                for part in diagnosis.parts[:MAX_SHOWN]
            ]
            await connection.table("round", ("site", "outcome", "took_s", "reason"), rows)
            if (left := len(diagnosis.parts) - MAX_SHOWN) > 0:
                await connection.text(f"… and {units.count(left, 'site')} more")
        replies = await self._ask(connection, diagnosis, args)
        if replies:
            connection.exit_code = ExitCode.OK  # a site that is silent is part of the answer
        sites = {site: asdict(reply) for site, reply in replies.items()}
        await connection.data("why", asdict(diagnosis) | {"sites": sites})

    async def _diagnose(self, args: WhyArguments) -> Diagnosis:
        if args.is_site:
            return self._control.diagnosis.site(args.what)
        given = int(args.what) if args.what else None
        if given == 0:
            raise InvalidArgumentError("runs are numbered from 1", field="what")
        number = current_run(self._control, given, ended=True)
        await self._control.load(number)
        if args.round is None:
            return self._control.diagnosis.run(number)
        return self._control.diagnosis.round(number, args.round)

    async def _ask(
        self, connection: Connection, diagnosis: Diagnosis, args: WhyArguments
    ) -> Mapping[str, SiteReply]:
        """Ask the sites that can say more; a row for each."""
        if args.is_site and diagnosis.cause == "never_registered":
            await self._hosts.admit(connection, ("client", args.what), "view")  # says what is near
            return {}
        if not diagnosis.ask:
            return {}
        targets = await self._hosts.admit(connection, ("client", *diagnosis.ask), "view")
        replies = await self._hosts.ask(targets.sites, {"run": diagnosis.run or 0})
        for site, reply in replies.items():
            cells = _cells(reply.body) if reply.status == "ok" else None
            await write_row(connection, site, reply, cells)
            for error in _errors(reply.body):
                await connection.text(f"  {site}  {error}")
        return replies


def lines_of(diagnosis: Diagnosis) -> list[str]:
    """Return an explanation as text: the answer, what led to it, what comes, what one can do."""
    lines = [diagnosis.headline]
    lines += [f"  {line.time[11:19]:8}  {line.text}" for line in diagnosis.lines]
    told = [
        item.clause
        for item in diagnosis.waits_for
        if item.text not in diagnosis.headline and item.clause not in diagnosis.headline
    ]
    lines += [f"  waits for {text}" for text in told[:MAX_WAITS]]
    if len(told) > MAX_WAITS:
        lines.append(f"  waits for {units.count(len(told) - MAX_WAITS, 'site')} more")
    for coming in diagnosis.next:
        at = f"{coming.time[11:19]} " if coming.time else ""
        lines.append(f"  {'next':8}  {at}in {units.seconds(coming.in_s)}: {coming.text}")
    if diagnosis.can:
        lines.append(f"  {'you can':8}  {'   ·   '.join(diagnosis.can)}")
    return lines


def _cells(body: Mapping[str, Any]) -> Cells:
    """Pick what a site says it is doing."""
    runs = body.get("runs")
    first = runs[0] if isinstance(runs, list) and runs else {}
    if not isinstance(first, Mapping):
        first = {}
    return {
        "run": _number(first.get("run")),
        "round": _number(first.get("round")),
        "phase": str(first.get("phase") or body.get("held_up") or "idle")[:60],
        "since_s": _number(first.get("since_s")),
        "disk_free_bytes": _number(body.get("disk_free_bytes")),
    }


def _number(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _errors(body: Mapping[str, Any]) -> list[str]:
    """Return the error lines of a site's answer, bounded: a site may say anything."""
    errors = body.get("errors")
    found = errors[:MAX_ERRORS] if isinstance(errors, list) else []
    return [
        f"{str(each.get('time', ''))[11:19]} {str(each.get('text', ''))[:MAX_CHARS]}"
        for each in found
        if isinstance(each, Mapping)
    ]
