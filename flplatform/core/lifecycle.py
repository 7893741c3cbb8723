"""The lives of runs and sites after their start: withdrawals, given-up tasks, bars, deletion."""

from collections.abc import Sequence
from typing import Protocol

from flplatform.core.control import RunView
from flplatform.core.errors import FailedPreconditionError

ACTIVE = ("deploying", "training", "validating")
"""The states of a run that has begun and not ended."""

WHILE_ACTIVE = "while a run is deploying, training or validating"

ONCE_ENDED = "once a run has finished, failed or been aborted, or before it is started"


DELETED = "deleted"
"""Status of a run that is no more: its number and its events are left of it."""


class LifecycleControl(Protocol):
    """What operators do to runs at work, to sites, and to runs that are over."""

    async def withdraw(self, number: int, sites: Sequence[str], by: str) -> None:
        """End a run at some of its sites; at all that take part, end it.

        Raises:
            FLError: no such run, it has ended, or a site has no part in it.
        """

    async def abort_task(self, number: int, site: str, by: str) -> tuple[str, ...]:
        """Give up a site's open tasks and return their ids; the site stays in the run.

        Raises:
            FLError: no such run, it has ended, or the site has no open task in it.
        """

    async def set_enabled(self, site: str, enabled: bool, by: str) -> bool:
        """Let a site take part, or bar it; return whether that changed anything.

        Raises:
            NotFoundError: no such site has ever registered.
            ResourceExhaustedError: nothing can be stored.
        """

    async def delete(self, number: int, by: str) -> None:
        """Delete a run that is over or has not begun; its blobs are freed unless others need them.

        Raises:
            FLError: no such run, or it is at work.
        """

    def deleted(self) -> list[RunView]:
        """Return the deleted runs, oldest first; the reason tells by whom and when."""


def demand_active(run: RunView, command: str) -> None:
    """Explain why a command is not legal for a run that is not at work.

    Raises:
        FailedPreconditionError: it is not.
    """
    if run.status not in ACTIVE:
        raise FailedPreconditionError(
            f"run {run.run} {_state(run)}; {command} is legal {WHILE_ACTIVE}",
            rule="run_active",
        )


def demand_over(run: RunView, command: str) -> None:
    """Explain why a command is not legal for a run at work.

    Raises:
        FailedPreconditionError: it is not.
    """
    if run.status in ACTIVE:
        raise FailedPreconditionError(
            f"run {run.run} {_state(run)}; {command} is legal {ONCE_ENDED}",
            rule="run_ended",
            hint=f"abort all --run {run.run}",
        )


def _state(run: RunView) -> str:
    """Say how a run is: `is training`, `has finished`, `was aborted: wrong data`."""
    verb = "has" if run.status in ("finished", "failed") else "was" if run.ended else "is"
    if run.reason.startswith(f"{run.status} "):  # aborted by …
        return f"{verb} {run.reason}"
    reason = f": {run.reason}" if run.reason and run.status != "finished" else ""
    return f"{verb} {run.status}{reason}"
