"""What a process knows of itself: its logged errors and its numbers. Values and the port."""

from collections.abc import Mapping
from typing import Any, Protocol


class StatsControl(Protocol):
    """The server process's own errors and numbers."""

    def errors(self) -> Mapping[str, Any]:
        """Return the warnings and errors logged: `since`, `counts`, `last`."""

    def reset_errors(self) -> int:
        """Forget them; return how many there were."""

    def stats(self) -> Mapping[str, Any]:
        """Return numbers since the start of the process, JSON-able."""
