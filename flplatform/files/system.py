"""What a machine has left: processor, memory, disk; asked by `sys_info` on server and sites."""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from flplatform import __version__

_STARTED = time.monotonic()


def system_info(folder: Path) -> Mapping[str, Any]:
    """Return facts about this machine and process; sizes in bytes, times in seconds.

    Args:
        folder: whose disk is meant.
    """
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(folder))
    load = os.getloadavg()[0]
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - _STARTED, 1),
        "cpus": os.cpu_count() or 0,
        "load": round(load, 2),
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "process_memory_bytes": psutil.Process().memory_info().rss,
        "disk_total_bytes": disk.total,
        "disk_free_bytes": disk.free,
    }
