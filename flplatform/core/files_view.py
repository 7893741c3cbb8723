"""What a run has to be downloaded, as values; `server.file_tree` implements it."""

from dataclasses import dataclass
from typing import Protocol

from flplatform.core.messages import ModelRef


@dataclass(frozen=True, slots=True)
class RunFile:
    """One file of a run's results.

    Attributes:
        name: below `runs/N/`; components joined by `/`.
        blob: where its bytes are, or what the digest of `content` is.
        content: the bytes themselves, of a file made from the run's log; None for a blob.
    """

    name: str
    blob: ModelRef
    content: bytes | None = None


class FilesControl(Protocol):
    """Files of runs."""

    async def of_run(self, number: int) -> list[RunFile]:
        """Return all files of a run, in name order.

        Raises:
            NotFoundError: no such run.
        """
