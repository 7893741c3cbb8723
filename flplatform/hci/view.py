"""A command as the console sees it: `SpecView`, a plain value that travels as JSON.

With it the console completes, prints help and checks usage without asking the server; the server
parses with the same value, so that both sides have one grammar.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from flplatform.core.errors import InternalError, InvalidArgumentError
from flplatform.hci.spec import ARGUMENT, Argument, CommandSpec

Kind: TypeAlias = Literal["int", "float", "str", "flag"]
Default: TypeAlias = None | bool | int | float | str | tuple[str, ...] | tuple[float, ...]

_OPTION = re.compile(r"--[a-z][a-z0-9-]*|-[a-zA-Z]")
_KINDS: dict[type, Kind] = {bool: "flag", int: "int", float: "float", str: "str"}
_JSON_TYPES = {"int": "integer", "float": "number", "str": "string", "flag": "boolean"}


class Parameter(BaseModel):
    """One argument; a positional one has no `options`."""

    # A newer server may say more than this console knows: unknown keys are ignored.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    name: str
    kind: Kind
    help: str
    required: bool
    default: Default = None
    many: bool = False
    verbatim: bool = False
    options: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    complete: str = ""
    minimum: float | None = None
    metavar: str = ""

    @property
    def label(self) -> str:
        """The name as a user knows it: `--min`, or `JOB`."""
        return self.options[0] if self.options else self.metavar or self.name.upper()

    @property
    def value(self) -> str:
        """The value in a usage line: `N`, `SECONDS`, `server|client|all`."""
        name = "|".join(self.choices) if 0 < len(self.choices) <= 5 else ""
        return self.metavar or name or self.name.upper()


class SpecView(BaseModel):
    """The wire form of a `CommandSpec`: all but the code.

    `allowed` says whether the user's role can ever carry it out.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    name: str
    module: str
    summary: str
    parameters: tuple[Parameter, ...]
    permission: str
    mutating: bool
    examples: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    states: str = ""
    local: str = ""
    needs: tuple[str, ...] = ()
    confirms: bool = False
    reauthenticate: bool = False
    allowed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The view as a JSON-able dict."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "SpecView":
        """The view that `to_dict` wrote.

        Raises:
            InvalidArgumentError: it is not a view.
        """
        try:
            return cls.model_validate_json(json.dumps(value))
        except (ValidationError, TypeError) as error:
            raise InvalidArgumentError(f"not the description of a command: {error}") from error


def view_of(spec: CommandSpec[Any], module: str = "") -> SpecView:
    """The view of a spec.

    Args:
        spec: the command.
        module: name of the module that brings it.

    Raises:
        InternalError: the arguments dataclass cannot be a command line.
    """
    try:
        parameters = _parameters(spec.arguments)
    except (TypeError, NameError, ValidationError) as error:
        raise InternalError(f"command {spec.name}: {error}") from error
    return SpecView(
        name=spec.name,
        module=module,
        summary=spec.summary,
        parameters=parameters,
        permission=spec.permission,
        mutating=spec.mutating,
        examples=spec.examples,
        aliases=spec.aliases,
        states=spec.states,
        local=spec.local,
        needs=spec.needs,
        confirms=spec.confirm is not None,
        reauthenticate=spec.reauthenticate,
    )


def _parameters(arguments: type) -> tuple[Parameter, ...]:
    if not dataclasses.is_dataclass(arguments):
        raise TypeError(f"{arguments.__name__} is not a dataclass")
    hints = typing.get_type_hints(arguments)
    parameters = tuple(_parameter(f, hints[f.name]) for f in dataclasses.fields(arguments))
    spellings = [option for parameter in parameters for option in parameter.options]
    for option in spellings:
        if spellings.count(option) > 1 or not _OPTION.fullmatch(option):
            raise TypeError(f"option {option} is given twice or is not spelled like an option")
    positionals = [parameter for parameter in parameters if not parameter.options]
    for before, after in zip(positionals, positionals[1:], strict=False):
        if before.many or (after.required and not before.required):
            raise TypeError(f"argument {after.name} cannot follow {before.name}")
    return parameters


