"""`lineage`: how a global model came to be, and the proof of it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flplatform.admin import units
from flplatform.admin.ports import Control
from flplatform.admin.targets import current_run
from flplatform.admin.views import DIGEST_CHARS
from flplatform.core.lineage import Lineage, RoundLineage, Verified
from flplatform.hci import CommandSpec, Connection, argument


@dataclass(frozen=True)
class LineageArguments:
    """Of `lineage`."""

    run: int | None = argument(
        help="the run's number; default the current or the latest one",
        complete="run",
        minimum=1,
        default=None,
    )
    round: int | None = argument(
        help="the model of this round alone, with its bases",
        metavar="ROUND",
        minimum=0,
        default=None,
    )
    verify: bool = argument(
        help="aggregate again whatever rounds still have their updates, and compare",
        option="--verify",
        default=False,
    )


class LineageModule:
    """Where models come from.

    Args:
        control: knows it.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control) -> None:
        self._control = control

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="lineage",
                summary="shows how each global model came to be; --verify computes it again",
                arguments=LineageArguments,
                handler=self._lineage,
                permission="view",
                mutating=False,
                examples=("lineage 3", "lineage 3 7", "lineage 3 --verify"),
            )
        ]

    async def _lineage(self, connection: Connection, args: LineageArguments) -> None:
        run = current_run(self._control, args.run, ended=True)
        lineage = self._control.lineage.lineage(run, args.round)
        common = _common(lineage.rounds)
        await connection.text("\n".join([*_story(lineage), *_shared(common)]))
        if lineage.rounds:
            await connection.table("rounds", *_rounds(lineage.rounds, common))
        if args.round is not None and lineage.rounds:
            last = lineage.rounds[-1]
            await connection.text(f"contributions to model {last.round}")
            await connection.table("contributions", *_contributions(last))
        await connection.data("lineage", _data(lineage))
        if args.verify:
            await self._verify(connection, lineage)

    async def _verify(self, connection: Connection, lineage: Lineage) -> None:
        numbers = tuple(each.round for each in lineage.rounds if each.model)
        results: list[dict[str, Any]] = []
        await connection.progress("verify", 0, len(numbers), "rounds")
        async for done in self._control.lineage.verify(lineage.run, numbers):
            short = replace(done, digest=done.digest[:DIGEST_CHARS])
            results.append(asdict(short))
            await _verified_row(connection, short)
            await connection.progress("verify", len(results), len(numbers), "rounds")
        await connection.data("verified", results)


async def _verified_row(connection: Connection, done: Verified) -> None:
    target = f"round {done.round}"
    match done.result:
        case "same":
            await connection.row(target, {"result": "same", "digest": done.digest})
        case "freed":
            await connection.row(target, {"result": "not verified: its updates were freed"})
        case "differs":
            cells = {"result": "differs", "digest": done.digest}
            detail = "another model comes of the same updates"
            await connection.row(target, cells, status="error", detail=detail)
        case _:
            await connection.row(target, {"result": "error"}, status="error", detail=done.detail)


def _story(lineage: Lineage) -> Iterator[str]:
    signer = f", signed by {lineage.signer}" if lineage.signer else ""
    yield (
        f"run {lineage.run} ({lineage.job}) by {lineage.submitter} of "
        f"{lineage.submitter_organisation}{signer}, {units.moment(lineage.submitted)} UTC"
    )
    yield f"  job      {lineage.job_digest[:DIGEST_CHARS]}"
    yield f"  model 0  {lineage.initial_model[:DIGEST_CHARS]}  from {lineage.initial_from}"
    for origin in lineage.origins:
        model = "a model that is not here" if origin.round is None else f"model {origin.round}"
        yield f"           = {model} of run {origin.run} by {origin.submitter}"


_COLUMNS = (
    "model", "digest", "base", "updates", "score", "best", "without", "aggregator", "closed",
)  # fmt: skip
_SHARED = {"aggregator": "by {}", "closed": "closed: {}", "without": "without {}"}


def _common(rounds: Sequence[RoundLineage]) -> dict[str, str]:
    """Return what several rounds all share: column -> text; the table leaves it out."""
    rows = [dict(zip(_COLUMNS, _row(each), strict=True)) for each in rounds]
    return {
        column: str(rows[0][column] or "")
        for column in _SHARED
        if len(rows) > 1 and len({row[column] for row in rows}) == 1
    }


def _shared(common: Mapping[str, str]) -> list[str]:
    said = [_SHARED[column].format(text) for column, text in common.items() if text]
    return [f"  rounds   {' · '.join(said)}"] if said else []


def _rounds(
    rounds: Sequence[RoundLineage], common: Collection[str]
) -> tuple[list[str], list[list[None | int | float | str]]]:
    kept = [index for index, column in enumerate(_COLUMNS) if column not in common]
    rows = [_row(each) for each in rounds]
    return [_COLUMNS[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _row(each: RoundLineage) -> tuple[None | int | float | str, ...]:
    return (
        each.round,
        each.model[:DIGEST_CHARS] or None,
        f"model {each.base_round}",
        len(each.shares),
        each.score,
        "*" if each.best else "",
        "; ".join(f"{site} ({why})" for site, why in sorted(each.stragglers.items())) or None,
        _aggregator(each),
        each.reason,
    )


def _aggregator(each: RoundLineage) -> str:
    steps = [(each.aggregator, each.aggregator_args), (each.optimizer, each.optimizer_args)]
    return " · ".join(
        f"{name}({', '.join(f'{key}={value}' for key, value in sorted(args.items()))})"
        for name, args in steps
        if name
    )


def _contributions(
    each: RoundLineage,
) -> tuple[tuple[str, ...], list[tuple[None | int | float | str, ...]]]:
    names = sorted({name for share in each.shares for name in share.metrics})
    rows = [
        (
            share.site,
            round(100 * share.share, 1),
            share.examples,
            share.digest[:DIGEST_CHARS],
            *(share.metrics.get(name) for name in names),
        )
        for share in each.shares
    ]
    return ("site", "share_percent", "examples", "digest", *names), rows


def _data(lineage: Lineage) -> dict[str, Any]:
    """Return it all as JSON, digests cut short: the whole of one is what a download grants."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: item[:DIGEST_CHARS] if key in _DIGESTS else short(item)
                for key, item in value.items()
            }
        return [short(item) for item in value] if isinstance(value, list | tuple) else value

    return {key: short(value) for key, value in short(asdict(lineage)).items()}


_DIGESTS = frozenset({"digest", "base", "model", "job_digest", "initial_model"})
