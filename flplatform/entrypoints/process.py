"""What every long-running process does alike: log, say that it is ready, obey signals, exit.

docs/operating.md has the table of exit codes.
"""

import asyncio
import json
import logging
import logging.handlers
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flplatform.core.errors import ConfigError, FailedPreconditionError, FLError
from flplatform.files.durable import private_dir, write_atomic
from flplatform.files.error_log import ErrorLog
from flplatform.files.lock import PROCESS_LOCK, held, is_same
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
"""The kit or its configuration is refused: starting again would not help."""

READY_FILE = "ready.json"
DRAIN_S = 30.0
"""How long ending may take; what is not done by then, the log and the spool still know."""
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
    if len(sys.argv) != 2:
        print(f"usage: fl_{'server' if kind == 'server' else 'client'} KIT", file=sys.stderr)
        return EXIT_CONFIG
    os.umask(0o077)
    try:
        kit = Kit.open(Path(sys.argv[1]))
        kit.check_user()
        with held(kit.folder / PROCESS_LOCK, f"the kit {kit.folder}") as lock:
            set_up_logging(kit, kind)
            return _run(kit, make, kind, lock)
    except FailedPreconditionError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return EXIT_IN_USE
    except (FLError, OSError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _run(
    kit: Kit, make: Callable[[Kit, Callable[[bool], None]], Service], kind: str, lock: int
) -> int:
    log.info("%s of project %s starts", kit.identity.name, kit.identity.project)
    log.info("root certificate SHA-256 %s", kit.trust.root_fingerprint)
    if kind == "server":
        log.info("open files: at most %d", raise_file_limit())
    ending = _Ending()
    try:
        return asyncio.run(_serve(kit, make, lock, ending))
    except ConfigError as error:
        log.error("cannot start: %s", error)
        return EXIT_CONFIG
    except (FLError, OSError) as error:
        log.error("cannot start: %s", error)
        return EXIT_FAILED
    except Exception:
        log.critical("a defect ends the process", exc_info=True)
        return EXIT_FAILED
    finally:
        ending.done()


class _Ending:
    """Bounds the time that ending takes, also if the event loop or a worker hangs."""

    def __init__(self) -> None:
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


async def _watch_kit(path: Path, lock: int, gone: Callable[[], None]) -> None:
    """Call `gone` once the lock that is held is not the kit's any more."""
    while is_same(lock, path):
        await asyncio.sleep(KIT_WATCH_S)
    log.critical(
        "%s was moved, removed or made anew: what is written now would be lost, so it ends",
        path.parent,
    )
    gone()


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
        if ended.done():  # the second signal does not wait for the drain
            logging.shutdown()
            os._exit(EXIT_FAILED)
        ending.begin(EXIT_STOPPED)  # starting may hang as well
        end(False)

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:  # making may wait for a database, and nothing is underway yet
        signal.signal(number, lambda *_: sys.exit(EXIT_STOPPED))
    private_dir(kit.state_folder())
    ready = kit.state_folder() / READY_FILE
    ready.unlink(missing_ok=True)
    service = make(kit, end)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    watch = asyncio.create_task(
        _watch_kit(kit.folder / PROCESS_LOCK, lock, lambda: end_with(EXIT_CONFIG))
    )
    code = EXIT_FAILED
    try:
        facts = await service.start()
        write_atomic(ready, json.dumps({"pid": os.getpid(), **facts}).encode())
        log.info("ready: %s", ", ".join(f"{key} {value}" for key, value in facts.items()))
        code = await ended
        log.info("ends%s", ", to be started again" if code == EXIT_RESTART else "")
        return code
    finally:
        ending.begin(code)
        watch.cancel()
        ready.unlink(missing_ok=True)
        await service.stop()


def set_up_logging(kit: Kit, kind: str) -> None:
    """Log to standard error and to a bounded file in the kit's `logs` folder."""
    resources = kit.local.resources
    folder = private_dir(kit.folder / "logs")
    file = logging.handlers.RotatingFileHandler(
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
