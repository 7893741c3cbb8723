"""What a command is: one frozen `CommandSpec`, and the module that brings it.

The spec is the only place that knows a command. Parsing, usage errors, completion, help, the JSON
schema, the permission check and the audit all follow from it.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Final, Generic, Protocol, TypeVar

from flplatform.hci.connection import Connection

ARGUMENT: Final = "flplatform.argument"
"""Key of a dataclass field's metadata under which its `Argument` lies."""

SESSION_RIGHT: Final = "session"
"""The right that every signed-in user has: help, whoami and the like."""

ArgsT = TypeVar("ArgsT")


@dataclass(frozen=True)
class Argument:
    """How one field of an arguments dataclass is typed and shown; see `argument`."""

    help: str
    choices: tuple[str, ...]
    complete: str
    option: str
    rest: bool
    verbatim: bool
    minimum: float | None
    metavar: str


def argument(
    *,
    help: str,
    choices: tuple[str, ...] = (),
    complete: str = "",
    option: str = "",
    rest: bool = False,
    verbatim: bool = False,
    minimum: float | None = None,
    metavar: str = "",
    default: Any = MISSING,
) -> Any:
    """A field of an arguments dataclass.

    The field's type may be `int`, `float`, `str`, `bool`, a `Literal` of strings or integers, an
    Optional of these, or `tuple[T, ...]`. A `bool` is a flag: it needs an option and defaults to
    False. A tuple is either the `rest` of the words or an option whose values are separated by
    commas, repeated, or both (so none of them holds a comma).

    Args:
        help: what it is, in a few words.
        choices: the only legal values; a `Literal` brings its own.
        complete: kind of the values for completion; `path`, `path:FILE` (folders that hold this
            file first) and `command` are the console's own, any other is asked of the server.
        option: spellings, the first one canonical (`--follow -f`); "" makes it positional.
        rest: takes all remaining words; only for the last positional, a tuple.
        verbatim: as `rest`, and after its first word no word is read as an option.
        minimum: smallest legal number.
        metavar: name of the value in usage lines; default the field's name in capitals.
        default: value if absent; without it the argument is required.
    """
    about = Argument(
        help=help,
        choices=choices,
        complete=complete,
        option=option,
        rest=rest or verbatim,
        verbatim=verbatim,
        minimum=minimum,
        metavar=metavar,
    )
    return field(default=default, metadata={ARGUMENT: about})


@dataclass(frozen=True)
class NoArguments:
    """The arguments of a command that takes none."""


@dataclass(frozen=True)
class CommandSpec(Generic[ArgsT]):
    """One command.

    Attributes:
        name: what is typed; lower case with underscores.
        summary: one line.
        arguments: a frozen dataclass; each field is made by `argument`.
        handler: decode, one call, rows.
        permission: name of the right it needs; never empty.
        mutating: whether it changes anything, and so is audited before it starts.
        examples: at least one; each must parse.
        confirm: returns the question that names what would be lost, or "" when none is needed.
        aliases: other names.
        states: prose: when the command is legal.
        local: the console's action that carries the command out, or "" for the server.
        needs: what must be there before, in words, for the help page.
        survives_disconnect: whether the handler goes on when the one who asked has gone.
        transient: whether its reply is worth nothing afterwards, such as an endless stream.
        reauthenticate: whether it wants a password check of the last minutes.
    """

    name: str
    summary: str
    arguments: type[ArgsT]
    handler: Callable[[Connection, ArgsT], Awaitable[None]]
    permission: str
    mutating: bool
    examples: tuple[str, ...]
    confirm: Callable[[ArgsT], Awaitable[str]] | None = None
    aliases: tuple[str, ...] = ()
    states: str = ""
    local: str = ""
    needs: tuple[str, ...] = ()
    survives_disconnect: bool = False
    reauthenticate: bool = False
    transient: bool = False


class CommandModule(Protocol):
    """A group of commands; it gets the ports it needs in its constructor."""

    @property
    def name(self) -> str:
        """Heading in the help."""
        ...

    @property
    def summary(self) -> str:
        """One line for the help."""
        ...

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands of this module."""
        ...
