"""What sites ask of runs: their open tasks, and what becomes of a result."""

from collections.abc import Callable, Mapping

from flplatform.algorithms.workflows import RunState, classify, decide
from flplatform.core import events as ev
from flplatform.core.errors import FailedPreconditionError, PermissionDeniedError
from flplatform.core.messages import Task, TaskId
from flplatform.core.workflow import Input
from flplatform.server.client_manager import ClientManager
from flplatform.server.ledger import RunSummary
from flplatform.server.past_runs import PastRuns
from flplatform.server.run_actor import RunActor


class SiteTasks:
    """The open tasks of all runs at work. Lives on the event loop.

    Args:
        actors: the runs at work by number, kept up to date.
        past: knows the runs that have ended.
        clients: knows who is barred.
        summary: returns what a list shows of a run; raises NotFoundError.
    """

    def __init__(
        self,
        actors: Mapping[int, RunActor],
        past: PastRuns,
        clients: ClientManager,
        summary: Callable[[int], RunSummary],
    ) -> None:
        self._actors = actors
        self._past = past
        self._clients = clients
        self._summary = summary

    def of(self, site: str) -> list[Task]:
        """Return every open task of a site, in run order."""
        if site in self._clients.barred():
            return []
        return [
            task
            for _, actor in sorted(self._actors.items())
            for task in actor.tasks.get(site, {}).values()
        ]

    def find(self, task_id: TaskId) -> Task | None:
        """Return a task that is open at its site."""
        actor = self._actors.get(task_id.run)
        return actor.tasks.get(task_id.site, {}).get(str(task_id)) if actor else None

    async def tell(self, task_id: TaskId, given: Input) -> tuple[ev.Event, ...]:
        """Feed an input about a task to its run.

        A result whose acknowledgement was lost may come again after its run has ended: it is
        judged by the log.

        Raises:
            FLError: refused.
        """
        if task_id.run in self._actors:
            return await self._actors[task_id.run].tell(given)
        state = await self._state_of(task_id)
        if decide(state, given, self._clients.roster()):
            raise FailedPreconditionError(f"run {task_id.run} is not at work", rule="run_ended")
        return ()

    async def settled_by(self, task_id: TaskId, digest: str) -> bool:
        """Return whether exactly these bytes were accepted for the task already.

        Raises:
            FLError: the task is settled by another result, not open, or unknown.
        """
        state = await self._state_of(task_id)
        return not classify(state, task_id, frozenset({digest}))

    def demand_enabled(self, site: str) -> None:
        """Refuse a site that an admin has barred.

        Raises:
            PermissionDeniedError: it is.
        """
        if site in self._clients.disabled:
            raise PermissionDeniedError(
                f"{site} is disabled", rule="disabled", hint=f"enable_client {site}"
            )

    async def _state_of(self, task_id: TaskId) -> RunState:
        """Return the state of the run, at work or ended, that a site names in a task's id.

        Raises:
            FLError: as `Runs.view`, or the run has ended and the site was no target of it.
        """
        if task_id.run in self._actors:
            return self._actors[task_id.run].state
        return await self._past.state_for(task_id.site, self._summary(task_id.run))
