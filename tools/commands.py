"""Write `docs/commands.md` and `docs/permissions.md` from what the commands say of themselves.

python -m tools.commands            write both
python -m tools.commands --check    only say whether they are up to date
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast
from unittest.mock import MagicMock

from flplatform.admin.fed_admin_server import Parts, modules
from flplatform.admin.modules.submission import HIDDEN
from flplatform.admin.rights import SUBMIT, SUBMITTING
from flplatform.client.client import SiteClient
from flplatform.client.verbs import SiteVerb
from flplatform.core.config import Role
from flplatform.hci import (
    SESSION_RIGHT,
    AdminServer,
    CommandRegister,
    Parameter,
    SpecView,
    usage,
)
from flplatform.security.authz import DEFAULT_RULES, ROLES, Permission, Request, decide
from flplatform.security.identity import Identity

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- generated: make docs -->", "<!-- end -->"

ALWAYS, NEVER = "yes", "–"
OWN_SITE, OWN_RUN, OWN_ORGANISATION = "own hosts", "own runs", "runs of own organisation"
"""What a cell of the table can say; `docs/permissions.md` explains them."""


def register() -> CommandRegister:
    """Return every command of this release, made without a server: nothing can be carried out."""
    parts = Parts(**{field.name: MagicMock() for field in dataclasses.fields(Parts)})
    return AdminServer(CommandRegister(modules(parts)), MagicMock(), MagicMock()).register


def advertised() -> list[SpecView]:
    """Return the views of all commands that users type, in the order of the help."""
    return [view for view in register().views() if view.name not in HIDDEN]


def site_verbs() -> dict[str, SiteVerb]:
    """Return the signed commands that sites obey, by name."""
    verbs = SiteClient._verbs(MagicMock(), MagicMock(), MagicMock())
    return {verb.name: verb for verb in verbs}


# ------------------------------------------------------------------------------------ reference


def reference() -> str:
    """Return the text of `docs/commands.md`."""
    verbs, groups = site_verbs(), _by_module(advertised())
    lines = [
        "# Commands",
        "",
        "Everything that can be typed at the console. Written by `make docs` from the commands",
        "themselves; `help COMMAND` shows the same. Who may use what is in",
        "[permissions.md](permissions.md). With `--json` each command prints one JSON object.",
        "",
    ]
    for module, views in groups.items():
        names = ", ".join(f"[{view.name}](#{view.name})" for view in views)
        lines.append(f"- **{module}**: {names}")
    for module, views in groups.items():
        lines += ["", f"## {module}"]
        for view in views:
            lines += ["", *_entry(view, verbs.get(view.name))]
    return "\n".join(lines) + "\n"


def _by_module(views: Sequence[SpecView]) -> dict[str, list[SpecView]]:
    groups: dict[str, list[SpecView]] = {}
    for view in views:
        groups.setdefault(view.module, []).append(view)
    return groups


def _entry(view: SpecView, verb: SiteVerb | None) -> Iterator[str]:
    yield from (f"### {view.name}", "", f"    {usage(view)}", "")
    yield f"{view.summary[:1].upper()}{view.summary[1:]}."
    if view.parameters:
        yield from ("", "| argument | meaning |", "|---|---|")
        yield from (f"| {_spelled(p)} | {_cell(_meaning(p))} |" for p in view.parameters)
    right = "every signed-in user" if view.permission == SESSION_RIGHT else f"`{view.permission}`"
    yield from ("", f"- right: {right}")
    if verb is not None:
        yield f"- each site decides again, by its own policy: `{verb.permission}`"
    if view.states:
        yield f"- legal: {view.states}"
    if view.needs:
        yield f"- needs: {'; '.join(view.needs)}"
    if view.confirms:
        yield "- asks before it starts"
    if view.reauthenticate:
        yield "- asks for the password if the last time is long ago"
    if view.mutating:
        yield "- changes something: it is in the audit before it starts"
    if view.local:
        yield "- carried out by the console, with the server's help where needed"
    if view.aliases:
        yield f"- also: {', '.join(f'`{alias}`' for alias in view.aliases)}"
    yield from ("", "```")
    yield from view.examples
    yield "```"


def _spelled(parameter: Parameter) -> str:
    spelled = ", ".join(f"`{option}`" for option in parameter.options)
    return spelled or f"`{_cell(parameter.label)}`"


def _meaning(parameter: Parameter) -> str:
    notes = ["optional"] if not (parameter.required or parameter.options) else []
    if parameter.choices:
        notes.append("one of " + ", ".join(parameter.choices))
    if parameter.minimum is not None:
        notes.append(f"at least {parameter.minimum:g}")
    if parameter.kind != "flag" and parameter.default not in (None, "", ()):
        notes.append(f"default {parameter.default}")
    return parameter.help + (f" ({'; '.join(notes)})" if notes else "")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


# ---------------------------------------------------------------------------------- permissions


def permissions() -> str:
    """Return the table of `docs/permissions.md`: who may do what by the roles' defaults."""
    lines = [f"| command | right | {' | '.join(ROLES)} |", "|---" * (len(ROLES) + 2) + "|"]
    for spec in (register().find(view.name) for view in advertised()):
        concerns = concern(spec.name, spec.arguments)
        cells = [granted(role, spec.name, spec.permission, concerns) for role in ROLES]
        lines.append(f"| {spec.name} | {spec.permission} | {' | '.join(cells)} |")
    return "\n".join(lines)


def concern(name: str, arguments: type) -> str:
    """Return what the right to a command is weighed against: `submission`, `run` or `site`."""
    names = {field.name for field in dataclasses.fields(arguments)} | set(dir(arguments))
    if name in SUBMITTING:
        return "submission"
    return "run" if names & {"run", "source_run"} else "site"


def granted(role: Role, command: str, permission: str, concerns: str) -> str:
    """Return the cell of a command and a role."""
    if permission == SESSION_RIGHT:
        return ALWAYS

    def may(site: str = "", submitter: str = "", organisation: str = "") -> bool:
        key = SUBMIT if concerns == "submission" else command
        right = cast(Permission, permission)
        request = Request(_person(role), key, right, site, submitter, organisation)
        return decide(DEFAULT_RULES, request).allowed

    if concerns == "submission":
        return ALWAYS if may("other", "me", "own") else NEVER
    wider: Mapping[str, bool]
    if concerns == "site":
        wider = {ALWAYS: may("other"), OWN_SITE: may("own")}
    else:
        wider = {
            ALWAYS: may("other", "somebody", "other"),
            OWN_SITE: may("own", "somebody", "other"),
            OWN_ORGANISATION: may("other", "somebody", "own"),
            OWN_RUN: may("other", "me", "own"),
        }
    return next((words for words, allowed in wider.items() if allowed), NEVER)


def _person(role: Role) -> Identity:
    return Identity("", "admin", "own", "me", role, "", 0, datetime.max.replace(tzinfo=UTC))


def with_table(text: str, table: str) -> str:
    """Return a document with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


# ---------------------------------------------------------------------------------------- files


def files() -> dict[Path, str]:
    """Return what each generated document must hold."""
    path = DOCS / "permissions.md"
    return {DOCS / "commands.md": reference(), path: with_table(path.read_text(), permissions())}


def main() -> int:
    """Carry out the command line."""
    stale = []
    for path, text in files().items():
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if "--check" not in sys.argv[1:]:
                path.write_text(text)
    verb = "differ from the commands" if "--check" in sys.argv[1:] else "written"
    print(f"docs: {', '.join(stale)} {verb}" if stale else "docs: nothing has changed")
    return bool(stale and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
