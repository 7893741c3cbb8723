"""The generated documents against the commands, and the table of permissions against the truth."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import get_args

import pytest

from flplatform.admin.modules.submission import HIDDEN
from flplatform.admin.orders import Ordered, take_in_hand
from flplatform.admin.rights import LIST_RUNS, SUBMITTING, ForFiles, ForRun, ForTargets, Rights
from flplatform.core.config import Role
from flplatform.core.errors import PermissionDeniedError
from flplatform.hci import SESSION_RIGHT, AdminSession, help_page, parse, tokenise
from flplatform.security.authz import PERMISSIONS
from flplatform.security.identity import Identity
from flplatform.security.signing import CommandOrder
from tests.support.control import FakeControl, run, site
from tools import commands

NOW = datetime(2024, 5, 1, tzinfo=UTC)
ROLES: tuple[Role, ...] = get_args(Role)
REGISTER = commands.register()
NAMES = [view.name for view in REGISTER.views() if view.name not in HIDDEN]

# ------------------------------------------------------------------------------------ documents


def test_the_documents_are_up_to_date():
    for path, text in commands.files().items():
        assert path.read_text() == text, f"{path.name} differs from the commands: run make docs"


def test_the_generator_is_deterministic():
    assert commands.files() == commands.files()


@pytest.mark.parametrize("name", NAMES)
def test_a_command_explains_itself(name):
    spec, view = REGISTER.find(name), REGISTER.view(name)
    assert spec.permission in (*PERMISSIONS, SESSION_RIGHT)
    assert spec.summary
    assert not spec.summary.endswith(".")
    assert all(parameter.help for parameter in view.parameters)
    assert spec.examples
    for example in spec.examples:
        command, *words = tokenise(example)
        assert command in (name, *spec.aliases)
        parse(words, spec)
    assert view.summary in help_page(view)


@pytest.mark.parametrize("name", NAMES)
def test_site_and_server_ask_for_the_same_right(name):
    verb = commands.site_verbs().get(name)
    assert verb is None or verb.permission == REGISTER.find(name).permission


# ---------------------------------------------------------------------------------- permissions


def table() -> dict[str, dict[str, str]]:
    """Read the table of the document: command -> right or role -> cell."""
    text = (commands.DOCS / "permissions.md").read_text()
    block = text.partition(commands.BEGIN)[2].partition(commands.END)[0]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]]
                        for line in block.strip().splitlines())  # fmt: skip
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture(scope="module")
def documented() -> dict[str, dict[str, str]]:
    return table()


def test_the_table_has_every_command_and_no_other(documented):
    assert [*documented] == NAMES


def actor(role: Role) -> Identity:
    return Identity("heart", "admin", "own", "me", role, "fp", 1, NOW + timedelta(days=9))


CONTROL = FakeControl(
    site_views=[site("here", "own"), site("there", "other")],
    run_views={
        1: run(1, submitter="me", submitter_organisation="own"),
        2: run(2, submitter="colleague", submitter_organisation="own"),
        3: run(3, submitter="stranger", submitter_organisation="other"),
    },
)


def concern(name: str) -> str:
    """Return what `Rights` weighs a command against: the first of the protocols that fits."""
    spec = REGISTER.find(name)
    args = parse(tokenise(spec.examples[0])[1:], spec)
    if name in SUBMITTING or name == LIST_RUNS:
        return "nothing"
    protocols = {"files": ForFiles, "run": ForRun, "targets": ForTargets}
    return next((what for what, kind in protocols.items() if isinstance(args, kind)), "nothing")


def may(rights: Rights, role: Role, name: str, host: str, number: int) -> bool:
    """Ask the real authorizer.

    Args:
        rights: of a server without a policy of its own.
        role: of who asks.
        name: of the command.
        host: the site that the command is for, if it is for any.
        number: of the run that the command is about, if it is about one.
    """
    args = {
        "files": SimpleNamespace(source_run=number),
        "run": SimpleNamespace(run=number),
        "targets": SimpleNamespace(targets=("client", host)),
        "nothing": SimpleNamespace(),
    }[concern(name)]
    order = CommandOrder(
        project="heart",
        issued_at=NOW,
        not_after=NOW + timedelta(seconds=60),
        id="0" * 32,
        argv=(name,),
        run=None,
    )
    take_in_hand(Ordered(order, actor(role), b""))
    session = AdminSession("s", "me", role, "own", "peer", "fp", 0.0, 0.0)
    try:
        rights.check(session, REGISTER.find(name).permission, name, args)
    except PermissionDeniedError:
        return False
    return True


# cell -> for (server's organisation, site, run): whether it grants
MEANINGS = {
    commands.ALWAYS: lambda *_: True,
    commands.NEVER: lambda *_: False,
    commands.OWN_SITE: lambda organisation, _: organisation == "own",
    commands.OWN_RUN: lambda _, number: number == 1,
    commands.OWN_ORGANISATION: lambda _, number: number in (1, 2),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", NAMES)
def test_the_table_tells_the_truth(documented, tmp_path, name, role):
    spec = REGISTER.find(name)
    assert documented[name]["right"] == spec.permission
    granted = MEANINGS[documented[name][role]]
    for server in ("own", "other"):
        rights = Rights(tmp_path / "policy.yml", server, CONTROL)
        for host, organisation in (("here", "own"), ("there", "other")):
            for number in (1, 2, 3):
                truth = may(rights, role, name, host, number)
                told = granted(organisation if concern(name) == "targets" else server, number)
                assert truth == told, (server, host, number)
