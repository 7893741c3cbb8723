"""How far a job's code is kept from the rest of the site: the levels `sandbox` and `none`.

`sandbox`: a file system of its own, the host's but read-only, without the hidden folders (the
kit, the site's state), without `/run` and with a private `/tmp`; only loopback for a network; no
processes but the job's. The tool is bubblewrap, or else the kernel itself by `client.launcher`.

`none`: the user's own rights. Job code **can** read the site's key, reach the network and meddle
with other processes of the same user. Only its end is guaranteed.
"""

import functools
import glob
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from flplatform.core.config import Environment, Isolation
from flplatform.files.scratch import DRAWN, Scratch, open_scratch, sweep

log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")
SCRATCH_AT = Path("/tmp")  # noqa: S108 - the job's own /tmp
MAX_SCRATCH_PATH = 95
"""Bytes; the path of a unix socket in it may have 107."""
PROBE_TIMEOUT_S = 20.0
KEPT_VARIABLES = (
    *("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
)
_GPUS = ("/dev/nvidia*", "/dev/dri", "/dev/kfd")
Tool = Literal["bubblewrap", "namespaces", ""]


class Level(NamedTuple):
    """An isolation level, the tool that gives it, and why it is this one."""

    name: Isolation
    tool: Tool = ""
    reason: str = ""


NONE = Level("none")


@dataclass(frozen=True, slots=True)
class Mounts:
    """What a run process sees beside the read-only host.

    Attributes:
        scratch: host folder that is its `/tmp`, writable.
        read_only: files and folders that stay visible, also below what is hidden.
        writable: folders that it may write.
        hidden: folders that look empty.
    """

    scratch: Path
    read_only: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()


def command(level: Level, mounts: Mounts, argv: Sequence[str]) -> list[str]:
    """Return the command line that runs `argv` at this level as a child of this process.

    Within mounts it starts in `/tmp`; at the level `none` they do not count. At every level
    nothing that `argv` starts outlives it, or this process.
    """
    if level.tool == "bubblewrap":
        return [*_bubblewrap(_ordered(mounts)), "--", *argv]
    inside = level.tool == "namespaces"
    plan = {
        "parent": os.getpid(),
        "mounts": _ordered(mounts) if inside else [],
        "devices": _gpu_devices(),
        "folder": str(SCRATCH_AT),
    }
    return [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(plan), *argv]


def make_scratch(kit: Path, run: int) -> Scratch:
    """Make a private temporary folder, with a path short enough for a unix socket in it.

    What a predecessor of the same run has left behind is deleted.

    Raises:
        OSError: there is no place for one.
    """
    prefix = f"{_scratch_prefix(kit)}{run}-"
    for place in _scratch_places():
        sweep(place, prefix + "?" * DRAWN)
        scratch = open_scratch(place, prefix)
        if len(os.fsencode(scratch.folder)) <= MAX_SCRATCH_PATH:
            return scratch
        scratch.close()
    raise OSError(f"the path of {scratch.folder} is too long for a unix socket")


def sweep_scratch(kit: Path, run: int | None = None) -> None:
    """Delete the temporary folders of a site's run processes that are dead; blocks.

    That of a process that another one has started stays until that one is dead, too.

    Args:
        kit: the site's kit folder.
        run: only those of this run.
    """
    middle = "*" if run is None else f"{run}-"
    for place in _scratch_places():
        try:
            sweep(place, f"{_scratch_prefix(kit)}{middle}" + "?" * DRAWN)
        except OSError as error:
            log.warning("%s: what run processes have left there stays: %s", place, error)


def _scratch_prefix(kit: Path) -> str:
    """Return how the names of all temporary folders of a kit begin."""
    return f"flp-{hashlib.sha256(os.fsencode(kit.resolve())).hexdigest()[:16]}-"


def _scratch_places() -> list[Path]:
    places = (tempfile.gettempdir(), SCRATCH_AT)
    return list(dict.fromkeys(Path(place).resolve() for place in places))


def seen_at(level: Level, scratch: Path) -> Path:
    """Return the path under which the run process sees its scratch folder."""
    return scratch if level.name == "none" else SCRATCH_AT


def environment(given: Environment, scratch: str, library: Path) -> dict[str, str]:
    """Return all environment variables of a run process: none of the site's secrets.

    Args:
        given: what the site gives the job.
        scratch: where the process sees its scratch folder: its home and temporary folder.
        library: folder in which `import flplatform` finds this package.
    """
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
        "HOME": scratch,
        "TMPDIR": scratch,
        "PYTHONPATH": str(library),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",  # the order of a set is part of a reproducible job
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, given.gpus)),
    }


