"""Files of the user: replies that go into one, and what can be wrong with it."""

import os
from pathlib import Path
from typing import TextIO


def file_problem(error: OSError) -> str:
    """What is wrong with a file, as a sentence."""
    reason = (error.strerror or str(error)).lower()
    return f"{error.filename}: {reason}" if error.filename else reason


def private_file(path: Path, append: bool) -> TextIO:
    """Opens a file that only the user can read, for the reply of a command.

    Raises:
        OSError: it cannot be written.
    """
    mode = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    return os.fdopen(os.open(path, mode, 0o600), "w", encoding="utf-8")
