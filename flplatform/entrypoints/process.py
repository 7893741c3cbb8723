"""What every long-running process does alike: log, say that it is ready, obey signals, exit."""

import asyncio
import json
import logging
import logging.handlers
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flplatform.core.errors import ConfigError, FLError
from flplatform.files.durable import private_dir, write_atomic
from flplatform.files.error_log import ErrorLog
from flplatform.security.kit import Kit

log = logging.getLogger(__name__)

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_RESTART = 75
"""Tells start.sh to start the process again at once."""
EXIT_CONFIG = 78
"""The kit or its configuration is refused: starting again would not help."""

READY_FILE = "ready.json"


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
        set_up_logging(kit, kind)
    except (FLError, OSError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return EXIT_CONFIG
    log.info("%s of project %s starts", kit.identity.name, kit.identity.project)
    log.info("root certificate SHA-256 %s", kit.trust.root_fingerprint)
    try:
        return asyncio.run(_serve(kit, make))
    except ConfigError as error:
        log.error("cannot start: %s", error)
        return EXIT_CONFIG
    except (FLError, OSError) as error:
        log.error("cannot start: %s", error)
        return EXIT_FAILED


async def _serve(kit: Kit, make: Callable[[Kit, Callable[[bool], None]], Service]) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(restart: bool) -> None:
        if not ended.done():
            ended.set_result(EXIT_RESTART if restart else EXIT_STOPPED)

    def on_signal() -> None:
        if ended.done():  # the second signal does not wait for the drain
            logging.shutdown()
            os._exit(EXIT_FAILED)
        end(False)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    private_dir(kit.state_folder())
    ready = kit.state_folder() / READY_FILE
    ready.unlink(missing_ok=True)
    service = make(kit, end)
    try:
        facts = await service.start()
        write_atomic(ready, json.dumps({"pid": os.getpid(), **facts}).encode())
        log.info("ready: %s", ", ".join(f"{key} {value}" for key, value in facts.items()))
        code = await ended
        log.info("ends%s", ", to be started again" if code == EXIT_RESTART else "")
        return code
    finally:
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
    for handler in (file, logging.StreamHandler()):
        handler.setFormatter(form)
        logging.getLogger().addHandler(handler)
    ErrorLog.installed()
    logging.getLogger().setLevel(os.environ.get("FLP_LOG_LEVEL", "INFO").upper())
