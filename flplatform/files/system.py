"""What a machine has left: processor, memory, disk; asked by `sys_info` on server and sites."""

import logging
import os
import platform
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from flplatform import __version__

log = logging.getLogger(__name__)

MAX_FILES = 1 << 20
"""Open files that any server has use for."""

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


def raise_file_limit() -> int:
    """Let this process open as many files and connections as it may; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of open files stays at %d: %s", soft, error)
        return soft
    return wanted


def warn_of_few_files(max_clients: int) -> None:
    """Log an error if so many sites, each with two connections, need more open files than allowed.

    Args:
        max_clients: sites that may be registered at the same time.
    """
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = max_clients * 2 + 100
    if 0 <= allowed < needed:  # the largest value means no limit, and is negative
        log.error(
            "this process may open %d files, %d sites need %d: connections will be refused; raise "
            "the hard limit (ulimit -Hn, LimitNOFILE=) or lower max_clients in project.yml",
            allowed,
            max_clients,
            needed,
        )
