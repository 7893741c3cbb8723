"""The site process's own errors and numbers, for who may see or reset them."""

import time
from collections.abc import Callable

from flplatform.client.verbs import Asked, Body, SiteVerb
from flplatform.files.counters import Counters
from flplatform.files.error_log import ErrorLog


def stats_verbs(
    counters: Counters, runs_active: Callable[[], int], registrations: Callable[[], int]
) -> list[SiteVerb]:
    """Return `show_errors`, `reset_errors` and `show_stats`.

    Args:
        counters: of this process.
        runs_active: how many runs are in hand.
        registrations: how often this process has registered.
    """
    started = time.monotonic()

    async def show_errors(_: Asked) -> Body:
        return ErrorLog.installed().view()

    async def reset_errors(_: Asked) -> Body:
        return {"reset": ErrorLog.installed().reset()}

    async def show_stats(_: Asked) -> Body:
        return {
            "uptime_s": time.monotonic() - started,
            "runs_active": runs_active(),
            "tasks_done": counters.sum("tasks_done"),
            "tasks_failed": counters.sum("tasks_failed"),
            "received_bytes": counters.sum("received_bytes"),
            "sent_bytes": counters.sum("sent_bytes"),
            "reconnects": max(0, registrations() - 1),
            "loop_lag": counters.durations("loop_lag").get("", {}),
        }

    return [
        SiteVerb("show_errors", "view", show_errors),
        SiteVerb("reset_errors", "operate", reset_errors, mutating=True),
        SiteVerb("show_stats", "view", show_stats),
    ]
