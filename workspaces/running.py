"""A federation of real processes from real kits, on loopback: for scenarios, benchmarks, figures.

Each participant runs as its start.sh would run it; `kill` ends one without warning.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flplatform.core.config import Role, ServerLimits
from provisioning.project import Admin, Project, Server, Site
from provisioning.provision import provision

HERE = Path(__file__).resolve().parent
ADMIN = "admin@example.org"
DEADLINE_S = 60.0


class Federation:
    """Server, sites and admins below one folder; a context manager that ends what it started.

    Args:
        folder: where kits, state and logs go; short, for unix sockets below it.
        sites: site name → its datasets (name → path).
        admins: admin name → console role.
        limits: fields of the server's limits.
    """

    def __init__(
        self,
        folder: Path,
        sites: Mapping[str, Mapping[str, Path]],
        admins: Mapping[str, Role] | None = None,
        **limits: Any,
    ) -> None:
        self.sites = tuple(sites)
        self.admins: Mapping[str, Role] = admins or {ADMIN: "project_admin"}
        project = Project(
            name="test",
            server=Server(
                organisation="coordinator",
                addresses=("localhost", "127.0.0.1"),
                listen="127.0.0.1",
                fl_port=0,
                admin_port=0,
                limits=ServerLimits(reserve_bytes=0, **limits),
            ),
            sites=tuple(Site(name=name, organisation=f"{name}-org") for name in sites),
            admins=tuple(
                Admin(name=name, organisation="coordinator", role=role)
                for name, role in self.admins.items()
            ),
        )
        provision(project, folder)
        self.folder = folder / project.name
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}
        for name, data in sites.items():
            lines = [
                f"  {key}: {{path: {json.dumps(str(path))}, allow: [any]}}"
                for key, path in data.items()
            ]
            text = "\n".join(["datasets:", *lines]) if lines else ""
            self.local(name, "datasets.yml", text)
            self.local(name, "resources.yml", "reserve_bytes: 0\n")
        self.local("server", "resources.yml", "reserve_bytes: 0\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def kit(self, name: str) -> Path:
        """Return a participant's kit."""
        return self.folder / "kits" / name

    def local(self, name: str, file: str, text: str) -> None:
        """Write a file of a participant's `local` folder."""
        (self.kit(name) / "local" / file).write_text(text)

    def passphrase_file(self, admin: str = ADMIN) -> Path:
        """Return the file with an admin's passphrase."""
        return self.folder / "secrets" / f"{admin}.txt"

    def start(self, *names: str) -> None:
        """Start participants and wait until each serves; the server, if among them, first.

        A server that comes back takes the ports it had.
        """
        for name in sorted(names, key=lambda name: name != "server"):
            if name == "server" and self.ports:
                self.local(
                    "server",
                    "overrides.yml",
                    f"fl_address: 127.0.0.1:{self.ports['fl_port']}\n"
                    f"admin_address: 127.0.0.1:{self.ports['admin_port']}\n",
                )
            self._spawn(name)
            if name == "server":
                self.wait_ready("server")
        for name in names:
            self.wait_ready(name)

    def start_all(self) -> None:
        """Start the server and every site."""
        self.start("server", *self.sites)

    def _spawn(self, name: str) -> None:
        module = "server" if name == "server" else "client"
        (self.kit(name) / "state" / "ready.json").unlink(missing_ok=True)
        output = self.kit(name) / "output.txt"
        with output.open("ab") as file:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"flplatform.entrypoints.{module}", str(self.kit(name))],
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )

    def wait_ready(self, name: str) -> dict[str, Any]:
        """Return a participant's ready.json once it serves."""
        path = self.kit(name) / "state" / "ready.json"
        self.wait_for(path.exists, f"{name} to be ready", name)
        ready: dict[str, Any] = json.loads(path.read_text())
        if name == "server":
            self.ports = {key: ready[key] for key in ("fl_port", "admin_port")}
            for other in self.sites:
                self.local(other, "overrides.yml", self._servers("fl_port"))
            for admin in self.admins:
                self.local(admin, "overrides.yml", self._servers("admin_port"))
        return ready

    def _servers(self, port: str) -> str:
        return f'servers: ["localhost:{self.ports[port]}"]\n'

    def wait_for(
        self, condition: Any, what: str, process: str = "", deadline_s: float = DEADLINE_S
    ) -> None:
        """Wait until `condition()` holds; fail if it does not in time or the process has ended."""
        until = time.monotonic() + deadline_s
        while not condition():
            ended = process and self.processes[process].poll() is not None
            if ended or time.monotonic() > until:
                raise TimeoutError(f"waited for {what}\n{self.output(process or 'server')}")
            time.sleep(0.005)

    def output(self, name: str, lines: int = 40) -> str:
        """Return the end of what a participant printed."""
        path = self.kit(name) / "output.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def kill(self, name: str) -> None:
        """End a participant without warning (SIGKILL)."""
        self._signal(name, signal.SIGKILL)

    def terminate(self, name: str) -> int:
        """Ask a participant to end, and return its exit status."""
        return self._signal(name, signal.SIGTERM)

    def _signal(self, name: str, number: int) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout=DEADLINE_S)

    def stop(self) -> None:
        """End everything that was started."""
        for name in sorted(self.processes, key=lambda name: name == "server"):
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # ---- the console ----

    def console(
        self, *lines: str, admin: str = ADMIN, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run console commands without a terminal."""
        command = [
            sys.executable, "-m", "flplatform.entrypoints.admin", str(self.kit(admin)),
            "--password-file", str(self.passphrase_file(admin)), "--yes", *options,
        ]  # fmt: skip
        for line in lines:
            command += ["-c", line]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def ask(self, line: str, admin: str = ADMIN) -> dict[str, Any]:
        """Run one console command and return its JSON object."""
        done = self.console(line, admin=admin, options=["--json"])
        if not done.stdout.strip():
            raise AssertionError(f"{line}: no output\n{done.stderr}\n{self.output('server')}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
