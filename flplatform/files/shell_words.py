"""The words of `pwd ls cat head tail grep env`: targets first, then PATH, or PATTERN and PATH.

One function reads them where a command is sent and where it is carried out, so that both mean the
same by it.
"""

import getopt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, get_args

from flplatform.core.config import NAME_PATTERN, ShellCommand
from flplatform.core.errors import InvalidArgumentError, PermissionDeniedError
from flplatform.files.names import check_path

ROOTS: Final = ("logs", "runs")
"""What every path begins with."""

_OPTIONS: Final[Mapping[str, str]] = {
    "pwd": "",
    "ls": "alRtSru",
    "cat": "nbsT",
    "head": "n:c:",
    "tail": "n:c:",
    "grep": "nibcvE",
    "env": "",
}
COMMANDS: Final[tuple[ShellCommand, ...]] = get_args(ShellCommand)
_OPERANDS: Final = {"pwd": 0, "ls": 1, "cat": 1, "head": 1, "tail": 1, "grep": 2, "env": 0}


@dataclass(frozen=True, slots=True)
class Look:
    """A parsed command.

    Attributes:
        command: its name.
        targets: `server`, `all`, or `client` and sites, none meaning every one.
        path: in the tree; empty for its root.
        pattern: of `grep`.
        options: letter → value, empty for a flag.
    """

    command: str
    targets: tuple[str, ...]
    path: str = ""
    pattern: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def reaches(self, site: str) -> bool:
        """Return whether it means this site."""
        first, *sites = self.targets
        return first == "all" or (first == "client" and (not sites or site in sites))


def parse(argv: tuple[str, ...]) -> Look:
    """Read the words of a command.

    Raises:
        InvalidArgumentError: they are none of these commands, or do not fit it.
    """
    command = argv[0] if argv else ""
    if command not in _OPTIONS:
        raise InvalidArgumentError(
            f"{command[:80]!r} is not one of {', '.join(_OPTIONS)}", field="command"
        )
    try:
        given, words = getopt.gnu_getopt(list(argv[1:]), _OPTIONS[command])
    except getopt.GetoptError as error:
        hint = "-- ends the options" if command == "grep" else ""
        raise InvalidArgumentError(error.msg, field=command, hint=hint) from None
    targets, operands = split(command, tuple(words))
    options = {name[1:]: value for name, value in given}
    for name in ("n", "c"):
        if options.get(name) and not re.fullmatch(r"[0-9]{1,9}", options[name], re.ASCII):
            raise InvalidArgumentError(f"{options[name][:80]!r} is no number", field=f"-{name}")
    path = operands[-1] if operands else ""
    pattern = operands[0] if len(operands) == 2 else ""
    return Look(command, targets, _checked(path), pattern, options)


def demand_allowed(command: str, allowed: Sequence[str]) -> None:
    """Refuse a command that a host's policy does not list; an empty list allows none.

    Raises:
        PermissionDeniedError: with the rule.
    """
    if command not in allowed:
        raise PermissionDeniedError(
            f"{command} is off here",
            rule=f"policy allowed_shell_cmds = {', '.join(allowed) or 'none'}",
        )


def split(command: str, words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tell targets from operands: PATH, or PATTERN and PATH, come last.

    Raises:
        InvalidArgumentError: there is no target, or an operand is missing or too much.
    """
    first, *rest = words or ("",)
    if first not in ("server", "client", "all"):
        raise InvalidArgumentError(
            f"is server, client [SITE…] or all, not {first[:80]!r}", field="TARGET"
        )
    wanted = _OPERANDS[command]
    if command == "ls" and not (rest and (first != "client" or _is_path(rest[-1]))):
        wanted = 0
    if len(rest) < wanted:
        raise InvalidArgumentError("is missing", field="PATH" if rest or wanted == 1 else "PATTERN")
    at = len(rest) - wanted
    if first != "client" and at:
        raise InvalidArgumentError(f"{rest[0][:80]!r} is too much", field=command)
    return (first, *rest[:at]), tuple(rest[at:])


def _is_path(word: str) -> bool:
    """Return whether the last word after `ls client` is a path, not the name of a site."""
    return word.split("/")[0] in ROOTS or not re.fullmatch(NAME_PATTERN, word, re.ASCII)


def _checked(path: str) -> str:
    bare = path.removesuffix("/") if path != "/" else path
    if bare in ("", "."):
        return ""
    parts = check_path(bare, "PATH")
    if parts[0] not in ROOTS:
        raise InvalidArgumentError(
            f"{bare[:80]!r} does not begin with {' or '.join(f'{root}/' for root in ROOTS)}",
            field="PATH",
        )
    return bare
