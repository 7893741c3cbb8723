"""Names for what a restore finds in its way: nothing is ever overwritten."""

import os
from pathlib import Path

from flplatform.server.upkeep.unfinished import Unfinished

BEFORE, HALF = "before", "unfinished"
"""What is moved aside: the former state, and what a restore that did not end had made."""
SQLITE_ENDS = ("-shm", "-wal")
"""Ends of the names of what belongs to a SQLite file: it is part of it."""


class Asides:
    """Moves aside what is in the way, under names that tell what it is.

    Args:
        mark: tells what there was before the first restore.
        now: ends the names of what restores that did not end had made.

    Attributes:
        half: where that is.
        mark: as given.
    """

    def __init__(self, mark: Unfinished, now: str) -> None:
        self.mark = mark
        self._now = now
        self.half: list[Path] = []

    def name(self, path: Path, kind: str) -> Path:
        """Return the name that something gets, or has got, when it is moved aside."""
        return path.with_name(
            f"{path.name}.{kind}-{self.mark.stamp if kind == BEFORE else self._now}"
        )

    def before(self, path: Path) -> Path | None:
        """Return where that lies which was there before the first restore; None if nothing was."""
        name = self.name(path, BEFORE)
        return name if name.exists() else None

    def move(self, path: Path, ends: tuple[str, ...] = (), *, was_there: bool) -> Path:
        """Rename what is there; return its new name.

        Args:
            path: what is in the way.
            ends: of the names of what belongs to it and keeps these ends; moved first, for `path`
                tells whose all of it is.
            was_there: whether there was such a thing before the first restore.
        """
        kind = BEFORE if was_there and self.before(path) is None else HALF
        new = self.name(path, kind)
        for end in (*ends, ""):
            if (each := Path(f"{path}{end}")).exists():
                os.rename(each, f"{new}{end}")
        if kind == HALF:
            self.half.append(new)
        return new
