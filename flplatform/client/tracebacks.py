"""Errors of a job's code, as its author needs them: without the platform's own frames."""

import importlib
import traceback
from pathlib import Path

from flplatform.client.frames import MAX_ERROR_CHARS, MAX_TRACEBACK_BYTES
from flplatform.core.errors import FLError

_PACKAGE = Path(__file__).parents[1]
_PLATFORM = (f"{_PACKAGE}/", "<frozen ", str(importlib.__file__))
_ADAPTERS = f"{_PACKAGE / 'frameworks'}/"


def one_line(error: BaseException) -> str:
    """Return what went wrong, on one line of bounded length."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - it is the user's own __str__
        text = "(its text cannot be shown)"
    if not isinstance(error, FLError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return " ".join(text.split())[:MAX_ERROR_CHARS]


def user_traceback(error: BaseException, code: str) -> str:
    """Return the traceback without the platform's frames; empty if no frame is left.

    Args:
        error: what was raised, with its causes.
        code: the job's code folder; files in it are shown relative to it.

    Returns:
        At most `MAX_TRACEBACK_BYTES`: the end, which names the error.
    """
    trace = traceback.TracebackException.from_exception(error)
    pending, kept = [trace], 0
    while pending:
        part = pending.pop()
        part.stack[:] = [frame for frame in part.stack if _of_user(frame.filename)]
        kept += len(part.stack)
        for frame in part.stack:
            _ = frame.line  # read from the file while it goes by its own name
            frame.filename = frame.filename.removeprefix(f"{code}/")
        pending += [link for link in (part.__cause__, part.__context__) if link is not None]
        pending += part.exceptions or []
    if not kept:
        return ""
    text = "".join(trace.format()).encode(errors="replace")
    return text[-MAX_TRACEBACK_BYTES:].decode(errors="ignore")


def _of_user(filename: str) -> bool:
    return filename.startswith(_ADAPTERS) or not filename.startswith(_PLATFORM)
