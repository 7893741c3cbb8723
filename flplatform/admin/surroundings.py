"""What the console shows and offers around commands: prompt, toolbar, completion."""

from flplatform.admin.ports import Control
from flplatform.admin.targets import only_active
from flplatform.core.control import RunView
from flplatform.core.errors import NotFoundError
from flplatform.core.staging import PREPARED

MAX_VALUES = 200
"""Completions that one answer may hold."""


def prompt(control: Control, session_run: int | None) -> str:
    """Return the prompt: project, current run, and how many sites are up.

    Args:
        control: knows all that.
        session_run: the session's run, None for none.
    """
    parts = [f"fl:{control.server().project}"]
    try:
        number = session_run or only_active(control)
        run = control.run(number) if number else None
    except NotFoundError:
        run = None
    if run is not None:
        progress = "" if run.ended or run.status == PREPARED else f" r{run.round}/{run.rounds}"
        parts.append(f"run {run.run} {run.status}{progress}")
    up, of = _up(control, run)
    parts.append(f"{up}/{of} sites >")
    return "  ".join(parts) + " "


def _up(control: Control, run: RunView | None) -> tuple[int, int]:
    """Sites at work of those targeted while a run is active, else live sites of known ones."""
    states = {site.name: site.state for site in control.sites()}
    live = {name for name, state in states.items() if state == "live"}
    if run is None or run.ended or run.status == PREPARED:
        return len(live), len(states)
    return sum(site in live for site in run.targets if run.answers.get(site) == "ok"), len(
        run.targets
    )


def toolbar(control: Control) -> str:
    """Return the line at the bottom: the last event."""
    server = control.server()
    return server.last_event or f"{server.name} is {server.state}"


def values(control: Control, kind: str, prefix: str) -> list[str]:
    """Return what an argument of a kind may be now: `site`, `target`, `run`, `subject`, `job`."""
    kind, _, first = kind.partition(":")
    match kind:
        case "site":
            found = [site.name for site in control.sites()]
        case "target":
            sites = [site.name for site in control.sites()] if first == "client" else []
            found = sites if first else ["all", "client", "server"]
        case "run":
            found = [str(run.run) for run in reversed(control.runs())]
        case "subject":
            found = [site.name for site in control.sites()]
            found += [str(run.run) for run in reversed(control.runs())]
        case "job":
            found = list(control.staging.jobs())
        case _:
            found = []
    return [value for value in found if value.startswith(prefix)][:MAX_VALUES]
