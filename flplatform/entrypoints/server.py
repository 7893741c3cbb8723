"""`fl_server KIT`: one process, one loop, two gRPC servers."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from flplatform.admin.fed_admin_server import (
    MODULE_HINT,
    MODULES_GROUP,
    FedAdminServer,
    ModuleFactory,
)
from flplatform.core.errors import ConfigError
from flplatform.entrypoints.process import run
from flplatform.files.durable import end_on_failed_sync
from flplatform.security.kit import Kit
from flplatform.server.server import FederatedServer

log = logging.getLogger(__name__)


def command_modules(names: Iterable[str]) -> dict[str, ModuleFactory]:
    """Load the console modules that the operator allows, and no others.

    Args:
        names: of entry points of installed packages, from `local/resources.yml`.

    Returns:
        What makes each module, by `NAME of PACKAGE VERSION`.

    Raises:
        ConfigError: one is missing, is offered twice, or cannot be loaded.
    """
    offered = entry_points(group=MODULES_GROUP)
    found: dict[str, ModuleFactory] = {}
    for name in names:
        match [*offered.select(name=name)]:
            case [point]:
                package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            case points:
                what = "is not installed" if not points else "is offered by several packages"
                known = ", ".join(sorted(offered.names)) or "none"
                raise ConfigError(
                    f"local/resources.yml: command_modules: {name!r} {what}",
                    hint=f"installed for {sys.executable}: {known}",
                )
        label = f"{name} of {package}"
        try:
            make = point.load()
        except Exception as error:  # whatever code from elsewhere raises
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"command module {label}: {what}", hint=MODULE_HINT) from error
        if not callable(make):
            raise ConfigError(
                f"command module {label}: {point.value} is no function of Parts", hint=MODULE_HINT
            )
        found[label] = make
        log.info("command module %s", label)
    return found


class ServerProcess:
    """The FL side and the admin side, started and stopped together."""

    def __init__(self, kit: Kit, end: Callable[[bool], None]) -> None:
        more = command_modules(kit.local.resources.command_modules)
        self._fl = FederatedServer(kit, end)
        self._admin = FedAdminServer(
            kit,
            self._fl.control,
            blobs=self._fl.blobs,
            audit=self._fl.audit,
            trust=self._fl.trust,
            workers=self._fl.workers,
            note_refusal=self._fl.note_refusal,
            more=more,
            counters=self._fl.control.counters,
        )

    async def start(self) -> Mapping[str, Any]:
        """Serve both ports; return them."""
        await self._fl.start()
        await self._admin.start()
        return {"fl_port": self._fl.port, "admin_port": self._admin.port}

    async def stop(self) -> None:
        """Stop the admin side first: what it has begun needs the FL side."""
        await self._admin.stop()
        await self._fl.stop()


def main() -> None:
    """Run the server whose kit is named on the command line."""
    end_on_failed_sync()
    sys.exit(run(ServerProcess, "server"))


if __name__ == "__main__":
    main()
