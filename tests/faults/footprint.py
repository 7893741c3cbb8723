"""What processes and their folders hold, and that it comes back to what it was."""

import os
from pathlib import Path

import psutil

from tests.faults.federations import Faulty


class Footprint:
    """What a process holds now."""

    def __init__(self, federation: Faulty, name: str) -> None:
        process = psutil.Process(federation.processes[name].pid)
        with process.oneshot():
            self.threads = process.num_threads()
            self.files = process.num_fds()
            self.memory = process.memory_info().rss
        self.children = len(process.children(recursive=True))
        self.temporary = len(temporary_files(federation.kit(name)))

    def __repr__(self) -> str:
        return str(vars(self))


def temporary_files(kit: Path) -> list[Path]:
    """Return what must be gone when nothing is going on."""
    state = kit / "state"
    # os.walk passes over folders that are removed meanwhile.
    found = [
        Path(parent, name)
        for parent, folders, files in os.walk(state)
        for name in (*folders, *files)
        if name.startswith(".tmp-")
    ]
    for folder in ("blobs/incoming", "work", "spool/entries", "spool/adopting", "spool/trash"):
        found += (state / folder).glob("*")
    return found + list((state / "runs").glob("run-*"))


def settled(federation: Faulty, name: str) -> Footprint:
    """Return the footprint once nothing is going on any more."""
    now = [Footprint(federation, name)]

    def quiet() -> bool:
        now[0] = Footprint(federation, name)
        return now[0].children == now[0].temporary == 0

    try:
        federation.wait_for(quiet, f"{name} to be quiet", name)
    except TimeoutError as error:
        running = psutil.Process(federation.processes[name].pid).children(recursive=True)
        left = [str(each) for each in (*temporary_files(federation.kit(name)), *running)]
        raise TimeoutError("\n".join([f"{name} has left:", *left, str(error)])) from None
    return now[0]
