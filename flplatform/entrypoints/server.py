"""`fl_server KIT`: one process, one loop, two gRPC servers."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from flplatform.admin.fed_admin_server import FedAdminServer
from flplatform.entrypoints.process import run
from flplatform.security.kit import Kit
from flplatform.server.server import FederatedServer


class ServerProcess:
    """The FL side and the admin side, started and stopped together."""

    def __init__(self, kit: Kit, end: Callable[[bool], None]) -> None:
        self._fl = FederatedServer(kit, end)
        self._admin = FedAdminServer(
            kit,
            self._fl.control,
            blobs=self._fl.blobs,
            audit=self._fl.audit,
            trust=self._fl.trust,
            workers=self._fl.workers,
            note_refusal=self._fl.note_refusal,
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
    sys.exit(run(ServerProcess, "server"))


if __name__ == "__main__":
    main()
