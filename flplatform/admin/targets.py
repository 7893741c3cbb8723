"""Whom a command is for: `server | client [SITE…] | all`, and which run it concerns."""

from collections.abc import Collection
from dataclasses import dataclass

from flplatform.admin.orders import ordered
from flplatform.core.control import RunsControl
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.core.staging import PREPARED
from flplatform.hci import argument, did_you_mean

GRAMMAR = "server, client [SITE…] or all"


@dataclass(frozen=True)
class TargetArguments:
    """Of commands for hosts."""

    targets: tuple[str, ...] = argument(
        help=GRAMMAR, complete="target", metavar="TARGET", rest=True
    )

    def __post_init__(self) -> None:
        first, *sites = self.targets
        if first not in ("server", "client", "all"):
            hint = did_you_mean(first, ("server", "client", "all"))
            hint = hint or (f"did you mean client {first}?" if not sites else "")
            hint = f"; {hint}" if hint else ""
            raise ValueError(f"TARGET is {GRAMMAR}, not {first!r}{hint}")
        if sites and first != "client":
            raise ValueError(f"nothing can follow {first}, but {sites[0]!r} does")


@dataclass(frozen=True)
class SiteArguments:
    """Of commands for named sites."""

    sites: tuple[str, ...] = argument(help="the sites", complete="site", metavar="SITE", rest=True)

    @property
    def targets(self) -> tuple[str, ...]:
        """The same in the grammar of targets."""
        return ("client", *self.sites)


@dataclass(frozen=True)
class RunArguments:
    """Of commands for one run, by default the current one."""

    run: int | None = argument(help="the run's number", complete="run", minimum=1, default=None)


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets resolved against the sites that exist.

    Attributes:
        server: whether the server is one.
        sites: those that exist, in the order given; all of them in name order.
        unknown: those that do not.
    """

    server: bool
    sites: tuple[str, ...]
    unknown: tuple[str, ...] = ()


def resolve(words: tuple[str, ...], known: Collection[str]) -> Targets:
    """Find the hosts that the words of a command mean.

    Args:
        words: as `TargetArguments.targets`.
        known: the sites that exist.
    """
    first, *named = words
    if first == "server":
        return Targets(True, ())
    if not named:
        return Targets(first == "all", tuple(sorted(known)))
    sites = dict.fromkeys(named)
    return Targets(
        False,
        tuple(site for site in sites if site in known),
        tuple(site for site in sites if site not in known),
    )


def current_run(control: RunsControl, given: int | None, *, ended: bool = False) -> int:
    """Return the run that a command means: the one named, the session's, or the only active one.

    Args:
        control: knows the runs.
        given: the run that the command names, if it does.
        ended: whether a run that has ended will do: then the latest one is taken at last.

    Raises:
        InvalidArgumentError: there is more than one; the message lists them.
        FailedPreconditionError: there is none.
    """
    if given:
        return given
    command = ordered()
    command.meant_run = command.meant_run or command.order.run or only_active(control)
    if command.meant_run:
        return command.meant_run
    if active := control.active_runs():
        raise InvalidArgumentError(
            f"several runs are active: {', '.join(map(str, active))}",
            hint="name one, or set_run_number N",
        )
    begun = [run.run for run in control.runs() if run.status != PREPARED] if ended else []
    if begun:
        command.meant_run = begun[-1]
        return command.meant_run
    raise FailedPreconditionError(
        "no run is active", hint="name one, or set_run_number N first; list_runs shows them all"
    )


def only_active(control: RunsControl) -> int | None:
    """Return the number of the active run if there is exactly one."""
    active = control.active_runs()
    return active[0] if len(active) == 1 else None
