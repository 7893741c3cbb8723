"""`round_times`: how long each round of a run takes, told while the run goes on."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from flplatform.admin.fed_admin_server import Parts
from flplatform.admin.targets import RunArguments, current_run
from flplatform.core.errors import FailedPreconditionError
from flplatform.hci import CommandSpec, Connection


class RoundTimer:
    """A command module with one command.

    Args:
        parts: what the server offers to modules; this one needs only `control`.
        clock: monotonic seconds.
    """

    name = "timing"
    summary = "how long things take"

    def __init__(self, parts: Parts, clock: Callable[[], float] = time.monotonic) -> None:
        self._control = parts.control
        self._clock = clock

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="round_times",
                summary="tells how long each round of a run takes, until its last round is over",
                arguments=RunArguments,
                handler=self._round_times,
                permission="view",
                mutating=False,
                examples=("round_times 3", "round_times"),
                states="while a run is deploying or training",
            )
        ]

    async def _round_times(self, connection: Connection, args: RunArguments) -> None:
        run = self._control.run(current_run(self._control, args.run))
        if run.status not in ("deploying", "training"):
            raise FailedPreconditionError(
                f"run {run.run} is {run.status}; "
                "round_times is legal while a run is deploying or training",
                rule="run ended" if run.ended else "run state",
            )
        # A round that is open already is timed from now on, and its row says so.
        partial, since, seen = run.round, self._clock(), 0
        await connection.text(f"timing run {run.run} ({run.name}) from round {run.round or 1} on")
        seconds: dict[str, float] = {}
        while run.status in ("deploying", "training"):
            before = run
            seen = await self._control.wait_changed(run.run, seen)
            run = self._control.run(run.run)
            if (run.round, run.status) == (before.round, before.status):
                continue
            now = self._clock()
            if before.round:
                seconds[str(before.round)] = round(now - since, 3)
                cells = {"seconds": round(now - since, 1), "whole": before.round != partial}
                await connection.row(f"round {before.round}", cells)
            since = now
        await connection.data("seconds", seconds)
