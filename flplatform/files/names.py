"""Names of files that come from elsewhere: a grammar so narrow that no name can mean a place.

A name is one component, or components joined by `/`. It is never decoded: `%2f` is refused, not
read as a slash.
"""

import unicodedata
from collections.abc import Iterable

from flplatform.core.errors import InvalidArgumentError

MAX_NAME_BYTES = 255
MAX_COMPONENTS = 32
_FORBIDDEN = frozenset('/\\%:*?"<>|')
"""What separates, decodes, or names something special on one system or another."""


def check_component(name: str, field: str = "name") -> str:
    """Return `name` if it can name one file below any folder.

    Raises:
        InvalidArgumentError: it is empty, longer than 255 bytes, not printable or not NFC, it
            begins with `.` or `-`, ends with a dot or a blank, or has a forbidden character.
    """
    if problem := _problem(name):
        raise InvalidArgumentError(f"{name[:80]!r} {problem}", field=field)
    return name


def check_path(path: str, field: str = "name") -> tuple[str, ...]:
    """Return the components of a relative path, each as `check_component` wants it.

    Raises:
        InvalidArgumentError: a component is refused, or the path is longer than 255 bytes.
    """
    if len(path) > MAX_NAME_BYTES or path.count("/") >= MAX_COMPONENTS:
        raise InvalidArgumentError(
            f"is longer than {MAX_NAME_BYTES} bytes or {MAX_COMPONENTS} components", field=field
        )
    parts = tuple(check_component(part, field) for part in path.split("/"))
    if len(path.encode()) > MAX_NAME_BYTES:
        raise InvalidArgumentError(f"is longer than {MAX_NAME_BYTES} bytes", field=field)
    return parts


def collision(path: str, others: Iterable[str]) -> str | None:
    """Return the one of `others` that cannot lie beside `path`, None if all can.

    Two paths collide if they differ by case alone, or if one would have to be a folder where the
    other is a file. The same path is no collision.
    """
    mine = _folded(path)
    for other in others:
        theirs = _folded(other)
        shared = min(len(mine), len(theirs))
        if other != path and mine[:shared] == theirs[:shared]:
            return other
        if _differ_by_case(path, other):
            return other
    return None


def _problem(name: str) -> str:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not Unicode"
    if not name:
        return "has an empty part"
    if size > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if name[0] in ".-":
        return f"begins with {name[0]!r}"
    if name[-1] in ". " or name[0] == " ":
        return "begins or ends with a blank, or ends with a dot"
    if found := sorted(_FORBIDDEN.intersection(name)):
        return f"has {found[0]!r} in it"
    if not name.isprintable():
        return "has a character that does not print"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in the composed form (NFC) of Unicode"
    return ""


def _folded(path: str) -> list[str]:
    return [unicodedata.normalize("NFC", part.casefold()) for part in path.split("/")]


def _differ_by_case(path: str, other: str) -> bool:
    """Return whether the two go through folders that differ by case alone."""
    for mine, theirs in zip(path.split("/"), other.split("/"), strict=False):
        if mine != theirs:
            return _folded(mine) == _folded(theirs)
    return False
