"""What goes wrong in a run at its site: the last error lines, and what it is held up by now."""

from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

from flplatform.client.retrying import RETRIED, is_of_space
from flplatform.core.errors import FLError
from flplatform.files.shortage import explaining_shortage

MAX_LINES = 5
MAX_CHARS = 300

T = TypeVar("T")


class Troubles:
    """The last errors of one run; more than `MAX_LINES` push the oldest out.

    Attributes:
        held_up: a few words for the reported phase, empty while all is well.
        short_of_space: whether the last step failed for want of space on a disk.
    """

    def __init__(self) -> None:
        self._lines: deque[tuple[str, str]] = deque(maxlen=MAX_LINES)
        self.held_up = ""
        self.short_of_space = False

    def note(self, text: str) -> None:
        """Keep an error; the same again, as of a step that is tried again, takes its place."""
        text = " ".join(text.split())[:MAX_CHARS]
        if self._lines and self._lines[-1][1] == text:
            self._lines.pop()
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._lines.append((now, text))

    @property
    def lines(self) -> list[dict[str, str]]:
        """The errors, oldest first: `time` (UTC) and `text`."""
        return [{"time": time, "text": text} for time, text in self._lines]

    async def watch(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step that may be tried again and again; how it fails is noted.

        Raises:
            FLError: as `step` does, or this machine is short of something.
        """
        try:
            with explaining_shortage():
                result = await step()
        except FLError as error:
            self.held_up = f"retries: {error.code}" if isinstance(error, RETRIED) else ""
            self.short_of_space = is_of_space(error)
            self.note(str(error))
            raise
        self.clear()
        return result

    def clear(self) -> None:
        """Note that nothing holds the run up any more."""
        self.held_up = ""
        self.short_of_space = False