def interpreter_folders(python: str) -> tuple[Path, ...]:
    """Return the folders that an interpreter, in a virtual environment or not, needs."""
    if python == sys.executable:
        return Path(sys.prefix), Path(sys.base_prefix)
    return Path(python).parents[1], Path(python).resolve().parents[1]


@functools.cache
def available_level() -> Level:
    """Try what works on this host, once; `reason` says why it is not more.

    Takes some tenths of a second the first time.
    """
    tools: tuple[Tool, ...] = ("bubblewrap", "namespaces")
    problems: list[str] = []
    for tool in tools:
        problem = _probe(tool)
        if not problem:
            return Level("sandbox", tool, "; ".join((*problems, f"{tool} works")))
        problems.append(f"{tool}: {problem}")
    return Level("none", "", "; ".join(problems))


def _ordered(mounts: Mounts) -> list[list[str]]:
    """Return [kind, source, target] so that what lies deeper is mounted later.

    Only what a cover would hide needs a mount of its own; the rest of the host is there anyway.
    """
    hidden = {os.path.realpath(path) for path in mounts.hidden if path.is_dir()}
    covers = {*hidden, "/run", os.path.realpath(SCRATCH_AT)}
    found: list[tuple[int, int, list[str]]] = []

    def add(kind: str, source: Path | str, target: str) -> None:
        # At the same place the last counts: hiding beats showing.
        rank = ("read", "write", "hide").index(kind)
        found.append((target.rstrip("/").count("/"), rank, [kind, str(source), target]))

    for path in {*hidden, "/run"}:
        add("hide", path, path)
    add("write", os.path.realpath(mounts.scratch), os.path.realpath(SCRATCH_AT))
    for path in {os.path.realpath(path) for path in mounts.read_only}:
        if any(path.startswith(f"{cover}/") for cover in covers):
            add("read", path, path)
    for path in {os.path.realpath(path) for path in mounts.writable}:
        add("write", path, path)
    return [entry for _, _, entry in sorted(found)]


def _bubblewrap(mounts: list[list[str]]) -> list[str]:
    argv = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--cap-drop", "ALL"]
    argv += [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc")]
    argv += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--remount-ro", "/proc"]
    for device in _gpu_devices():
        argv += ["--dev-bind", device, device]
    options = {"read": "--ro-bind", "write": "--bind"}
    for kind, source, target in mounts:
        argv += ["--tmpfs", target] if kind == "hide" else [options[kind], source, target]
    for kind, _, target in mounts:
        if kind == "hide":
            argv += ["--remount-ro", target]
    return [*argv, "--chdir", str(SCRATCH_AT)]


def _gpu_devices() -> list[str]:
    return sorted(path for pattern in _GPUS for path in glob.glob(pattern))


_PROBE = """
import os, socket, sys
hidden, shown, written = sys.argv[1:]
def refused(action):
    try:
        action()
    except OSError:
        return True
    return False
assert not os.path.isdir(hidden) or not os.listdir(hidden), "hidden folders stay visible"
assert open(shown).read() == "shown", "data is not visible"
assert refused(lambda: open(shown, "a")), "data is writable"
assert refused(lambda: os.mkdir("/flplatform-probe")), "the host is writable"
open(written + "/file", "w").close()
names = [name for _, name in socket.if_nameindex()]
assert names == ["lo"], "the network is reachable"
assert os.getpid() < 10, "other processes are visible"
"""


def _probe(tool: Tool) -> str:
    """Return why `tool` does not keep its promises here; empty if it does."""
    if tool == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    with tempfile.TemporaryDirectory(prefix="flp-probe-") as name:
        folder = Path(name).resolve()
        scratch, written, shown = folder / "scratch", folder / "written", folder / "shown"
        scratch.mkdir()
        written.mkdir()
        shown.write_text("shown")
        # Any folder with something in it does to be hidden.
        hidden = LAUNCHER.parent
        visible = (shown, *interpreter_folders(sys.executable))
        mounts = Mounts(scratch, visible, (written,), (hidden,))
        python = [sys.executable, "-I", "-S", "-c", _PROBE, str(hidden), str(shown), str(written)]
        argv = command(Level("sandbox", tool), mounts, python)
        try:
            result = subprocess.run(
                argv, capture_output=True, timeout=PROBE_TIMEOUT_S, cwd="/", check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        if result.returncode == 0:
            return ""
        return lines[-1][:300] if lines else f"exit status {result.returncode}"
