"""Text that a person, a kit or a peer brings, parsed strictly and once.

`parse_yaml` and `parse_json` turn text into a frozen model or raise one `ConfigError` that lists
*all* problems, each as `source:line: key.path: problem`. Nothing is coerced, no key is ignored,
and neither aliases nor tags are followed, so the text of an untrusted job is safe to parse.
"""

import contextlib
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from flplatform.core.errors import ConfigError

MAX_TEXT_BYTES = 4 << 20
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, int]
Problems = Iterable[tuple[KeyPath, str]]
M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Frozen; unknown keys, coerced types, NaN and infinity are refused (a float takes an int)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class FromNewer(Strict):
    """As strict, but a key that only a newer release knows is passed over.

    For what a server adds to requests, unsigned: it decides nothing that a signature must cover.
    """

    model_config = ConfigDict(extra="ignore")


def _nothing(_: object) -> Problems:
    return ()


def parse_yaml(
    model: type[M], text: str, source: str, check: Callable[[M], Problems] = _nothing
) -> M:
    """Parse one YAML document; an empty one means `{}`.

    Args:
        model: what the text must be.
        text: the document.
        source: its name in error messages, usually a path.
        check: finds what is wrong between the fields of an otherwise valid value, as pairs of a
            key path and a sentence.

    Raises:
        ConfigError: with every problem found.
    """
    _check_size(text, source)
    reader = _YamlReader(text, source)
    value = reader.read()
    value = {} if value is None else value
    return _build(model, value, source, reader.lines, reader.problems, check)


