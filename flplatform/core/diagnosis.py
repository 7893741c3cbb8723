"""Why something waits, or how it ended: values, and the Protocol behind the console's `why`."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened; `time` is UTC, ISO 8601, empty for what holds all the time."""

    time: str
    text: str


@dataclass(frozen=True, slots=True)
class Coming:
    """One thing that will happen by itself, unless something else happens first.

    Attributes:
        time: UTC, ISO 8601.
        in_s: seconds from now.
        text: what will happen then.
    """

    time: str
    in_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Somebody who is waited for.

    Attributes:
        site: who; `server` for the server itself.
        cause: one of `SITE_CAUSES`.
        text: the same in words, with what it last reported.
        since_s: how long it has been so; None if nobody knows.
    """

    site: str
    cause: str
    text: str
    since_s: float | None = None

    @property
    def clause(self) -> str:
        """The text as it follows `waits for`, with the site as its first word, once."""
        rest = self.text.removeprefix(self.site)
        if self.text.startswith(f"{self.site} "):
            return f"{self.site}: it{rest}"
        return self.text if self.text.startswith(f"{self.site}:") else f"{self.site}: {self.text}"


SITE_CAUSES = (
    "disabled", "never_registered", "certificate", "away", "expected", "silent", "run_lost",
    "crashing", "disk_full", "blob_lost", "retrying", "refused", "no_answer", "not_taken", "slow",
    "working",
)  # fmt: skip
"""Why a site is waited for; `no_answer`: the signed start was not answered yet; `run_lost`: it
does not have the run, and fails each task of it."""

CAUSES = (
    "deploying", "quorum_lost", "training", "wait_after_min", "aggregating", "disk_full",
    "blob_lost", "validating", "finished", "aborted", "deadline", "declined", "task_failed",
    "aggregation_failed", "round_open", "round_closed", "idle", "working",
)  # fmt: skip
"""Why a run is where it is; a site has one of `SITE_CAUSES`, `idle` or `working`."""


def run_lost(run: int) -> str:
    """Return how a task's error begins that comes from a site which does not have the run."""
    return f"this site does not have run {run}"


def rejoin(site: str, run: int) -> tuple[str, str]:
    """Return the commands, in order, after which a site has a run anew."""
    return f"abort client {site} --run {run}", f"start client {site} --run {run}"


@dataclass(frozen=True, slots=True)
class Part:
    """What one target of the run had to do with a round.

    Attributes:
        outcome: `accepted`, `failed`, `straggler`, `open`, or `not in`.
        took_s: from the round's opening to the answer; None without one.
        why: the reason, where it is not in.
    """

    site: str
    outcome: str
    took_s: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The answer to one `why`.

    Attributes:
        headline: the answer in one sentence.
        cause: one of `CAUSES`, of a site also of `SITE_CAUSES`.
        run: the run that it is about, None for none.
        waits_for: who is waited for, the most troubled first.
        lines: what led to it, oldest first.
        next: what comes by itself, soonest first.
        can: commands that are legal now and would help.
        parts: of a round: what each target had to do with it.
        ask: sites that can say more themselves.
    """

    headline: str
    cause: str
    run: int | None = None
    waits_for: tuple[Waiting, ...] = ()
    lines: tuple[Line, ...] = ()
    next: tuple[Coming, ...] = ()
    can: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    ask: tuple[str, ...] = ()


class DiagnosisControl(Protocol):
    """Explains what the server knows; sites may know more."""

    def run(self, number: int) -> Diagnosis:
        """Say what a run waits for, or how it ended.

        Raises:
            NotFoundError: no such run.
            UnavailableError: its log cannot be read, and why.
        """

    def round(self, number: int, round_number: int) -> Diagnosis:
        """Say who was in a round and why it is open or closed.

        Raises:
            NotFoundError: no such run or round.
        """

    def site(self, name: str) -> Diagnosis:
        """Say where a site is and what it does.

        Raises:
            InvalidArgumentError: that is no name of a site.
        """
