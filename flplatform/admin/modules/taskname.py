"""`taskname`: what this federation works on."""

from collections.abc import Sequence
from typing import Any

from flplatform.admin.ports import Control
from flplatform.admin.targets import current_run
from flplatform.core.errors import FailedPreconditionError
from flplatform.hci import CommandSpec, Connection, NoArguments


class TaskNameModule:
    """The name of the FL task.

    Args:
        control: knows project and runs.
    """

    name = "validation"
    summary = "models measured at other sites"

    def __init__(self, control: Control) -> None:
        self._control = control

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="taskname",
                summary="shows the project and the job of the current run",
                arguments=NoArguments,
                handler=self._taskname,
                permission="view",
                mutating=False,
                examples=("taskname",),
            )
        ]

    async def _taskname(self, connection: Connection, _: NoArguments) -> None:
        project = self._control.server().project
        try:
            number = current_run(self._control, None, ended=True)
        except FailedPreconditionError:
            if self._control.runs():
                raise  # several runs are active: one has to be named
            await connection.text(f"project {project}; no run yet")
            await connection.data("taskname", {"project": project, "job": None, "run": None})
            return
        run = self._control.run(number)
        await connection.text(f"project {project}, job {run.name} (run {run.run}, {run.status})")
        await connection.data("taskname", {"project": project, "job": run.name, "run": run.run})
