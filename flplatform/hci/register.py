"""All commands of a server, checked when they are added, not when they are used."""

import re
from collections.abc import Iterable
from typing import Any

from flplatform.core.errors import InternalError, InvalidArgumentError
from flplatform.hci.grammar import did_you_mean, parse, tokenise
from flplatform.hci.spec import CommandModule, CommandSpec
from flplatform.hci.view import SpecView, view_of

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_ALIAS = re.compile(r"[a-z][a-z0-9_]*|\?")


class CommandRegister:
    """The commands of all modules by name and alias.

    Args:
        modules: whose commands to add.

    Raises:
        InternalError: as `add`.
    """

    def __init__(self, modules: Iterable[CommandModule] = ()) -> None:
        self._specs: dict[str, CommandSpec[Any]] = {}  # names and aliases
        self._views: dict[str, SpecView] = {}  # names
        for module in modules:
            self.add(module)

    def add(self, module: CommandModule) -> None:
        """Adds the commands of a module.

        Raises:
            InternalError: a command has a name that is taken or ill formed, no permission, no
                summary, no example, one that does not parse, or arguments that no line can hold.
        """
        for spec in module.commands():
            view = view_of(spec, module.name)
            names = (spec.name, *spec.aliases)
            _check(spec, names)
            for name in names:
                if name in self._specs or names.count(name) > 1:
                    raise InternalError(f"command {spec.name}: the name {name} is taken")
            self._specs |= dict.fromkeys(names, spec)
            self._views[spec.name] = view

    def find(self, name: str) -> CommandSpec[Any]:
        """The command of this name or alias.

        Raises:
            InvalidArgumentError: there is none; the hint names the nearest one.
        """
        try:
            return self._specs[name]
        except KeyError:
            raise unknown_command(name, self._specs) from None

    def view(self, name: str) -> SpecView:
        """The view of the command of this name or alias.

        Raises:
            InvalidArgumentError: there is none; the hint names the nearest one.
        """
        return self._views[self.find(name).name]

    def views(self) -> list[SpecView]:
        """All commands in the order in which they were added."""
        return list(self._views.values())


def unknown_command(name: str, known: Iterable[str]) -> InvalidArgumentError:
    """The error for a command that does not exist."""
    hint = did_you_mean(name, known) or "type help for the commands"
    return InvalidArgumentError(f"unknown command {name!r}", hint=hint)


def _check(spec: CommandSpec[Any], names: tuple[str, ...]) -> None:
    if not _NAME.fullmatch(spec.name) or not all(map(_ALIAS.fullmatch, spec.aliases)):
        raise InternalError(f"command {spec.name}: a name is lower case with underscores")
    for field in ("permission", "summary", "examples"):
        if not getattr(spec, field):
            raise InternalError(f"command {spec.name}: it has no {field}")
    for example in spec.examples:
        try:
            name, *words = tokenise(example) or [""]
            parse(words, spec)
        except InvalidArgumentError as error:
            raise InternalError(f"command {spec.name}: example {example!r}: {error}") from error
        if name not in names:
            raise InternalError(f"command {spec.name}: example {example!r} is of another command")
