"""Loops that a process cannot do without: if one ends by itself, the process starts anew."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

log = logging.getLogger(__name__)


def supervise(
    loops: Mapping[str, Coroutine[Any, Any, None]], end: Callable[[bool], None]
) -> list[asyncio.Task[None]]:
    """Start loops that never end; a process without one of them would only seem to live.

    Args:
        loops: by name.
        end: called with whether to restart, which is True, when a loop has ended.

    Returns:
        Their tasks, to be cancelled by the caller.
    """

    def ended(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        log.critical(
            "loop %r has ended, the process starts anew: %s", task.get_name(), error, exc_info=error
        )
        end(True)

    tasks = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
    for task in tasks:
        task.add_done_callback(ended)
    return tasks
