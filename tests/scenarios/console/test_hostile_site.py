"""A site with a real kit that answers what it likes: it arrives escaped and bounded."""

import asyncio
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flplatform.client.session import Session
from flplatform.core.errors import FLError
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.kit import Kit
from tests.scenarios.conftest import ADMIN, Running
from tests.scenarios.console.terminal import Terminal

pytestmark = pytest.mark.scenario

EVIL = "evil"
SEQUENCES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b2J\r\nfl:test  9/9 sites > \u202egnp.exe\u200b\0"
SHOWN = r"\x1b]0;owned\x07\x1b[2J"
LONGEST_LINE = 1000
MOST_LINES = 60


def body(**facts: Any) -> dict[str, bytes]:
    return {"body": json.dumps(facts).encode()}


ANSWERS: dict[str, dict[str, Any]] = {
    "sequences": body(host=SEQUENCES, python=SEQUENCES, isolation=SEQUENCES, runs=[
        {"run": 1, "round": 1, "phase": SEQUENCES, "since_s": 1.0}]),
    "error": {"status": "error", "message": SEQUENCES, "rule": SEQUENCES},
    "refused": {"status": "refused", "message": SEQUENCES, "rule": SEQUENCES},
    "status": {"status": SEQUENCES, "message": "x" * 100_000, "rule": "y" * 100_000},
    "keys": body(**{SEQUENCES: 1}),
    "large": body(host="x" * 5_000_000),
    "long": body(host="x" * 900_000, runs=[{"run": 1, "round": 1, "phase": "p" * 9000,
                                            "since_s": 1}] * 9),
    "many": body(runs=[{"run": n, "round": n, "phase": "train", "since_s": n}
                       for n in range(10_000)]),
    "deep": {"body": b'{"host": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"},
    "deep but read": {"body": b'{"host": ' + b"[" * 500 + b"]" * 500 + b"}"},
    "types": body(host=[1, {"a": SEQUENCES}], cpus="many", load={"a": [None]}, runs=7,
                  memory_available_bytes="1", memory_total_bytes=True, uptime_s="soon",
                  disk_free_bytes=-1, disk_total_bytes=0, version={}, isolation=None),
    "runs": body(runs=[3, None, [], {}, {"run": "x"}, {"run": 10**18, "round": 1, "phase": 1,
                                                        "since_s": 1e308}]),
    "no number": {"body": b'{"cpus": NaN}'},
    "infinite": {"body": b'{"cpus": 1e999, "load": -1e999, "uptime_s": 1e999}'},
    "huge": {"body": b'{"disk_free_bytes": 1' + b"0" * 400 + b', "disk_total_bytes": 1}'},
    "largest": {"body": b'{"cpus": 1e308, "load": -1e308, "uptime_s": 1e308, "runs": [{"run": '
                b'1e308, "round": 1, "phase": "x", "since_s": 1e308}]}'},
    "list": {"body": b"[]"},
    "bytes": {"body": b"\xff\xfe\x00"},
    "nothing": {"body": b""},
}  # fmt: skip


class EvilSite:
    """Registers with a real kit and sends the answer of the day."""

    def __init__(self, kit: Path) -> None:
        self.answer: dict[str, Any] = {}
        self._session = Session(Kit.open(kit), SEQUENCES, lambda: [1, 2**31])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._ended = asyncio.Event()
        self._registered = threading.Event()
        self._thread.start()
        assert self._registered.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(20)
        self._loop.close()

    async def _run(self) -> None:
        serving = asyncio.create_task(self._serve())
        await self._ended.wait()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await self._session.close(SEQUENCES)

    async def _serve(self) -> None:
        reports = [pb.RunReport(run=1, round=2**32 - 1, phase=SEQUENCES * 100, since_s=1e300)]
        await self._session.training("Heartbeat", pb.HeartbeatRequest(runs=reports * 100))
        self._registered.set()
        received: list[str] = []
        while True:
            asked = await self._session.admin("Retrieve", pb.RetrieveRequest(received=received))
            received = [each.id for each in asked.requests]
            for each in asked.requests:
                reply = pb.SiteReply(request_id=each.id, **{"status": "ok", **self.answer})
                try:
                    await self._session.admin("SendReply", reply)
                except FLError:
                    continue  # too large: that is for the console to show


@pytest.fixture(scope="module")
def console() -> Iterator[tuple[Running, Terminal, EvilSite]]:
    folder = Path(tempfile.mkdtemp(prefix="fls-"))
    with Running(folder, (EVIL,)) as running:
        running.start("server")
        evil = EvilSite(running.kit(EVIL))
        secret = running.passphrase_file().read_text().strip()
        terminal = Terminal(running.kit(ADMIN), secret)
        yield running, terminal, evil
        terminal.close()
        evil.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("command", ["check_status", "sys_info"])
def test_what_a_site_says_is_escaped_and_bounded(console, command, case):
    _, terminal, evil = console
    evil.answer = ANSWERS[case]
    shown = terminal.run(f"{command} client {EVIL}", [])
    assert [line for line in shown if line.split()[:1] == [EVIL]], shown
    assert shown[-1].split()[1] in ("ok", "failed"), shown
    assert not any(line.startswith("fl:test  9/9") for line in shown)
    assert len(shown) <= MOST_LINES
    assert max(map(len, shown)) <= LONGEST_LINE
    for wrong in ("\x1b]", "\x1b[2J", "\x1b[31mred", "\x9b", "\x07", "\u202e", "\u200b", "\0"):
        assert wrong not in terminal.raw
    assert "unreadable reply" not in terminal.raw
    assert terminal.run("whoami", [])[0].split()[0] == ADMIN


def test_escapes_are_shown_as_what_they_are(console):
    _, terminal, evil = console
    evil.answer = ANSWERS["error"]
    shown = terminal.run(f"sys_info client {EVIL}", [])
    assert SHOWN in "".join("".join(shown).split())


def test_json_has_no_byte_that_steers_a_terminal(console):
    running, _, evil = console
    for case in ("sequences", "error", "deep but read", "infinite", "long"):
        evil.answer = ANSWERS[case]
        done = running.console(f"sys_info client {EVIL}", options=["--json"])
        assert done.stdout.isascii()
        assert done.stdout.rstrip("\n").isprintable()
        assert [row["target"] for row in json.loads(done.stdout)["rows"]] == [EVIL]
        assert done.stderr.replace("\n", "").isprintable()
