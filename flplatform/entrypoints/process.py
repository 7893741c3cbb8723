"""What every long-running process does alike: log, say that it is ready, obey signals, exit.

docs/operating.md has the table of exit codes. What a machine is short of when a process starts,
such as space on its disk, has no code: it is waited for, see `_await_shortage`.
"""

import asyncio
import errno
import json
import logging
import logging.handlers
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    ResourceExhaustedError,
)
from flplatform.files.durable import private_dir, remove_temporaries, write_atomic
from flplatform.files.error_log import ErrorLog
from flplatform.files.lock import PROCESS_LOCK, held, is_same
from flplatform.files.shortage import shortage_in
from flplatform.files.system import raise_file_limit
from flplatform.security.kit import Kit

log = logging.getLogger(__name__)

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_IN_USE = 73
"""Another process runs on this kit: starting again would not help."""
EXIT_RESTART = 75
"""Tells start.sh to start the process again at once."""
EXIT_CONFIG = 78
"""The kit, its configuration or its state is refused: starting again would not help."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
READY_FILE = "ready.json"
DRAIN_S = 30.0
"""How long ending may take; what is not done by then, the log and the spool still know."""
SHORTAGE_PAUSES_S = (1.0, 30.0)
"""First and longest pause between two starts on a machine that is short of something."""
TOLD_EVERY = 120
"""After so many such starts one in so many is told: about one in an hour."""
ATTEMPTS = "FLP_SHORT_STARTS"
"""Variable that tells a process how often it was short of something since it was started."""
ONE_PRESS_S = 1.0
"""Signals within this time are one: Ctrl-C reaches a program and start.sh, which passes it on."""
KIT_WATCH_S = 5.0
"""Pause between two looks whether the kit is still there."""


class Service(Protocol):
    """Something that serves until it is told to stop."""

    async def start(self) -> Mapping[str, Any]:
        """Begin to serve; return what ready.json tells (ports)."""

    async def stop(self) -> None:
        """Drain and end."""


def run(make: Callable[[Kit, Callable[[bool], None]], Service], kind: str) -> int:
    """Verify the kit named on the command line, serve, and return the exit code.

    Args:
        make: builds the service from a verified kit and a function that ends the process.
        kind: `server` or `site`, for the usage line.
    """
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        asked = sys.argv[1:] in (["-h"], ["--help"])
        usage = f"usage: fl_{'server' if kind == 'server' else 'client'} KIT"
        print(usage, file=sys.stdout if asked else sys.stderr)
        return EXIT_STOPPED if asked else EXIT_CONFIG
    os.umask(0o077)
    for number in SIGNALS:  # making may wait for a database, and nothing is underway yet
        signal.signal(number, lambda *_: sys.exit(EXIT_STOPPED))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    folder = Path(sys.argv[1])
    try:
        kit = Kit.open(folder)
        kit.check_user()
        with held(kit.folder / PROCESS_LOCK, f"the kit {kit.folder}") as lock:
            set_up_logging(kit, kind)
            return _run(kit, make, kind, lock)
    except FailedPreconditionError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return EXIT_IN_USE
    except (FLError, OSError, MemoryError) as error:
        if shortage := shortage_in(error):  # nobody logs yet
            _await_shortage(
                (folder, folder / "state", folder / "logs"), shortage, error, _print_error
            )
        _print_error(f"cannot start: {error}")
        return EXIT_CONFIG


def _print_error(text: str) -> None:
    with suppress(OSError):  # what it is printed to may lie on a full disk
        print(text, file=sys.stderr, flush=True)


def _run(
    kit: Kit, make: Callable[[Kit, Callable[[bool], None]], Service], kind: str, lock: int
) -> int:
    level = logging.DEBUG if _attempts() else logging.INFO  # said once is enough
    log.log(level, "%s of project %s starts", kit.identity.name, kit.identity.project)
    log.log(level, "root certificate SHA-256 %s", kit.trust.root_fingerprint)
    if kind == "server":
        log.log(level, "open files: at most %d", raise_file_limit())
    ending = _Ending()
    try:
        return asyncio.run(_serve(kit, make, lock, ending))
    except Exception as error:  # noqa: BLE001 - sorted out below, when nothing is underway
        failure = error
    finally:
        ending.done()
    shortage = shortage_in(failure)
    if shortage and ending.asked_at is None:
        _await_shortage(
            (kit.folder, kit.state_folder(), kit.folder / "logs"), shortage, failure, log.error
        )
    if isinstance(failure, FLError | OSError):
        log.error("cannot start: %s", failure)
        return EXIT_CONFIG if isinstance(failure, ConfigError | DataLossError) else EXIT_FAILED
    log.critical("a defect ends the process", exc_info=failure)
    return EXIT_FAILED


def _attempts() -> int:
    """Return how often this process was short of something, from its first start on."""
    text = os.environ.get(ATTEMPTS, "")
    return int(text) if text.isdecimal() else 0


def _is_told(attempt: int) -> bool:
    """Return whether attempt number `attempt` (from 1) is told: ever more rarely."""
    return attempt.bit_count() == 1 or attempt % TOLD_EVERY == 0


def _await_shortage(
    folders: Iterable[Path],
    shortage: ResourceExhaustedError,
    error: BaseException,
    tell: Callable[[str], None],
) -> NoReturn:
    """Wait, then become the same program anew: a shortage passes, and a crash it is not.

    What has been made so far ends with the program that it was made in, as after a kill. The
    process keeps its number, so whoever supervises it need not know of it. A signal ends it at
    once.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_STOPPED))
    attempt = _attempts() + 1
    first, longest = SHORTAGE_PAUSES_S
    pause = min(longest, first * 2 ** min(attempt - 1, 16))
    if _is_told(attempt):
        free = f"; {_free(error, folders)}" if shortage.rule == "disk" else ""
        tell(
            f"cannot start yet: {shortage.message}: {error}{free}; it tries again by itself until "
            f"this has passed, next in {pause:g} s"
        )
    os.environ[ATTEMPTS] = str(attempt)
    while True:
        time.sleep(pause)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `run` can answer them
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself
        except OSError as again:  # no memory for that, either
            log.debug("cannot become itself anew: %s", again)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _free(error: BaseException, folders: Iterable[Path]) -> str:
    """Return what is left on the disk that is full: that of the file that an error names.

    If it names none, it is that of the folders, which may be links, with the least left.
    """
    from flplatform.hci.units import size  # noqa: PLC0415 - a site has no console otherwise

    name = _file_in(error)
    try:
        places = map(_existing, folders if name is None else [Path(name).absolute()])
        free, place = min((shutil.disk_usage(place).free, place) for place in places)
    except OSError as refusal:
        return f"the disk says {refusal}"
    return f"{size(free)} are free on the disk of {place}"


