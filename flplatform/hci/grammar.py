"""From a command line to typed arguments; every error names the argument and shows the usage."""

import difflib
import math
import re
import shlex
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from flplatform.core.errors import InvalidArgumentError
from flplatform.hci.spec import ArgsT, CommandSpec
from flplatform.hci.view import Parameter, SpecView, usage, view_of

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def tokenise(line: str) -> list[str]:
    """Splits a line into words by the shell's quoting rules.

    Raises:
        InvalidArgumentError: a quotation does not end.
    """
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InvalidArgumentError(
            "a quotation or an escape does not end", hint="close it, or quote the quote"
        ) from error


def wants_json(line: str) -> tuple[str, bool]:
    """Splits `COMMAND --json`: the command, and whether its reply is wanted as JSON."""
    bare = line.rstrip().removesuffix("--json")
    return (bare, True) if bare[-1:].isspace() and bare.strip() else (line, False)


def redirection(line: str) -> tuple[str, str, bool]:
    """Splits `COMMAND > FILE` or `COMMAND >> FILE`; a quoted `>` is a word like any other.

    Returns:
        The command, the file or "", and whether to append.

    Raises:
        InvalidArgumentError: not exactly one file follows.
    """
    quote, escaped, before = "", False, " "
    for i, char in enumerate(line):
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == ">" and before.isspace():
            append = line.startswith(">>", i)
            files = tokenise(line[i + 1 + append :])
            if len(files) != 1:
                raise InvalidArgumentError(
                    f"one file follows {'>>' if append else '>'}",
                    hint="quote a > that is part of the command",
                )
            return line[:i], files[0], append
        before = char
    return line, "", False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean NAME?` for the nearest known word, or ""."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def parse(words: Sequence[str], spec: CommandSpec[ArgsT]) -> ArgsT:
    """The arguments in the words that follow a command's name.

    Raises:
        InvalidArgumentError: they do not fit; its hint is the usage line.
        InternalError: the arguments dataclass cannot be a command line.
    """
    view = view_of(spec)
    values = parse_words(words, view)
    try:
        return spec.arguments(**values)
    except ValueError as error:  # a rule across fields, from __post_init__
        raise InvalidArgumentError(str(error), hint=f"usage: {usage(view)}") from error


def parse_words(words: Sequence[str], view: SpecView) -> dict[str, Any]:
    """As `parse`, from the view alone: {field: value}, with the defaults filled in.

    Raises:
        InvalidArgumentError: the words do not fit; its hint is the usage line.
    """
    try:
        given, free = _sort(words, view)
        _assign(free, given, view)
        return {p.name: _value(p, given.get(p.name)) for p in view.parameters}
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            error.message, field=error.field, hint=f"usage: {usage(view)}"
        ) from None


def looks_like_option(word: str) -> bool:
    """Whether a word asks to be read as an option: `-x`, `--long`, but not `-`, `-1`, `-.5e3`."""
    return word.startswith("-") and word != "-" and not _NUMBER.fullmatch(word)


def _sort(words: Sequence[str], view: SpecView) -> tuple[dict[str, list[str]], list[str]]:
    """Tells options (by field name) from free words."""
    options = {spelling: p for p in view.parameters for spelling in p.options}
    positionals = [p for p in view.parameters if not p.options]
    # So many free words, and all that follows is free too.
    verbatim_after = next((i + 1 for i, p in enumerate(positionals) if p.verbatim), math.inf)
    given: dict[str, list[str]] = {}
    free: list[str] = []
    queue = deque(words)
    while queue:
        word = queue.popleft()
        if len(free) >= verbatim_after or not looks_like_option(word):
            free.append(word)
        elif word == "--":
            free.extend(queue)
            break
        elif word[1] != "-" and word not in options and "=" not in word:
            for letter in word[1:]:  # a cluster of flags: -alt
                if f"-{letter}" not in options or options[f"-{letter}"].kind != "flag":
                    raise _unknown_option(word, options)
                _option(f"-{letter}", queue, options, given)
        else:
            _option(word, queue, options, given)
    return given, free


def _option(
    word: str, queue: deque[str], options: dict[str, Parameter], given: dict[str, list[str]]
) -> None:
    """Takes one option, and its value from the queue unless it is `--name=value`."""
    spelling, equals, value = word.partition("=")
    parameter = options.get(spelling)
    if parameter is None:
        raise _unknown_option(spelling, options)
    if parameter.name in given and not parameter.many:
        raise InvalidArgumentError("given twice", field=spelling)
    if parameter.kind == "flag":
        if equals:
            raise InvalidArgumentError(f"takes no value, got {value!r}", field=spelling)
    elif not equals:
        if not queue or looks_like_option(queue[0]):
            raise InvalidArgumentError("needs a value", field=spelling)
        value = queue.popleft()
    texts = given.setdefault(parameter.name, [])
    texts.extend(value.split(",") if parameter.many else [value])
    if parameter.many and "" in texts:
        raise InvalidArgumentError(f"{value!r} names nothing in one place", field=spelling)


def _unknown_option(word: str, options: Iterable[str]) -> InvalidArgumentError:
    near = did_you_mean(word, options)
    return InvalidArgumentError(f"there is no such option{f'; {near}' if near else ''}", field=word)


def _assign(free: list[str], given: dict[str, list[str]], view: SpecView) -> None:
    """Gives the free words to the positional parameters in order."""
    for parameter in view.parameters:
        if parameter.options:
            if parameter.required and parameter.name not in given:
                raise InvalidArgumentError("is missing", field=parameter.label)
            continue
        count = len(free) if parameter.many else 1
        if free:
            given[parameter.name], free = free[:count], free[count:]
        elif parameter.required:
            raise InvalidArgumentError("is missing", field=parameter.label)
    if free:
        raise InvalidArgumentError(f"unexpected {free[0]!r}")


def _value(parameter: Parameter, texts: list[str] | None) -> Any:
    if texts is None:
        return parameter.default
    if parameter.kind == "flag":
        return True
    values = tuple(_convert(parameter, text) for text in texts)
    return values if parameter.many else values[0]


def _convert(parameter: Parameter, text: str) -> int | float | str:
    if parameter.choices and text not in parameter.choices:
        near = did_you_mean(text, parameter.choices)
        raise InvalidArgumentError(
            f"{text!r} is not one of {', '.join(parameter.choices)}{f'; {near}' if near else ''}",
            field=parameter.label,
        )
    if parameter.kind == "str":
        return text
    if parameter.kind == "int" and _INTEGER.fullmatch(text):
        value: int | float = int(text)
    elif parameter.kind == "float" and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        value = float(text)
    else:
        wanted = "a whole number" if parameter.kind == "int" else "a number"
        raise InvalidArgumentError(f"{text!r} is not {wanted}", field=parameter.label)
    if parameter.minimum is not None and value < parameter.minimum:
        raise InvalidArgumentError(
            f"{text} is below {parameter.minimum:g}, the smallest", field=parameter.label
        )
    return value
