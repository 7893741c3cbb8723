"""`fl_state`: checks, shows, replays, backs up and restores a server's state.

Exit codes: 0 all is well, 1 problems were found or it was refused, 2 wrong usage.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flplatform.core import events as ev
from flplatform.core.errors import FLError, NotFoundError
from flplatform.hci.escape import MAX_LINE, escape
from flplatform.server.upkeep.backup import Manifest, back_up
from flplatform.server.upkeep.backups import is_backup, verify_backup
from flplatform.server.upkeep.history import History, RunHistory
from flplatform.server.upkeep.log_id import OwnLog
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.replay import replay_run, run_of
from flplatform.server.upkeep.restore import restore as restore_backup
from flplatform.server.upkeep.unfinished import told_of
from flplatform.server.upkeep.verify import Report, check_log_head, check_own_log, verify_state
from flplatform.server.wording import count, describe, moment

app = typer.Typer(
    name="fl_state",
    help="Check, show, replay, back up and restore the state of a federation's server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

KitFolder = Annotated[Path, typer.Argument(metavar="KIT", help="The server's startup kit.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Damaged = Annotated[
    bool, typer.Option("--damaged", help="Also a state with problems: what is left of it.")
]


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="KIT", help="The kit; or a backup, then KIT.")],
    kit: Annotated[
        Path | None, typer.Argument(metavar="[KIT]", help="Of the server that made the backup.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every blob: digests, and headers of models.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check log, blobs, files and audit of a state, or of a backup; a server may run meanwhile."""
    made: Manifest | None = None
    with _errors():
        _demand_kit(folder, kit)
        if kit is None:
            report = verify_state(Place.of(folder), deep)
        else:
            made, report = verify_backup(folder, Place.of(kit).kit, deep)
    if as_json:
        of_backup = {} if made is None else {"made": made.made, "files": len(made.files)}
        _print_json(
            {
                "problems": [asdict(each) for each in report.problems],
                "notes": [asdict(each) for each in report.notes],
                "runs": report.runs,
                "events": report.events,
                "blobs": report.blobs,
                "every_byte": report.deep,
                "audit_records": report.audit_records,
                **of_backup,
            }
        )
    else:
        if made is not None:
            _line(
                f"backup of {made.name}, made {made.made}: the signature and the digests of its "
                f"{len(made.files)} files hold"
            )
        _print_report(report)
    raise typer.Exit(1 if report.problems else 0)


def _demand_kit(folder: Path, kit: Path | None) -> None:
    """Refuse a backup without a kit, and a kit with another.

    Raises:
        NotFoundError: it is not what the words say.
    """
    if kit is None and is_backup(folder):
        raise NotFoundError(
            f"{folder} is a backup", hint=f"fl_state verify {folder} KIT, of the server it is of"
        )
    if kit is not None and not is_backup(folder):
        raise NotFoundError(f"{folder} is no backup", hint="fl_state verify KIT, or BACKUP KIT")


def _print_report(report: Report) -> None:
    for kind, findings in (("PROBLEM", report.problems), ("note", report.notes)):
        for each in findings:
            _line(f"{kind}  {each}")
    found = count(len(report.problems), "problem") if report.problems else "no problem"
    looked_at = "every byte" if report.deep else "sizes only"
    _line(
        f"{found} in {count(report.runs, 'run')} with {count(report.events, 'event')}, "
        f"{count(report.blobs, 'blob')} ({looked_at}) and "
        f"{count(report.audit_records, 'audit record')}"
    )


