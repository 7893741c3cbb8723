"""In-memory stores for the tests of what stands on them; they pass the contract suites too."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from flplatform.core.errors import (
    AlreadyExistsError,
    FLError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.ports import Row


class MemoryStateStore:
    """`ports.StateStore` in a dict; appends are settled when `append` returns.

    Attributes:
        full: set it, and appends are refused for want of space.
        failure: set it, and the next append fails for good with it.
    """

    def __init__(self, on_fatal: Callable[[BaseException], None] = lambda _: None) -> None:
        self.trouble = ""
        self._on_fatal = on_fatal
        self._streams: dict[str, list[Row]] = {}
        self._unusable = ""
        self.full = False
        self.failure: BaseException | None = None

    def append(self, rows: Sequence[Row]) -> "Future[None]":
        """Append rows of any streams, or none of them; see `ports.StateStore`."""
        future: Future[None] = Future()
        refusal = self._refusal(rows)
        if refusal is not None:
            future.set_exception(refusal)
            return future
        for row in rows:
            self._streams.setdefault(row.stream, []).append(row)
        future.set_result(None)
        return future

    def read(self, stream: str, after: int = 0) -> list[Row]:
        """Return the rows of a stream with seq > `after`, in order."""
        self._check_usable()
        return [row for row in self._streams.get(stream, []) if row.seq > after]

    def streams(self, prefix: str = "") -> list[str]:
        """Return the names of all streams that start with `prefix`, sorted."""
        self._check_usable()
        return sorted(name for name in self._streams if name.startswith(prefix))

    def extents(self) -> dict[str, tuple[int, int]]:
        """Return the number of rows and the highest seq of each stream."""
        self._check_usable()
        return {name: (len(rows), rows[-1].seq) for name, rows in self._streams.items()}

    def lose(self, stream: str, *seqs: int) -> None:
        """Lose events of a stream, as a damage does; all of them if none is named."""
        self._streams[stream] = [
            row for row in self._streams[stream] if seqs and row.seq not in seqs
        ]
        if not self._streams[stream]:
            del self._streams[stream]

    def close(self) -> None:
        """Refuse everything from now on."""
        self._unusable = self._unusable or "the state store is closed"

    def _head(self, stream: str) -> int:
        return self._streams[stream][-1].seq if stream in self._streams else 0

    def _check_usable(self) -> None:
        if self._unusable:
            raise UnavailableError(self._unusable)

    def _refusal(self, rows: Sequence[Row]) -> FLError | None:
        if self.failure is not None and not self._unusable:
            self._unusable = f"the state store has failed: {self.failure}"
            self._on_fatal(self.failure)
        if self._unusable:
            return UnavailableError(self._unusable)
        heads = {row.stream: self._head(row.stream) for row in rows}
        for row in rows:
            if row.seq != heads[row.stream] + 1:
                return AlreadyExistsError(f"event {row.seq} of {row.stream} does not follow")
            heads[row.stream] = row.seq
        return ResourceExhaustedError("no space left", rule="disk") if self.full else None
