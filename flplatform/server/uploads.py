"""What sites upload for their open tasks, until a result binds it or the task is settled."""

import asyncio
from collections.abc import Mapping

from flplatform.core.messages import ModelRef, Task, TaskId
from flplatform.core.ports import BlobStore
from flplatform.server.background import Background
from flplatform.server.retention import Retention
from flplatform.server.run_actor import RunActor
from flplatform.server.wire import undo

DECODERS = 2
"""Updates whose codec is being undone at a time."""


class Uploads:
    """Checked uploads of the runs at work. Lives on the event loop.

    Args:
        blobs: where they are.
        retention: keeps them, and frees them when they are over.
        actors: the runs at work by number, kept up to date.
        background: carries work through.
    """

    def __init__(
        self,
        blobs: BlobStore,
        retention: Retention,
        actors: Mapping[int, RunActor],
        background: Background,
    ) -> None:
        self._blobs = blobs
        self._retention = retention
        self._actors = actors
        self._background = background
        self._decoding = asyncio.Semaphore(DECODERS)

    async def take(self, actor: RunActor, task: Task, wire: ModelRef) -> None:
        """Undo the codec of an upload, keep what it comes to, and free the bytes that came.

        Raises:
            FLError: as `undo`; nothing is kept.
        """
        await self._background.through(self._take(actor, task, wire))

    async def _take(self, actor: RunActor, task: Task, wire: ModelRef) -> None:
        try:
            with self._retention.hold(wire.digest):
                async with self._decoding:
                    model = await asyncio.to_thread(
                        undo, self._blobs, actor.state.job, actor.manifest, task, wire
                    )
                self.note(task.id, model.digest, wire.digest)
        finally:
            await self._retention.free({wire.digest})

    def note(self, task_id: TaskId, digest: str, came: str = "") -> None:
        """Keep a checked upload for its task; what it takes the place of is freed.

        Args:
            task_id: the task.
            digest: of the model.
            came: digest of the bytes that came, if a codec made them.
        """
        self._free(self._retention.uploaded(task_id, digest, came) | self._settle_closed(task_id))

    def broke_off(self, task_id: TaskId) -> None:
        """Keep what an upload that broke off has left for its task; if that is over, drop it."""
        self._retention.begin(task_id)
        self._free(self._settle_closed(task_id))

    def _settle_closed(self, task_id: TaskId) -> set[str]:
        """Settle what has come for a task that was settled meanwhile."""
        actor = self._actors.get(task_id.run)
        still_open = actor is not None and str(task_id) in actor.tasks.get(task_id.site, {})
        return set() if still_open else self.settle(task_id.run)

    def _free(self, over: set[str]) -> None:
        if over:
            self._background.later(self._retention.free(over))

    def has(self, task_id: TaskId, came: str) -> bool:
        """Return whether these bytes were uploaded, and checked, for this task."""
        return self._retention.has_upload(task_id, came)

    def model_of(self, task_id: TaskId, came: ModelRef) -> ModelRef | None:
        """Return the model that came as these bytes for a task, if it is here."""
        digest = self._retention.upload_of(task_id, came.digest)
        if not digest or digest == came.digest:
            return came if digest else None
        return ModelRef(digest, self._blobs.path(digest).stat().st_size)

    def settle(self, run: int) -> set[str]:
        """Forget the uploads for tasks of a run that are not open any more; return their blobs."""
        actor = self._actors.get(run)
        tasks = actor.tasks.values() if actor else ()
        return self._retention.settle(run, {key for mine in tasks for key in mine})

    def readable(self, site: str, digest: str) -> bool:
        """Return whether a site may download a blob: the package or a task's model of its run."""
        return any(
            digest == actor.state.opened.job_blob.digest
            or any(
                any(blob and blob.digest == digest for blob in (task.model, task.wire))
                for task in actor.tasks.get(site, {}).values()
            )
            for actor in self._actors.values()
            if site in actor.state.taking_part
        )
