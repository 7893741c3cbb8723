"""Files of runs, in memory."""

from dataclasses import dataclass, field

from flplatform.core.errors import NotFoundError
from flplatform.core.files_view import RunFile
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of


def made(name: str, text: str) -> RunFile:
    """A file made from a run's log."""
    content = text.encode()
    return RunFile(name, ModelRef(digest_of(content), len(content)), content)


@dataclass
class FakeFiles:
    """Implements `core.files_view.FilesControl`."""

    runs: dict[int, list[RunFile]] = field(default_factory=dict)

    async def of_run(self, number: int) -> list[RunFile]:
        if number not in self.runs:
            raise NotFoundError(f"there is no run {number}")
        return self.runs[number]
