"""What operators can see and do: values, and the Protocols that admin modules stand on.

`server.control.ServerControl` implements them all; a gateway will stand on them, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flplatform.core.events import SourceModel
from flplatform.core.messages import ModelRef


@dataclass(frozen=True, slots=True)
class SiteView:
    """One site as the server sees it now; times in seconds, monotonic differences.

    Attributes:
        state: `live`, `expected` (presumed there after a server restart), `stopped` (it said so),
            `removed` (by an admin), `away` (lost, or not seen yet), or `disabled`.
        runs: for each run that the site reported: run, round, phase, seconds in it.
        last_seen_s: seconds since anything was heard; None if not since the server's start.
        certificate_days: days until its certificate expires; None while it is not there.
        contested: whether two processes seem to use its kit.
    """

    name: str
    organisation: str
    state: str
    runs: tuple[tuple[int, int, str, float], ...]
    last_seen_s: float | None
    certificate_days: float | None
    isolation: str = ""
    version: str = ""
    contested: bool = False


@dataclass(frozen=True, slots=True)
class ServerView:
    """The server itself.

    Attributes:
        trouble: why nothing can be decided now, or which events are lost; "" if all is well.
    """

    project: str
    name: str
    version: str
    state: str
    uptime_s: float
    max_clients: int
    registered: int
    certificate_days: float
    last_event: str
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class RunView:
    """One run.

    Attributes:
        status: prepared, deploying, training, validating, finished, failed or aborted.
        round, rounds: the last opened round and how many there will be.
        min_clients: quorum as it is now.
        waiting: sites whose answer the run waits for, in this phase.
        accepted: sites whose results are in, in this phase.
        answers: target → `ok`, why it declined or that it was withdrawn; `…` while it has not
            answered.
        timers: what ends the wait → seconds from now.
        next_model: digest of the latest published model.
        metric, mode: the watched metric, empty for none; whether its `max` or `min` is best.
        gpus: target → processes that it was told to start, where it was told a number.
        phase: `round` while one is open; `score`, `submit` or `validate` while a gathering is.
        results: results that the open round or gathering has accepted.
        tasks, settled: tasks of the latest gathering, and how many have a result or have failed.
        source_run: of a validation on demand, the run whose models it validates.
    """

    run: int
    name: str
    submitter: str
    submitted: str
    status: str
    reason: str
    ended: str
    round: int
    rounds: int
    min_clients: int = 0
    targets: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    answers: Mapping[str, str] = field(default_factory=dict)
    timers: Mapping[str, float] = field(default_factory=dict)
    model_digest: str = ""
    best_round: int | None = None
    submitter_organisation: str = ""
    metric: str = ""
    mode: str = "max"
    gpus: Mapping[str, int] = field(default_factory=dict)
    phase: str = ""
    results: int = 0
    tasks: int = 0
    settled: int = 0
    source_run: int = 0


@dataclass(frozen=True, slots=True)
class RoundMetrics:
    """What is known of one global model: its score and each site's reports.

    Attributes:
        round: the model's round; 0 is the initial model.
        score: the watched metric over all sites, weighted by examples; None if not scored.
        best: whether it is the best so far.
        sites: site → metrics of this model on the site's data.
        training: site → metrics that training this model reported.
        digest: the model.
        closed: why the round closed.
        stragglers: participants without an update.
    """

    round: int
    score: float | None
    best: bool
    sites: Mapping[str, Mapping[str, float]]
    training: Mapping[str, Mapping[str, float]]
    digest: str
    closed: str = ""
    stragglers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MatrixView:
    """The matrix of a run.

    Attributes:
        owners: model owners, sites in name order first, `global` last.
        sites: data sites in name order.
        cells: (owner, site) → metrics.
        gaps: (owner, site) → why there is no cell; owner `*` where a site has none at all, site
            `*` where there is no model.
        global_round: round of the best global model.
        complete: whether the step is done.
        metric, mode: as in RunView.
        models: owner → what its model is.
        source_run: of a validation on demand, the run whose models these are.
    """

    owners: tuple[str, ...]
    sites: tuple[str, ...]
    cells: Mapping[tuple[str, str], Mapping[str, float]]
    gaps: Mapping[tuple[str, str], str]
    global_round: int
    complete: bool
    metric: str
    mode: str
    models: Mapping[str, SourceModel] = field(default_factory=dict)
    source_run: int = 0


@dataclass(frozen=True, slots=True)
class SiteReply:
    """A site's answer to a relayed request; status `ok`, `error`, `refused` or `no_reply`."""

    status: str
    body: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    rule: str = ""


class RunsControl(Protocol):
    """Runs: see, submit, end."""

    def runs(self) -> list[RunView]:
        """Return all runs, oldest first."""

    def run(self, number: int) -> RunView:
        """Return one run.

        Raises:
            NotFoundError: no such run.
        """

    async def load(self, number: int) -> None:
        """Have an ended run's log at hand, so that who asks about it soon waits for no disk.

        Raises:
            FLError: no such run, or its log cannot be read.
        """

    def active_runs(self) -> list[int]:
        """Return the numbers of the runs that have not ended."""

    async def submit(self, order: bytes, submitter: str, min_clients: int | None) -> int:
        """Open a run for a signed start order whose package and model are uploaded.

        Raises:
            FLError: the order, the package or the job is refused, and why.
        """

    async def add_targets(self, number: int, order: bytes, submitter: str) -> None:
        """Have the sites of a signed start order join a run from its next round on.

        Raises:
            FLError: the order, the run or a site is refused, and why.
        """

    async def abort(self, number: int, by: str) -> None:
        """End a run.

        Raises:
            NotFoundError, FailedPreconditionError: no such run, or it has ended.
        """

    async def set_min_clients(self, number: int, min_clients: int, by: str) -> None:
        """Change a run's quorum; a round that can close now closes.

        Raises:
            FLError: no such run, it has ended, the number is out of bounds, or the run's
                aggregator cannot work with so few updates.
        """

    async def wait_ended(self, number: int) -> RunView:
        """Return the run once it has ended."""

    async def wait_changed(self, number: int, seen: int) -> int:
        """Return the number of events of a run once it exceeds `seen`, or the run has ended."""


class ModelsControl(Protocol):
    """What runs brought."""

    def metrics(self, number: int) -> list[RoundMetrics]:
        """Return what is known of each global model of a run, in round order.

        Raises:
            NotFoundError: no such run.
        """

    def cross_validation(self, number: int) -> MatrixView:
        """Return a run's matrix.

        Raises:
            NotFoundError: no such run.
        """

    def model(self, number: int, which: int | str) -> tuple[int, ModelRef]:
        """Return round and blob of a global model: a round, `best` or `last`.

        Raises:
            NotFoundError: no such run or round.
        """


class SitesControl(Protocol):
    """Sites: see, reach, remove."""

    def sites(self) -> list[SiteView]:
        """Return every site that has ever registered, in name order."""

    async def ask(
        self,
        sites: Sequence[str],
        topic: str,
        *,
        timeout_s: float,
        signed: bytes = b"",
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, SiteReply]:
        """Relay a request to sites; each of them is in the answer."""

    def remove(self, site: str) -> None:
        """Drop a site's registration, so that it can register again at once.

        Raises:
            NotFoundError: no such site is registered.
        """


class ServerControlPort(Protocol):
    """The server itself."""

    def server(self) -> ServerView:
        """Return the server as it is now."""

    def stop(self, *, restart: bool) -> None:
        """Drain and end the process; with `restart`, its supervisor starts it again."""

    def system(self) -> Mapping[str, Any]:
        """Return processor, memory and disk of the server's machine."""