@app.command()
def show(
    kit: KitFolder,
    run: Annotated[int | None, typer.Argument(help="A run, for its events.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs, or the events of one in words."""
    with _errors():
        place = _place(kit)
        if run is not None:
            _show_run(run_of(place, run), as_json)
        else:
            _show_runs(place.history(), as_json)


def _show_runs(history: History, as_json: bool) -> None:
    rows = [_row(run, number in history.deleted) for number, run in sorted(history.runs.items())]
    if as_json:
        _print_json({"runs": rows})
        return
    columns = ("run", "job", "status", "round", "submitter", "opened", "reason")
    texts = [[str(row[column]) for column in columns] for row in rows]
    for row, text in zip(rows, texts, strict=True):
        text[3] = f"{row['round']}/{row['rounds']}"
        text[5] = moment(str(row["opened"])) if row["opened"] else ""
    table = [[column.upper() for column in columns], *texts]
    widths = [max(len(escape(line[at])) for line in table) for at in range(len(columns))]
    for line in table:
        cells = (escape(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        _line("  ".join(cells).rstrip())


def _row(run: RunHistory, deleted: bool) -> dict[str, Any]:
    state, events = run.state, run.stream.events
    opened = events[0][1] if events else None
    known = opened if isinstance(opened, ev.RunOpened) else None
    return {
        "run": run.run,
        "job": known.job.name if known else "",
        "status": ("unreadable" if state is None else state.status) + ", deleted" * deleted,
        "round": state.round if state else 0,
        "rounds": known.job.rounds if known else 0,
        "submitter": known.submitter if known else "",
        "opened": events[0][0].time if events else "",
        "events": len(events),
        "reason": state.ended.reason if state and state.ended else "",
    }


def _show_run(run: RunHistory, as_json: bool) -> None:
    if as_json:
        events = [
            {"seq": row.seq, "time": row.time, "type": row.type, "words": describe(event),
             "body": json.loads(row.body)}
            for row, event in run.stream.events
        ]  # fmt: skip
        _print_json({**_row(run, deleted=False), "list": events})
        return
    for row, event in run.stream.events:
        _line(f"{row.seq:>5}  {row.time}  {' '.join(describe(event).split())}")
    for each in run.findings:
        _line(f"PROBLEM  {each}" if each.problem else f"note  {each}")


@app.command()
def replay(
    kit: KitFolder,
    run: Annotated[int, typer.Argument(help="The run.")],
    round_number: Annotated[
        int | None, typer.Argument(metavar="[ROUND]", help="One round; else all.")
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder with room for one model and optimiser state.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Aggregate closed rounds again, and compare the models with the published ones."""
    words = {"freed": "inputs freed", "waiting": "not published yet"}
    rounds = []
    with _errors():
        for each in replay_run(_place(kit), run, round_number, scratch):
            rounds.append(each)
            if not as_json:
                which = f"round {each.round}" if each.round else f"run {run}"
                text = f"{which}: {words.get(each.outcome, each.outcome)}"
                _line(": ".join(filter(None, (text, each.detail or each.published))))
    if as_json:
        _print_json({"run": run, "rounds": [asdict(each) for each in rounds]})
    elif not rounds:
        _line(f"run {run} has no closed round")
    raise typer.Exit(any(each.outcome in ("differs", "error") for each in rounds))


@app.command()
def backup(
    kit: KitFolder,
    target: Annotated[Path, typer.Argument(help="The backup's folder; it must not exist.")],
    damaged: Damaged = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy blobs also where links could be made.")
    ] = False,
) -> None:
    """Copy the state, consistently, also while the server runs."""
    with _errors():
        made = back_up(Place.of(kit), target, damaged=damaged, link=not copy, progress=_step)
    for problem in made.problems:
        _line(f"PROBLEM  {problem}")
    size = sum(entry.size for entry in made.files.values())
    _line(
        f"backed up {count(made.runs, 'run')} with {count(made.events, 'event')} in "
        f"{count(len(made.files), 'file')}, {size} bytes, to {target}"
    )


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="A folder that backup made.")],
    kit: KitFolder,
    move_aside: Annotated[
        bool, typer.Option("--move-aside", help="Rename a state that is there.")
    ] = False,
    with_local: Annotated[
        bool, typer.Option("--with-local", help="Write the backup's local files over the kit's.")
    ] = False,
    damaged: Damaged = False,
) -> None:
    """Verify a backup and make it the state of a stopped server."""
    with _errors():
        place = Place.of(kit)
        try:
            done = restore_backup(
                source,
                place,
                move_aside=move_aside,
                with_local=with_local,
                damaged=damaged,
                progress=_step,
            )
        except BaseException as error:
            _tell_unfinished(place, known=str(error))
            raise
    if done.aside:
        _line(f"the former state lies in {done.aside}")
    if done.log_aside:
        _line(f"the former event log lies in {done.log_aside}, with all whose names begin so")
    for path in done.half:
        _line(f"{path} is what a restore that did not end had made: it can be removed")
    for name in done.other_local:
        _line(f"{name} differs from the backup's and stayed; --with-local takes the backup's")
    if done.took_url:
        _line(f"the event log lies where the backup's local files have it: {done.log}")
    made = done.manifest
    runs, events = count(made.runs, "run"), count(made.events, "event")
    _line(f"restored {runs} with {events}, as they were at {made.made}")
    if done.unended:
        _line(
            f"not ended at the backup, and going on: {', '.join(map(str, done.unended))}; if the "
            "sites have ended such a run since, they say `this site does not have run N` and take "
            "no second start of it: abort it and submit its job again"
        )


def _place(kit: Path) -> Place:
    """Return the state of a kit; say if it is not what it should be."""
    place = Place.of(kit)
    _tell_unfinished(place)
    if place.holds_log:
        OwnLog.of(place).demand_state()
    with place.snapshot() as log:
        for each in (*check_own_log(place, log), *check_log_head(place)):
            kind = "PROBLEM" if each.problem else "note"
            print(f"{kind}  {escape(str(each), MAX_LINE)}", file=sys.stderr)
    return place


def _tell_unfinished(place: Place, known: str = "") -> None:
    if (told := told_of(place.kit.folder)) and told != known:
        print(f"fl_state: {escape(told, MAX_LINE)}", file=sys.stderr)


def _step(text: str) -> None:
    print(f"... {text}", file=sys.stderr)


def _line(text: str) -> None:
    print(escape(text, MAX_LINE))


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (FLError, OSError) as error:
        text = "\n".join(escape(line, MAX_LINE) for line in str(error).splitlines())
        print(f"fl_state: {text}", file=sys.stderr)
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command that is named on the command line."""
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, _end)
    app()


def _end(number: int, _frame: object) -> None:
    """End as a Ctrl-C does, with what is half done removed; once, for that must not be cut."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
