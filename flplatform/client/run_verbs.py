"""`delete_run_number`: removes what is left of an ended run at this site."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from flplatform.client.box import remove
from flplatform.client.verbs import Asked, Body, SiteVerb, Submitter, everyone
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.files.threads import in_thread
from flplatform.security.identity import Identity

DELETE = "delete_run_number"

ENDING_S = 1.0
"""How long a run that is about to end here is waited for."""

LOOK_S = 0.02


class Runs(Protocol):
    """The runs of this site; see `client.site_runs.SiteRuns`."""

    def numbers(self) -> list[int]:
        """Return the runs in hand."""

    def submitter(self, run: int) -> Submitter:
        """Return who submitted a run, as far as it is known; else empty."""


def delete_verb(runs: Runs, logs: Path, folders: Path) -> SiteVerb:
    """Return the verb.

    Args:
        runs: the runs of this site.
        logs: where the runs' logs are.
        folders: where the runs' folders are.
    """

    async def act(asked: Asked) -> Body:
        run = _number(asked.order.argv)
        try:
            async with asyncio.timeout(ENDING_S):
                while run in runs.numbers():
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise FailedPreconditionError(
                f"run {run} is still at work here: its log stays", rule="run_ended"
            ) from None
        return await in_thread(_remove, run, logs, folders)

    def submitter(_signer: Identity, argv: Sequence[str]) -> Submitter:
        return runs.submitter(_number(argv))

    return SiteVerb(DELETE, "train", act, mutating=True, reaches=everyone, submitter=submitter)


def _remove(run: int, logs: Path, folders: Path) -> Body:
    """Remove a run's logs, and its folder if it could not be brought back after a restart."""
    files = [path for path in (logs / f"run-{run}.log", logs / f"run-{run}.log.1") if path.exists()]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the next start of the site looks at it again
        remove(folders / f"run-{run}")
    return {"files": len(files), "bytes": size}


def _number(argv: Sequence[str]) -> int:
    words = [word for word in argv[1:] if not word.startswith("-")]
    if len(words) != 1 or not words[0].isascii() or not words[0].isdecimal():
        raise InvalidArgumentError(f"{' '.join(argv)[:80]!r} names no run", field=DELETE)
    return int(words[0])