def _file_in(error: BaseException) -> str | None:
    """Return the file that found no room, if an error or what led to it names it."""
    each: BaseException | None = error
    met: set[int] = set()
    while each is not None and id(each) not in met:
        met.add(id(each))
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT):
            return each.filename if isinstance(each.filename, str) else None
        each = each.__cause__ or each.__context__
    return None


def _existing(path: Path) -> Path:
    """Return a path, or of the folders around it the nearest that is there."""
    return next((each for each in (path, *path.parents) if each.exists()), path)


class _Ending:
    """Bounds the time that ending takes, also if the event loop or a worker hangs.

    Attributes:
        asked_at: when the first signal asked for it, by the event loop's clock.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self._timer: threading.Timer | None = None

    def begin(self, code: int) -> None:
        """From now on it must be over in `DRAIN_S` seconds, with this exit code."""
        if self._timer is not None:
            return
        self._timer = threading.Timer(DRAIN_S, self._give_up, (code,))
        self._timer.daemon = True
        self._timer.start()

    def done(self) -> None:
        """It is over."""
        if self._timer is not None:
            self._timer.cancel()

    @staticmethod
    def _give_up(code: int) -> None:
        log.critical("ending took more than %.0f s and is cut short", DRAIN_S)
        logging.shutdown()
        os._exit(code)


async def _watch_kit(kit: Kit, lock: int, state: int, end_with: Callable[[int], None]) -> None:
    """End once the lock that is held is not the kit's any more, or its state folder is lost.

    Args:
        kit: what is watched.
        lock: handle of the process's lock.
        state: handle of the state folder.
        end_with: told with which exit code.
    """
    folder = kit.state_folder()
    while held_here := is_same(lock, kit.folder / PROCESS_LOCK):
        if not is_same(state, folder.resolve()):
            break
        await asyncio.sleep(KIT_WATCH_S)
    # Without its state a site can begin anew; another kit in the place of this one it is not.
    log.critical(
        "%s was moved, removed or made anew: what is written now would be lost, so it ends",
        folder if held_here else kit.folder,
    )
    end_with(EXIT_FAILED if held_here else EXIT_CONFIG)


async def _serve(
    kit: Kit,
    make: Callable[[Kit, Callable[[bool], None]], Service],
    lock: int,
    ending: _Ending,
) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end_with(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    def end(restart: bool) -> None:
        end_with(EXIT_RESTART if restart else EXIT_STOPPED)

    def on_signal() -> None:
        if ending.asked_at is None:
            ending.asked_at = loop.time()
            ending.begin(EXIT_STOPPED)  # starting may hang as well
            end(False)
        elif loop.time() > ending.asked_at + ONE_PRESS_S:  # the second does not wait for the drain
            logging.shutdown()
            os._exit(EXIT_FAILED)

    folder = private_dir(kit.state_folder())
    state = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    remove_temporaries(folder)
    ready = kit.state_folder() / READY_FILE
    ready.unlink(missing_ok=True)
    service = make(kit, end)
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    watch = asyncio.create_task(_watch_kit(kit, lock, state, end_with))
    code = EXIT_FAILED
    try:
        facts = await service.start()
        write_atomic(ready, json.dumps({"pid": os.getpid(), **facts}).encode())
        os.environ.pop(ATTEMPTS, None)
        log.info("ready: %s", ", ".join(f"{key} {value}" for key, value in facts.items()))
        code = await ended
        log.info("ends%s", ", to be started again" if code == EXIT_RESTART else "")
        return code
    finally:
        ending.begin(code)
        watch.cancel()
        ready.unlink(missing_ok=True)
        await service.stop()
        os.close(state)


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file; that its disk is full is told beside it, and not again for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its base's name
        """Say what went wrong with a record, unless it is a shortage."""
        error = sys.exc_info()[1]
        if error is None or shortage_in(error) is None:
            super().handleError(record)


def set_up_logging(kit: Kit, kind: str) -> None:
    """Log to standard error and to a bounded file in the kit's `logs` folder."""
    resources = kit.local.resources
    folder = private_dir(kit.folder / "logs")
    file = _LogFile(
        folder / f"{kind}.log", maxBytes=resources.log_bytes, backupCount=resources.log_files
    )
    form = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%FT%T")
    form.converter = time.gmtime
    stream = logging.StreamHandler()
    stream.setLevel(os.environ.get("FLP_STDERR_LEVEL", "NOTSET").upper())
    for handler in (file, stream):
        handler.setFormatter(form)
        logging.getLogger().addHandler(handler)
    ErrorLog.installed()
    logging.getLogger().setLevel(os.environ.get("FLP_LOG_LEVEL", "INFO").upper())
