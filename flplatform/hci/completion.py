"""What can be typed next: from the views of the commands, and the server for changing values."""

import os
import shlex
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from flplatform.core.errors import FLError, InvalidArgumentError
from flplatform.hci.grammar import looks_like_option, tokenise
from flplatform.hci.view import Parameter, SpecView

Dynamic = Callable[[str, str], Awaitable[list[str]]]
"""(kind, prefix) -> values that exist now; for one more of several words the kind is
`KIND:FIRST WORD`."""


@dataclass(frozen=True)
class Candidate:
    """One way to go on.

    Attributes:
        text: replaces the word under the cursor, quoted where it must be.
        replaces: how many characters before the cursor it replaces.
        shown: how a menu shows it.
        about: one line about it, or "".
    """

    text: str
    replaces: int
    shown: str
    about: str = ""


async def complete(line: str, views: Sequence[SpecView], dynamic: Dynamic) -> list[Candidate]:
    """The ways to go on after `line`, the text before the cursor.

    Args:
        line: what has been typed.
        views: the commands.
        dynamic: asks for values that change; if it raises an FLError there are none.
    """
    start = _last_word(line)
    raw, words = line[start:], tokenise(line[:start])
    prefix = _unquote(raw)
    if not words:
        return _candidates(raw, "", prefix, [(view.name, view.summary) for view in views])
    view = next((v for v in views if words[0] in (v.name, *v.aliases)), None)
    if view is None:
        return []
    parameter, used, free = _under_cursor(words[1:], view)
    if parameter is not None and parameter.verbatim and free:  # a command within a command
        return await complete(f"{shlex.join(free)} {raw}", views, dynamic)
    head = ""
    if parameter is None or not parameter.options:  # no option waits for its value
        spelling, equals, _ = prefix.partition("=")
        option = next((p for p in view.parameters if spelling in p.options), None)
        if equals and option is not None and option.kind != "flag":
            parameter, head, prefix = option, spelling + "=", prefix[len(spelling) + 1 :]
        elif prefix.startswith("-"):
            return _candidates(raw, "", prefix, _options(view, used))
    if parameter is None:
        return []
    if parameter.options and parameter.many:
        cut = prefix.rfind(",") + 1
        head, prefix = head + prefix[:cut], prefix[cut:]
    first = free[0] if parameter.many and free and not parameter.options else ""
    values = await _values(parameter, prefix, views, dynamic, first)
    if parameter.many:
        taken = set(words) | set(head.rpartition("=")[2].split(","))
        values = [value for value in values if value[0] not in taken]
    return _candidates(raw, head, prefix, values)


def _last_word(line: str) -> int:
    """Where the word under the cursor begins."""
    start, quote, escaped = 0, "", False
    for i, char in enumerate(line):
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in " \t\r\n":
            start = i + 1
    return start


def _unquote(raw: str) -> str:
    """What an unfinished word stands for."""
    for ending in ("", "'", '"'):
        try:
            return "".join(tokenise(raw + ending))
        except InvalidArgumentError:
            continue
    return raw


def _under_cursor(
    words: Sequence[str], view: SpecView
) -> tuple[Parameter | None, set[str], list[str]]:
    """(whose value the next word is, names of the options before it, the free words before it)."""
    options = {spelling: p for p in view.parameters for spelling in p.options}
    positionals = [p for p in view.parameters if not p.options]
    free: list[str] = []
    used: set[str] = set()
    waiting: Parameter | None = None
    for word in words:
        spelling, equals, _ = word.partition("=")
        verbatim = free and positionals[min(len(free), len(positionals)) - 1].verbatim
        if waiting is not None:
            waiting = None
        elif looks_like_option(word) and not verbatim:
            option = options.get(spelling)
            if option is not None:
                used.add(option.name)
                waiting = option if option.kind != "flag" and not equals else None
        elif positionals:
            free.append(word)
    if waiting is not None:
        return waiting, used, []
    if len(free) < len(positionals):
        return positionals[len(free)], used, []
    last = positionals[-1] if positionals and positionals[-1].many else None
    return last, used, free[len(positionals) - 1 :]


def _options(view: SpecView, used: set[str]) -> list[tuple[str, str]]:
    return [
        (p.label, p.help) for p in view.parameters if p.options and (p.many or p.name not in used)
    ]


async def _values(
    parameter: Parameter, prefix: str, views: Sequence[SpecView], dynamic: Dynamic, first: str
) -> list[tuple[str, str]]:
    """[(value, what it is)]; `first` is the first of the words that the next one continues."""
    if parameter.choices:
        return [(choice, "") for choice in parameter.choices]
    match parameter.complete:
        case "":
            return []
        case "path":
            return [(path, "") for path in _paths(prefix)]
        case kind if kind.startswith("path:"):
            return _folders_with(kind.removeprefix("path:"), prefix)
        case "command":
            return [(view.name, view.summary) for view in views]
        case kind:
            try:
                values = await dynamic(f"{kind}:{first}" if first else kind, prefix)
            except FLError:
                return []
            return [(value, "") for value in values if value.isprintable()]


def _paths(prefix: str) -> list[str]:
    """Files and folders on this machine; a folder ends in a slash."""
    folder = os.path.dirname(prefix)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    except OSError:
        return []
    hidden = os.path.basename(prefix).startswith(".")
    return [os.path.join(folder, name) for name in names if hidden or not name.startswith(".")]


def _folders_with(file: str, prefix: str) -> list[tuple[str, str]]:
    """Folders that hold a file, and then those through which one may get to more."""
    folders = [path for path in _paths(prefix) if path.endswith("/")]
    marked = [path for path in folders if os.path.isfile(os.path.expanduser(path) + file)]
    found = [(path.rstrip("/"), f"has {file}") for path in marked]
    return found + [(path, "") for path in folders if path not in marked]


def _candidates(
    raw: str, head: str, prefix: str, values: Iterable[tuple[str, str]]
) -> list[Candidate]:
    return [
        Candidate(_quote(head + value), len(raw), value, about)
        for value, about in values
        if value.startswith(prefix)
    ]


def _quote(word: str) -> str:
    """The word as it must be typed; a leading `~/` stays one."""
    home, rest = ("~/", word[2:]) if word.startswith("~/") else ("", word)
    return home + shlex.quote(rest) if rest else home
