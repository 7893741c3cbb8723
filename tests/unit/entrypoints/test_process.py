"""What every process does alike, with a service that the test plays."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flplatform.core.errors import UnavailableError
from flplatform.entrypoints import process
from flplatform.files.lock import PROCESS_LOCK, held
from tests.support.federation import provision

PROGRAM = """
import asyncio, sys, time
from flplatform.entrypoints import process
process.DRAIN_S, process.KIT_WATCH_S = {drain_s}, 0.05

class Service:
    def __init__(self, kit, end):
        self.kit, self.end = kit, end
        {make}
    async def start(self):
        {start}
        return {{}}
    async def stop(self):
        {stop}

sys.exit(process.run(Service, "server"))
"""

DEADLINE_S = 50.0


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    return provision(tmp_path, ("a",)).server


@pytest.fixture
def started(kit: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a process with that kit and waits until it is ready."""
    made: list[subprocess.Popen[str]] = []

    def start(
        start: str = "pass",
        stop: str = "pass",
        drain_s: float = 20.0,
        ready: bool = True,
        make: str = "pass",
    ) -> "subprocess.Popen[str]":
        program = PROGRAM.format(start=start, stop=stop, drain_s=drain_s, make=make)
        made.append(
            subprocess.Popen(
                [sys.executable, "-c", program, str(kit)], stderr=subprocess.PIPE, text=True
            )
        )
        until = time.monotonic() + DEADLINE_S
        while ready and not (kit / "state" / "ready.json").exists():
            assert made[-1].poll() is None, made[-1].communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        return made[-1]

    yield start
    for each in made:
        if each.poll() is None:
            each.kill()
        each.communicate()


def ended(running: "subprocess.Popen[str]") -> tuple[int, str]:
    _, errors = running.communicate(timeout=DEADLINE_S)
    return running.returncode, errors