def parse_json(model: type[M], text: str | bytes, source: str) -> M:
    """Parse one JSON document (UTF-8 if given as bytes), refusing duplicate keys.

    Raises:
        ConfigError: with every problem found; lines are named where the text is also YAML.
    """
    _check_size(text, source)
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        repeated.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(items)

    try:
        decoded = text if isinstance(text, str) else text.decode()
        value = json.loads(decoded, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        problem = f"{source}:{error.lineno}: {error.msg}"
        raise ConfigError(f"{source} is not JSON", problems=(problem,)) from None
    except (ValueError, RecursionError) as error:
        problem = f"{source}: {type(error).__name__}: {error}"
        raise ConfigError(f"{source} is not JSON", problems=(problem,)) from None
    problems = [(0, f"{key}: key given twice") for key in repeated]
    try:
        return _build(model, value, source, {}, problems)
    except ConfigError:
        reader = _YamlReader(decoded, source)  # only to learn the lines
        with contextlib.suppress(ConfigError):
            reader.read()
            problems = reader.problems or problems
        return _build(model, value, source, reader.lines, problems)


def _check_size(text: str | bytes, source: str) -> None:
    if len(text) > MAX_TEXT_BYTES:
        raise ConfigError(f"{source} is larger than {MAX_TEXT_BYTES} bytes")


def _build(
    model: type[M],
    value: object,
    source: str,
    lines: Lines,
    problems: list[tuple[int, str]],
    check: Callable[[M], Problems] = _nothing,
) -> M:
    """Validate `value`, adding the model's complaints to those of the reader."""
    found = list(problems)
    try:
        # JSON mode: strict, yet lists may become tuples and text may become enums.
        built = model.model_validate_json(json.dumps(value))
        for path, what in check(built):
            found.append((_line_of(path, lines), f"{key_path(path)}: {what}"))
        if not found:
            return built
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            found.append((_line_of(item["loc"], lines), _describe(model, item)))
    found.sort(key=lambda problem: problem[0])
    texts = tuple(_at(source, line, what) for line, what in found)
    count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
    raise ConfigError(f"{source} has {count}", problems=texts)


def _at(source: str, line: int, what: str) -> str:
    return f"{source}:{line}: {what}" if line else f"{source}: {what}"


def _line_of(path: KeyPath, lines: Lines) -> int:
    """Line of the deepest part of `path` that the text really has."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 0)


def key_path(path: Iterable[str | int]) -> str:
    """Write a path the way people do: `sites[2].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _describe(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    path: KeyPath = error["loc"]
    where = key_path(path) or "the document"
    match error["type"]:
        case "missing":
            return f"{where}: is required"
        case "extra_forbidden":
            known = sorted(_fields_at(model, path[:-1]))
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            return f"{where}: unknown key; {hint}"
        case "value_error":
            return f"{where}: {error['msg'].removeprefix('Value error, ')}"
        case _:
            message = error["msg"].replace("Input should", "should", 1)
            got = error.get("input")
            shown = got if isinstance(got, (str, int, float, type(None))) else type(got).__name__
            return f"{where}: {message}, got {shown!r:.60}"


def _fields_at(model: type[BaseModel], path: KeyPath) -> set[str]:
    """Names of the keys allowed under `path`."""
    models = {model}
    for part in path:
        inner = {
            found
            for owner in models
            if part in owner.model_fields
            for found in _models_in(owner.model_fields[str(part)].annotation)
        }
        models = inner or models  # an index, a mapping's key or a union's tag
    return {name for owner in models for name in owner.model_fields}


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


class _Resolver(yaml.resolver.Resolver):
    """YAML 1.1, plus `1e-3` read as a number, as everybody expects."""


_Resolver.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


class _YamlReader:
    """Builds plain values from parser events, remembering the line of every key path.

    Working on events instead of nodes bounds the depth and meets aliases before they expand.
    """

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._events = yaml.parse(text, Loader=yaml.CSafeLoader)
        self._resolver = _Resolver()
        self._constructor = yaml.constructor.SafeConstructor()
        self.lines: Lines = {}
        self.problems: list[tuple[int, str]] = []

    def read(self) -> object:
        """Return the document's value.

        Raises:
            ConfigError: the text is not YAML; other problems are collected.
        """
        try:
            event = next(self._events)
            while isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)):
                event = next(self._events)
            if isinstance(event, yaml.StreamEndEvent):
                return None
            value = self._value(event, ())
            next(self._events)  # the end of the document
            if isinstance(extra := next(self._events), yaml.DocumentStartEvent):
                self._complain(extra, (), "only one document per file")
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            problem = f"{self._source}:{line}: {error.problem or error.context}"
            raise ConfigError(f"{self._source} is not YAML", problems=(problem,)) from None
        except yaml.YAMLError as error:
            problem = f"{self._source}: {str(error).splitlines()[0]}"
            raise ConfigError(f"{self._source} is not YAML", problems=(problem,)) from None
        return value

    def _complain(self, event: yaml.Event, path: KeyPath, what: str) -> None:
        where = f"{key_path(path)}: " if path else ""
        self.problems.append((_line(event), where + what))

    def _value(self, event: yaml.Event, path: KeyPath) -> object:
        self.lines.setdefault(path, _line(event))
        if len(path) > MAX_DEPTH:
            problem = f"{self._source}:{_line(event)}: nested deeper than {MAX_DEPTH}"
            raise ConfigError(f"{self._source} is nested too deeply", problems=(problem,))
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[object] = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(item, (*path, len(items))))
            return items
        if isinstance(event, yaml.AliasEvent):
            self._complain(event, path, "aliases are not supported, write the value again")
            return None
        return self._scalar(cast(yaml.ScalarEvent, event), path)

    def _mapping(self, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._value(event, (*path, "?"))
                self._value(next(self._events), (*path, "?"))
                self._complain(event, path, "a key must be plain text")
                continue
            key = str(event.value)
            inner = (*path, key)
            if key in values:
                self._complain(event, inner, f"key given twice, first in line {self.lines[inner]}")
                self._value(next(self._events), (*path, "?"))
                continue
            self.lines[inner] = _line(event)
            values[key] = self._value(next(self._events), inner)
        return values

    def _resolve(self, event: yaml.ScalarEvent) -> str:
        tag: str = self._resolver.resolve(yaml.ScalarNode, event.value, event.implicit)  # type: ignore[no-untyped-call]
        return tag

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> object:
        tag = event.tag
        if tag is None or tag == "!":
            tag = self._resolve(event)
            if tag not in _PLAIN_TAGS:  # a date, `<<` or `=`: text, unless a model says otherwise
                return event.value
        if tag not in _PLAIN_TAGS:
            self._complain(event, path, f"tag {tag} is not supported")
            return None
        try:
            value = self._constructor.construct_object(yaml.ScalarNode(tag, event.value))
        except (ValueError, KeyError):
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            self._complain(event, path, f"{event.value!r:.60} is not a {tag.rpartition(':')[2]}")
            return None
        return cast(object, value)