def _parameter(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    about = field.metadata.get(ARGUMENT)
    if not isinstance(about, Argument):
        raise TypeError(f"argument {field.name} is not made by argument(...)")
    kind, many, literals = _kind(field.name, hint)
    required = field.default is dataclasses.MISSING
    default: Any = None if required else field.default
    if kind == "flag" and (many or not about.option or default is not False):
        raise TypeError(f"flag {field.name} needs an option and the default False")
    if about.rest and (about.option or not many):
        raise TypeError(f"argument {field.name}: only a positional tuple takes the rest")
    if many and not about.option and not about.rest:
        raise TypeError(f"argument {field.name}: a positional tuple takes the rest")
    return Parameter(
        name=field.name,
        kind=kind,
        help=about.help,
        required=required,
        default=default,
        many=many,
        verbatim=about.verbatim,
        options=tuple(about.option.split()),
        choices=about.choices or literals,
        complete=about.complete,
        minimum=about.minimum,
        metavar=about.metavar,
    )


def _kind(name: str, hint: Any) -> tuple[Kind, bool, tuple[str, ...]]:
    """(kind, whether it is a tuple, the values of a Literal) of a type hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        some = [each for each in inner if each is not type(None)]
        if len(some) == 1:
            return _kind(name, some[0])
    elif origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        kind, many, literals = _kind(name, inner[0])
        if not many:
            return kind, True, literals
    elif origin is Literal and {type(each) for each in inner} in ({str}, {int}):
        return _KINDS[type(inner[0])], False, tuple(str(each) for each in inner)
    elif hint in _KINDS:
        return _KINDS[hint], False, ()
    raise TypeError(f"argument {name} has type {hint}, which no command line can hold")


def usage(view: SpecView) -> str:
    """The usage line: `submit JOB [--min N] [--only NAME,…]`."""
    words = [view.name]
    # After the first word of a verbatim parameter nothing is an option any more: it comes last.
    for parameter in sorted(view.parameters, key=lambda each: each.verbatim):
        if parameter.kind == "flag":
            word = parameter.label
        elif parameter.options:
            word = f"{parameter.label} {parameter.value}" + (",…" if parameter.many else "")
        else:
            word = parameter.value + ("…" if parameter.many else "")
        words.append(word if parameter.required else f"[{word}]")
    return " ".join(words)


def help_page(view: SpecView) -> str:
    """Everything a user may want to know about one command, as lines of text."""
    lines = [usage(view), f"  {view.summary}"]
    if view.parameters:
        names = [", ".join(p.options) or p.label for p in view.parameters]
        width = max(map(len, names))
        lines.append("")
        for name, parameter in zip(names, view.parameters, strict=True):
            notes = []
            if parameter.choices:
                notes.append("one of " + ", ".join(parameter.choices))
            default = parameter.default
            if isinstance(default, tuple):
                default = " ".join(map(str, default))
            if default not in (None, "", False) and "default" not in parameter.help:
                notes.append(f"default {default}")
            note = f" ({'; '.join(notes)})" if notes else ""
            lines.append(f"  {name:<{width}}  {parameter.help}{note}")
    lines.append("")
    lines.append(f"  right     {view.permission}{'' if view.allowed else ': not for your role'}")
    for title, text in (
        ("legal", view.states),
        ("needs", ", ".join(view.needs)),
        ("also", ", ".join(view.aliases)),
        ("confirm", "asked for before it starts" if view.confirms else ""),
        ("password", "asked for if the last time is long ago" if view.reauthenticate else ""),
    ):
        if text:
            lines.append(f"  {title:<8}  {text}")
    lines.extend(f"  example   {example}" for example in view.examples)
    return "\n".join(lines)


def overview(views: Iterable[SpecView]) -> str:
    """All commands by module, as lines of text; those that the role cannot use come last."""
    modules: dict[str, list[SpecView]] = {}
    refused: list[str] = []
    for view in views:
        if view.allowed:
            modules.setdefault(view.module, []).append(view)
        else:
            refused.append(view.name)
    names = {
        view.name: ", ".join((view.name, *view.aliases))
        for each in modules.values()
        for view in each
    }
    width = max(map(len, names.values()), default=0)
    lines: list[str] = []
    for module, each in modules.items():
        lines += [*([""] if lines else []), module]
        lines += [f"  {names[view.name]:<{width}}  {view.summary}" for view in each]
    if refused:
        lines += ["", f"not for your role  {', '.join(refused)}"]
    note = "help COMMAND explains one; COMMAND --json prints JSON; COMMAND > FILE writes a file"
    return "\n".join([*lines, "", note])


def schema(view: SpecView) -> dict[str, Any]:
    """The JSON schema of a command's arguments."""
    properties: dict[str, Any] = {}
    for parameter in view.parameters:
        value: dict[str, Any] = {"type": _JSON_TYPES[parameter.kind]}
        if parameter.choices:
            numeric = parameter.kind == "int"
            value["enum"] = [int(c) if numeric else c for c in parameter.choices]
        if parameter.minimum is not None:
            value["minimum"] = parameter.minimum
        if parameter.many:
            value = {"type": "array", "items": value}
        if not parameter.required and parameter.default is not None:
            default = parameter.default
            value["default"] = [*default] if isinstance(default, tuple) else default
        properties[parameter.name] = {**value, "description": parameter.help}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": view.name,
        "type": "object",
        "properties": properties,
        "required": [p.name for p in view.parameters if p.required],
        "additionalProperties": False,
    }
