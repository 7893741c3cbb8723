"""A look into hosts, only as far as each allows it; files to the server and back, over a cut."""

import contextlib
import json
import socket
import threading

import pytest

from flplatform.core import events as ev
from workspaces.running import ADMIN

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]


def rows(answer) -> dict[str, str]:
    return {row["target"]: f"{row['status']} {row['detail']}".strip() for row in answer["rows"]}


def ask(running, *lines: str) -> list[dict]:
    """Run lines in one console, whether they succeed or not; return an object for each."""
    done = running.console(*lines, options=["--json", "--keep-going"])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines), done.stdout + done.stderr
    return answers


def test_looks_and_files(federation):
    running = federation("site-1", "site-2")
    running.local(
        "site-1",
        "policy.yml",
        "allow_foreign_code_unsandboxed: true\nallowed_shell_cmds: [ls, grep]\n",
    )
    running.start_all()
    running.steps_job(rounds=2)
    kit = running.kit(ADMIN)
    big = kit / "transfer" / "big.bin"
    big.write_bytes(bytes(range(256)) * 4096)
    release = running.hold("site-1", 1)
    begun = ask(running, "submit_job steps", "upload_file big.bin data/big.bin")
    assert [answer["exit_code"] for answer in begun] == [0, 0], begun
    running.wait_event(1, ev.RoundOpened)

    # ---- looks ----
    closed, listed, code, found, out = ask(
        running,
        "ls all logs",
        "ls client site-1",
        "ls client site-1 -R runs/1",
        "grep client -in RUN logs/site.log",
        "grep client site-1 x logs/../startup/participant.key",
    )
    assert rows(closed) == {
        "server": "refused rule policy allowed_shell_cmds = none",
        "site-1": "ok",
        "site-2": "refused rule policy allowed_shell_cmds = none: ls is off here",
    }
    assert listed["data"]["output"]["site-1"] == "logs/\nruns/\n"
    assert "steps.py" in code["data"]["output"]["site-1"]
    assert rows(found)["site-1"] == "ok"
    assert "site-2" not in found["data"]["output"]
    assert out["exit_code"] == 2
    for name in ("server", "site-1"):
        records = (running.kit(name) / "state" / "audit.jsonl").read_text()
        assert '"grep"' in records
        assert "logs/site.log" in records
    release()
    running.wait_event(1, ev.RunEnded)

    # ---- results of a run ----
    folder, last = kit / "transfer" / "run-1", kit / "last.bin"
    fetched, _ = ask(running, "download_folder runs/1", f"download_model 1 last --to {last}")
    assert fetched["exit_code"] == 0, fetched
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "best.safetensors", "cross_val.csv", "cross_val.json", "job.zip", "log.txt",
        "metrics.csv", *(f"models/round-{n}.safetensors" for n in range(3)),
    }  # fmt: skip
    assert (folder / "models" / "round-2.safetensors").read_bytes() == last.read_bytes()
    assert "round 1 closed" in (folder / "log.txt").read_text()
    assert "2,site-1,global,size" in (folder / "metrics.csv").read_text()

    # ---- a file of one's own, and back; nothing is overwritten ----
    again, back, taken, gone = ask(
        running,
        "info",
        "download_file transfer/data/big.bin --to back.bin",
        "download_folder runs/1",
        "delete_file transfer/data/big.bin",
    )
    assert [entry["name"] for entry in again["data"]["files"]] == ["transfer/data/big.bin"]
    assert back["exit_code"] == 0, back
    assert (kit / "transfer" / "back.bin").read_bytes() == big.read_bytes()
    assert taken["exit_code"] == 1
    assert "exists" in taken["errors"][0]["message"]
    assert gone["exit_code"] == 0
    assert not list((kit / "transfer").glob(".fl-download-*"))


class Wire:
    """A way to a port of this host that breaks once, after so many bytes.

    Attributes:
        left: bytes until it breaks; None for never.
    """

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.left: int | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with source, contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and not self._breaks(len(data)):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _breaks(self, count: int) -> bool:
        with self._lock:
            if self.left is None:
                return False
            self.left -= count
            if self.left > 0:
                return False
            self.left = None
            return True


def test_cut_transfers_go_on_where_they_stopped(federation):
    running = federation("site-1")
    running.start("server")
    kit = running.kit(ADMIN)
    big = kit / "transfer" / "big.bin"
    big.write_bytes(b"".join(n.to_bytes(8, "little") * (1 << 17) for n in range(48)))
    wire = Wire(running.ports["admin_port"])
    running.local(ADMIN, "overrides.yml", f'servers: ["localhost:{wire.port}"]\n')
    try:
        for line in ("upload_file big.bin", "download_file transfer/big.bin --to back.bin"):
            wire.left = 24 << 20
            done = running.console(line)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "trying again" in done.stdout
            assert wire.left is None
    finally:
        wire.close()
    assert (kit / "transfer" / "back.bin").read_bytes() == big.read_bytes()
