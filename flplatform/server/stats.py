"""The server process's own errors and numbers."""

import time
from collections.abc import Mapping
from typing import Any

from flplatform.files.counters import Counters
from flplatform.files.error_log import ErrorLog
from flplatform.server.relay import RequestRelay
from flplatform.server.runs import Runs


class ServerStats:
    """Implements `core.stats.StatsControl`.

    Args:
        counters: of this process, filled by interceptors, streams and runs.
        runs: how many are active.
        relay: how many requests are under way.
    """

    def __init__(self, counters: Counters, runs: Runs, relay: RequestRelay) -> None:
        self._counters = counters
        self._runs = runs
        self._relay = relay
        self._started = time.monotonic()

    def errors(self) -> Mapping[str, Any]:
        """Return the warnings and errors logged: `since`, `counts`, `last`."""
        return ErrorLog.installed().view()

    def reset_errors(self) -> int:
        """Forget them; return how many there were."""
        return ErrorLog.installed().reset()

    def stats(self) -> Mapping[str, Any]:
        """Return numbers since the start of the process, JSON-able."""
        counters = self._counters
        return {
            "uptime_s": time.monotonic() - self._started,
            "rpcs": counters.durations("rpc"),
            "received_bytes": counters.sums("received_bytes"),
            "sent_bytes": counters.sums("sent_bytes"),
            "appends": counters.sum("appends"),
            "loop_lag": counters.durations("loop_lag").get("", {}),
            "runs_active": len(self._runs.active()),
            "requests": self._relay.posted,
            "requests_outstanding": self._relay.outstanding,
        }
