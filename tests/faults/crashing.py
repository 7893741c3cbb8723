"""`python -m tests.faults.crashing MODULE KIT`: an entry point whose calls to the system can fail.

The product has no hook for tests. This module stands before it on a process's path: it puts itself
between the program and `os.fsync`, `os.fdatasync`, `os.rename`, `os.replace`, `os.link`, `os.open`
and the commits of the state store, then starts the entry point that it is given. The folder named
by `FLP_FAULTS` holds:

    order.json   what is to happen: {"kinds", "at", "do", "times", "match"}; may come at any time
    fired        written just before it happens
    calls.log    every call that makes something durable: kind and file
    acks.log     every answer to a result that the server gave this site: task, digest, status
    clock        seconds by which this process's wall clock is off; may change at any time

`do` is `kill` (before the call), `killed` (after it), `hold` (until the order is taken back), or
the name of an error such as `EIO`.
Other variables: `FLP_FAULTS_FILES`, the most open files; `FLP_FAULTS_PROTOCOL`, what is spoken;
`FLP_FAULTS_SILENCE`, after how many seconds a silent PostgreSQL is lost.
"""

import errno
import importlib
import json
import os
import resource
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = ("fsync", "fdatasync", "rename", "replace", "link")
BACKOFF_S = 0.5
"""Sites come back sooner than in the field: a test must not wait for their patience."""

Call = Callable[..., Any]


class Faults:
    """Counts calls and makes the ordered one fail or be the last; thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._open, self._rename = os.open, os.rename
        self._stamp: tuple[int, int] | None = None
        self._order: dict[str, Any] | None = None
        self._count = 0

    def between(self, kind: str, original: Call, refuse: Call | None = None) -> Call:
        """Return `original` as the program is to see it."""

        def called(*args: Any, **kwargs: Any) -> Any:
            do = self._next(kind, args)
            if do == "kill":
                self._kill()
            if do == "hold":
                self._hold()
            elif do not in ("", "killed"):
                self._note("fired", do)
                number = getattr(errno, do)
                raise (refuse or OSError)(number, os.strerror(number))
            result = original(*args, **kwargs)
            if do == "killed":
                self._kill()
            return result

        return called

    def _next(self, kind: str, args: tuple[Any, ...]) -> str:
        with self._lock:
            name = _name(args)
            if kind != "open":
                self._note("calls.log", f"{kind} {name}")
            order = self._read()
            if order is None or kind not in order["kinds"] or order["match"] not in name:
                return ""
            self._count += 1
            first, times = order["at"], order["times"]
            return order["do"] if first <= self._count < first + times else ""

    def _read(self) -> dict[str, Any] | None:
        path = self._folder / "order.json"
        try:
            status = path.stat()
        except FileNotFoundError:
            self._order = None
            return None
        if (stamp := (status.st_ino, status.st_mtime_ns)) != self._stamp:
            self._stamp, self._count = stamp, 0
            self._order = json.loads(path.read_text())
        return self._order

    def _kill(self) -> None:
        self._note("fired", "kill")
        os.kill(os.getpid(), signal.SIGKILL)

    def _hold(self) -> None:
        self._note("fired", "hold")
        while (self._folder / "order.json").exists():
            time.sleep(0.01)

    def _note(self, file: str, text: str) -> None:
        handle = self._open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(handle, f"{text}\n".encode())
        os.close(handle)

    def heard(self, task_id: str, digest: str, status: str) -> None:
        """Note that the server has answered a result."""
        self._note("acks.log", json.dumps({"task": task_id, "digest": digest, "status": status}))


def _name(args: tuple[Any, ...]) -> str:
    """Return the file that a call is about."""
    if not args:
        return ""
    if isinstance(args[0], int):
        try:
            return os.readlink(f"/proc/self/fd/{args[0]}")
        except OSError:
            return ""
    return " ".join(str(arg) for arg in args[:2] if isinstance(arg, str | Path))


def _refuse_commit(number: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(f"disk I/O error ({text})")
    full = number == errno.ENOSPC
    error.sqlite_errorname = "SQLITE_FULL" if full else "SQLITE_IOERR_FSYNC"
    return error


def _before_imports(faults: Faults) -> None:
    for kind in (*KINDS, "open"):
        setattr(os, kind, faults.between(kind, getattr(os, kind)))


def _after_imports(faults: Faults, module: str) -> None:
    if module.endswith("server"):
        from sqlalchemy.engine.default import DefaultDialect

        DefaultDialect.do_commit = faults.between(  # type: ignore[method-assign]
            "commit", DefaultDialect.do_commit, _refuse_commit
        )
        if silence := os.environ.get("FLP_FAULTS_SILENCE"):
            from flplatform.store import postgres

            postgres.SILENCE_S = postgres.READ_SILENCE_S = float(silence)
    if module.endswith("client"):
        _listen(faults)


def _listen(faults: Faults) -> None:
    """Hear the server's answers as this site hears them, and be less patient with it."""
    from flplatform.client import retrying, session

    heard, patient = session.Session.training, retrying.backoff_s

    async def training(self: Any, method: str, request: Any, timeout_s: float = 0) -> Any:
        reply = await heard(self, method, request, timeout_s)
        if method == "SubmitResult" and request.WhichOneof("outcome") == "result":
            faults.heard(request.task_id, request.result.blob.digest, reply.outcome)
        return reply

    session.Session.training = training  # type: ignore[method-assign]

    def impatient(attempt: int, longest_s: float) -> float:
        return patient(attempt, min(longest_s, BACKOFF_S))

    session.backoff_s = retrying.backoff_s = impatient
    session.PROTOCOL = int(os.environ.get("FLP_FAULTS_PROTOCOL", session.PROTOCOL))


def _shift_clocks(file: Path) -> None:
    """Have the program see a wall clock that is off; its monotonic clock stays as it is."""
    real_datetime = datetime
    clock = ModuleType("time")
    vars(clock).update(vars(time))

    def shift() -> float:
        try:
            return float(file.read_text() or 0)
        except FileNotFoundError:
            return 0.0

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return real_datetime.now(tz) + timedelta(seconds=shift())

    vars(clock)["time"] = lambda: time.time() + shift()
    for name, module in list(sys.modules.items()):
        if not name.startswith("flplatform."):
            continue  # gRPC computes with this clock and with that of its C part: both must agree
        if getattr(module, "datetime", None) is real_datetime:
            vars(module)["datetime"] = Shifted
        if getattr(module, "time", None) is time:
            vars(module)["time"] = clock


def main() -> None:
    """Start the entry point named on the command line, with faults in its way."""
    module, kit = sys.argv[1:]
    sys.argv = [module, kit]
    if most := os.environ.get("FLP_FAULTS_FILES"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(most), int(most)))
    folder = Path(os.environ["FLP_FAULTS"])
    faults = Faults(folder)
    _before_imports(faults)
    entry = importlib.import_module(module)
    _after_imports(faults, module)
    _shift_clocks(folder / "clock")
    assert datetime.now(UTC)
    entry.main()


if __name__ == "__main__":
    main()