def test_a_second_process_on_a_kit_is_refused(
    kit: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    first = started()
    (kit / "state" / "ready.json").unlink()
    code, errors = ended(started(ready=False))
    assert code == process.EXIT_IN_USE
    assert f"is in use by process {first.pid} (rule: one_process); stop it first" in errors
    first.terminate()
    assert ended(first)[0] == process.EXIT_STOPPED
    with held(kit / PROCESS_LOCK, "the kit"):  # it ends with its holder
        pass


def test_what_a_kill_amid_a_write_has_left_is_removed(
    kit: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    leftover, below = kit / "state" / ".tmp-0-seen.json", kit / "state" / "runs" / ".tmp-gone-0"
    below.mkdir(parents=True)
    leftover.touch()
    started()
    assert not leftover.exists()
    assert below.exists(), "that is for those who own the folder"


def test_ending_is_bounded(started: Callable[..., "subprocess.Popen[str]"]) -> None:
    """Also if the loop itself hangs."""
    running = started(stop="time.sleep(600)", drain_s=0.3)
    running.terminate()
    code, errors = ended(running)  # long before the ending would be over by itself
    assert code == process.EXIT_STOPPED
    assert "CRITICAL ending took more than 0 s and is cut short" in errors


def test_a_signal_ends_what_is_still_being_made(
    kit: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    running = started(make="(kit.folder / 'made').touch(); time.sleep(600)", ready=False)
    until = time.monotonic() + DEADLINE_S
    while not (kit / "made").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    running.terminate()
    assert ended(running)[0] == process.EXIT_STOPPED


def test_a_second_signal_does_not_wait(started: Callable[..., "subprocess.Popen[str]"]) -> None:
    running = started(stop="self.kit.folder.joinpath('ends').touch(); await asyncio.sleep(600)")
    begun = time.monotonic()
    running.terminate()
    ends = Path(running.args[-1]) / "ends"  # type: ignore[index]
    while not ends.exists():
        assert time.monotonic() - begun < DEADLINE_S
        time.sleep(0.005)
    assert running.poll() is None, "the first signal waits for what is under way"
    while running.poll() is None:  # one that comes right after the first is the same
        running.terminate()
        time.sleep(0.05)
    assert ended(running)[0] == process.EXIT_FAILED
    assert time.monotonic() - begun > process.ONE_PRESS_S


def test_ctrl_c_is_one_signal(started: Callable[..., "subprocess.Popen[str]"]) -> None:
    """The terminal sends it to the program, and start.sh passes it on."""
    stop = "await asyncio.sleep(0.3); self.kit.folder.joinpath('ended').touch()"
    running = started(stop=stop)
    running.send_signal(signal.SIGSTOP)  # however slowly both are sent, it gets them together
    running.send_signal(signal.SIGINT)
    running.terminate()
    running.send_signal(signal.SIGCONT)
    assert ended(running)[0] == process.EXIT_STOPPED
    assert (Path(running.args[-1]) / "ended").exists()  # type: ignore[index]


def test_a_restart_is_asked_for_also_if_ending_hangs(
    started: Callable[..., "subprocess.Popen[str]"],
) -> None:
    call = "asyncio.get_running_loop().call_later(0.2, self.end, True)"
    running = started(start=call, stop="await asyncio.sleep(600)", drain_s=0.3)
    assert ended(running)[0] == process.EXIT_RESTART


def test_it_ends_when_its_kit_is_removed_or_made_anew(
    kit: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    running = started()
    os.rename(kit, kit.with_name("moved"))
    code, errors = ended(running)
    assert code == process.EXIT_CONFIG
    assert "was moved, removed or made anew" in errors


def test_it_ends_to_be_started_again_when_its_state_is_lost(
    kit: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    running = started()
    state = kit / "state"
    shutil.copytree(state, kit / "other")
    shutil.rmtree(state)
    os.rename(kit / "other", state)  # it is another one all the same
    code, errors = ended(running)
    assert code == process.EXIT_FAILED
    assert f"{state} was moved, removed or made anew" in errors


def test_its_state_may_lie_elsewhere(
    kit: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    (kit.parent / "elsewhere").mkdir()
    (kit / "state").symlink_to(kit.parent / "elsewhere")
    running = started(start="await asyncio.sleep(0.3)")  # several looks
    running.terminate()
    assert ended(running)[0] == process.EXIT_STOPPED


def test_a_defect_is_logged(kit: Path, started: Callable[..., "subprocess.Popen[str]"]) -> None:
    running = started(start="raise ValueError('odd')", ready=False)
    code, errors = ended(running)
    assert code == process.EXIT_FAILED
    assert "CRITICAL a defect ends the process" in errors
    assert "ValueError: odd" in (kit / "logs" / "server.log").read_text()


def test_standard_error_can_be_made_quiet(
    kit: Path,
    started: Callable[..., "subprocess.Popen[str]"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLP_STDERR_LEVEL", "warning")
    running = started()
    running.terminate()
    assert ended(running) == (0, "")
    assert " INFO    ready" in (kit / "logs" / "server.log").read_text()


SHORT = """
        import errno, os
        from flplatform.core.errors import UnavailableError
        if not kit.folder.joinpath('room').exists():
            try:
                raise OSError(errno.ENOSPC, 'No space', 'events.db')
            except OSError as error:
                raise UnavailableError('cannot be opened') from error
"""


def says(kit: Path, text: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while text not in (kit / "logs" / "server.log").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def short(kit: Path, started: Callable[..., "subprocess.Popen[str]"]) -> "subprocess.Popen[str]":
    (kit / "logs").mkdir()
    (kit / "logs" / "server.log").touch()
    running = started(make=SHORT.strip(), ready=False)
    says(kit, "ERROR   cannot start yet: the disk is full: cannot be opened; ")
    return running


def test_a_shortage_at_the_start_is_waited_for(kit: Path, short: "subprocess.Popen[str]") -> None:
    (kit / "room").touch()
    says(kit, "INFO    ready: ")
    assert json.loads((kit / "state" / "ready.json").read_bytes())["pid"] == short.pid
    short.terminate()
    code, errors = ended(short)
    assert code == process.EXIT_STOPPED
    assert "it tries again by itself until this has passed, next in 1 s" in errors


def test_a_signal_ends_the_waiting_for_what_is_short(short: "subprocess.Popen[str]") -> None:
    short.terminate()
    assert ended(short)[0] == process.EXIT_STOPPED


def test_a_shortage_of_what_serves_already_is_no_crash(
    kit: Path, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    """The file that says so needs room, too; the port that was bound is bound again."""
    once = (
        "import socket; self.s = socket.create_server(('127.0.0.2', int(self.port())));"
        "first = not self.kit.folder.joinpath('first').exists();"
        "self.kit.folder.joinpath('first').touch();"
        "fail = lambda *_: (_ for _ in ()).throw(OSError(28, 'No space'));"
        "process.write_atomic = fail if first else process.write_atomic"
    )
    port = kit / "port"
    with socket.create_server(("127.0.0.2", 0)) as free:  # where nobody else takes a port
        port.write_text(str(free.getsockname()[1]))
    once = once.replace("self.port()", f"open({str(port)!r}).read()")
    running = started(start=once)
    running.terminate()
    code, errors = ended(running)
    assert code == process.EXIT_STOPPED
    assert errors.count("cannot start yet: the disk is full") == 1


FULL = Path("/proc")
"""A file system that has no byte free."""


def no_space(*names: object) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", *names)


def test_what_is_left_is_told_of_the_disk_that_is_full(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    folders = (kit, kit / "state", kit / "logs")  # which may not be there yet
    assert process._free(no_space(), folders).endswith(f" are free on the disk of {kit}")
    (kit / "state").symlink_to(FULL)
    least = f"0 B are free on the disk of {kit}/state"
    assert process._free(no_space(), folders) == least
    assert process._free(no_space(7), folders) == least


def test_the_disk_of_the_file_that_found_no_room_is_meant(tmp_path: Path) -> None:
    other = UnavailableError("cannot be opened")
    other.__cause__ = no_space(str(FULL / "no" / "events.db"))
    other.__context__ = FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path))
    assert process._free(other, [tmp_path]) == f"0 B are free on the disk of {FULL}"
    said = process._free(no_space(str(tmp_path / "no" / "events.db")), [FULL])
    assert re.fullmatch(rf"[\d.]+ [kMGT]?B are free on the disk of {tmp_path}", said)


def test_waiting_is_told_ever_more_rarely() -> None:
    told = [number for number in range(1, 1000) if process._is_told(number)]
    assert told == sorted({*(2**n for n in range(10)), *range(120, 1000, 120)})
