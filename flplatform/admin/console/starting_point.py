"""Where a job's round 1 starts: a file, a function of the job's code, or a run's model."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flplatform.core.errors import ConfigError, InvalidArgumentError
from flplatform.core.job import CODE_FOLDER, JobSpec
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import check_finite, mapped, read_layout, save

PROGRAM = "flplatform.admin.console.initial_model"
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH")
"""What of the console's environment the job's code gets."""

SHOWN_LINES = 15
"""Lines of a failed program's output that are shown."""


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """An initial model.

    Attributes:
        blob: digest and size.
        path: the file to upload; None if the server has the model.
        manifest: its tensors; None likewise.
    """

    blob: ModelRef
    path: Path | None = None
    manifest: Manifest | None = None


async def from_function(folder: Path, job: JobSpec, target: Path) -> StartingPoint:
    """Have the job's code build its model, in a process of its own, with this interpreter.

    Raises:
        InvalidArgumentError: it failed; the message ends with what it printed last.
    """
    request = {
        "code": str((folder / CODE_FOLDER).resolve()),
        "function": job.initial_model.function,
        "args": job.args,
        "seed": job.seed,
        "target": str(target),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", PROGRAM),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=target.parent,
        env=_environment(os.environ),
    )
    try:
        printed, _ = await process.communicate(json.dumps(request).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode or not target.exists():
        last = _own_frames(printed.decode(errors="replace").rstrip().splitlines())[-SHOWN_LINES:]
        raise InvalidArgumentError(
            "\n  ".join([f"{job.initial_model.function} made no model:", *last]),
            field="initial_model.function",
        )
    return await asyncio.to_thread(_described, target)


_NOT_THE_JOB_S = ('"<frozen ', '/importlib/__init__.py"', '/console/initial_model.py"')


def _own_frames(lines: list[str]) -> list[str]:
    """Leave out of a traceback what is not of the job: how its code was imported and called."""
    kept: list[str] = []
    hidden = False
    for line in lines:
        if line.startswith("  File "):
            hidden = any(part in line for part in _NOT_THE_JOB_S)
        elif not line.startswith("    "):
            hidden = False
        if not hidden:
            kept.append(line)
    return kept


async def from_file(folder: Path, job: JobSpec, target: Path) -> StartingPoint:
    """Rewrite a safetensors file in canonical form.

    Raises:
        ConfigError: there is no such file.
        ModelFormatError: it is not a model.
    """
    return await asyncio.to_thread(_rewrite, folder / job.initial_model.file, target)


def _rewrite(source: Path, target: Path) -> StartingPoint:
    if not source.is_file():
        raise ConfigError(f"initial_model.file: there is no {source}")
    with mapped(source) as arrays:
        check_finite(arrays, "initial model")
        save(target, arrays)
    return _described(target)


def _described(path: Path) -> StartingPoint:
    digest, size = digest_of_file(path)
    return StartingPoint(ModelRef(digest, size), path, read_layout(path).manifest)


def _environment(of: Mapping[str, str]) -> dict[str, str]:
    return {name: of[name] for name in KEPT if name in of}
