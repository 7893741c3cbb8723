"""What a machine has and which releases it runs: asked by `report_resources` and `report_version`.

GPUs are those that `nvidia-smi` lists; without it there are none.
"""

import csv
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from flplatform import __version__

SMI_TIMEOUT_S = 5.0
MAX_GPUS = 64
PACKAGES = ("grpcio", "protobuf", "numpy")

_FIELDS = ("index", "name", "memory.total", "memory.used", "utilization.gpu")


def gpus() -> list[dict[str, Any]]:
    """Return this machine's GPUs; memory in bytes. Blocks until the driver has answered."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):  # a tool without a driver has no GPUs
        return []
    return read_gpus(done.stdout)


def read_gpus(text: str) -> list[dict[str, Any]]:
    """Read the lines of `nvidia-smi`; one that is not understood is left out."""
    found = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) != len(_FIELDS) or not row[0].isdecimal():
            continue
        index, name, total, used, busy = row
        found.append(
            {
                "index": int(index),
                "name": name[:60],
                "memory_bytes": _mebibytes(total),
                "memory_used_bytes": _mebibytes(used),
                "busy_percent": int(busy) if busy.isdecimal() else None,
            }
        )
    return found[:MAX_GPUS]


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdecimal() else None


def resources(folder: Path) -> Mapping[str, Any]:
    """Return what this machine has; sizes in bytes. Blocks, see `gpus`.

    Args:
        folder: whose disk is meant.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    return {
        "cpus": os.cpu_count() or 0,
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "gpus": gpus(),
    }


def versions() -> Mapping[str, str]:
    """Return the releases of this program, of Python, of the system and of what it stands on."""
    found = {"flplatform": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.removesuffix("io")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package.removesuffix("io")] = "missing"
    return {**found, "os": f"{platform.system()} {platform.release()} {platform.machine()}"}
