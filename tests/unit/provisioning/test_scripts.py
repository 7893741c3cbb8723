"""start.sh and stop.sh with a stand-in for the interpreter."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

TEMPLATES = Path(__file__).parents[3] / "provisioning" / "templates"
STAND_IN = """#!/usr/bin/env bash
[[ "$2" != -c ]] || exit 0
trap 'echo term >>"$KIT_LOG.term"; exit 0' TERM
env >"$KIT_LOG.env"
umask >>"$KIT_LOG.env"
echo "$$ $*" >>"$KIT_LOG"
count=$(wc -l <"$KIT_LOG")
{body}
"""
"""Logs its run once its trap is set, so whoever has read that may stop it."""
DEADLINE_S = 60.0
GAVE_UP, IN_USE = 79, 73
STOPPED = "stopped by a signal; the program was not running"
WAITING = "while :; do sleep 0.02; done"


class Kit:
    """A folder with the scripts and a program that does `body`."""

    def __init__(self, folder: Path, body: str, kind: str = "client") -> None:
        self.folder = folder / "kit of 'a' $HOME & \"b\""
        for part in ("startup", "local"):
            (self.folder / part).mkdir(parents=True)
        for name in ("start.sh", "stop.sh"):
            script = self.folder / "startup" / name
            script.write_bytes((TEMPLATES / name).read_bytes())
            script.chmod(0o700)
        (self.folder / "startup" / f"fed_{kind}.json").touch()
        self.python = folder / "stand in"
        self.python.write_text(STAND_IN.format(body=body))
        self.python.chmod(0o700)
        self.log = folder / "log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "FLP_PYTHON": str(self.python),
            "FLP_BACKOFF_MS": "1",
            "KIT_LOG": str(self.log),
        }

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.folder / "startup" / "start.sh", *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Who runs the tests in the background ignores it, and so would bash then.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        output, errors = process.communicate(timeout=DEADLINE_S)
        return process.returncode, output + errors

    def stop(self, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.folder / "startup" / "stop.sh"],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    def runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def await_runs(self, count: int) -> list[str]:
        wait_until(lambda: len(self.runs()) >= count)
        return self.runs()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def waits_for(pid: int) -> list[str]:
    """Return the names of the children of a process, if it does nothing meanwhile."""
    process = psutil.Process(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        names = [child.name() for child in process.children()]
        if process.status() == psutil.STATUS_SLEEPING:
            return names
    return []


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(tmp_path, WAITING)
    yield kit
    for line in kit.runs():
        pid = int(line.split()[0])
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["start.sh", "stop.sh", "fl_admin.sh"])
def test_scripts_are_bash_and_strict(name: str) -> None:
    text = (TEMPLATES / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail\n" in text
    assert "eval" not in text
    subprocess.run(["bash", "-n", TEMPLATES / name], check=True)


@pytest.mark.parametrize("kind", ["client", "server"])
def test_it_runs_the_module_of_its_kind_with_the_kit(tmp_path: Path, kind: str) -> None:
    kit = Kit(tmp_path, "exit 0", kind)
    code, output = kit.finish(kit.start())
    assert code == 0, output
    (run,) = kit.runs()
    assert run.split(" ", 1)[1] == f"-P -m flplatform.entrypoints.{kind} {kit.folder}"
    environment = (tmp_path / "log.env").read_text().splitlines()
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in environment
    assert "OPENBLAS_NUM_THREADS=1" in environment
    assert environment[-1] == "0077"


def test_it_gives_up_after_five_quick_crashes(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "exit 3")
    code, output = kit.finish(kit.start())
    assert code == GAVE_UP
    assert len(kit.runs()) == 5
    assert "starting again in 1 ms" in output
    assert "starting again in 8 ms" in output
    assert "gave up after 5 crashes within 600 s: exit code 3\n" in output


def test_what_it_says_may_find_no_room(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "((count < 3)) && exit 3; exit 0")
    command = 'exec "$0" >/dev/full 2>&1'
    done = subprocess.run(
        ["bash", "-c", command, kit.folder / "startup" / "start.sh"],
        env=kit.environment,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, len(kit.runs())) == (0, 3)


def test_a_number_that_found_no_room_is_not_needed_to_stop(waiting: Kit) -> None:
    process = waiting.start("--once")
    waiting.await_runs(1)
    os.truncate(waiting.folder / "daemon.pid", 0)
    assert waiting.stop().stdout == "stopped\n"
    assert waiting.finish(process)[0] == 0


def test_a_killed_program_counts_as_a_crash(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "kill -KILL $$")
    code, output = kit.finish(kit.start())
    assert (code, len(kit.runs())) == (GAVE_UP, 5)
    assert "exit code 137 (signal KILL)" in output


def test_giving_up_names_the_last_error_of_the_last_attempt(tmp_path: Path) -> None:
    line = "2026-01-01T00:00:00.000Z ERROR   attempt $count: no\\033[31m room"
    body = f'mkdir -p logs; ((count > 4)) || echo -e "{line}" >>logs/site.log; exit 1'
    kit = Kit(tmp_path, body)
    kit.environment["FLP_MAX_CRASHES"] = "4"
    code, output = kit.finish(kit.start())
    last = output.splitlines()[-1]
    assert code == GAVE_UP
    assert "gave up after 4 crashes" in last
    assert last.endswith("last error: 2026-01-01T00:00:00.000Z ERROR   attempt 4: no[31m room")
    kit.environment["FLP_MAX_CRASHES"] = "1"
    code, output = kit.finish(kit.start())  # this attempt logs nothing: an old line is not its own
    assert "last error" not in output
    assert (kit.start("--status").communicate(timeout=DEADLINE_S)[0]).startswith(
        "not running\nlast error: 2026-01-01T00:00:00.000Z ERROR   attempt 4"
    )


def test_73_is_not_tried_again(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "exit 73")
    code, output = kit.finish(kit.start())
    assert (code, len(kit.runs())) == (IN_USE, 1)
    assert "another process runs on this kit" in output


def test_a_kit_that_was_made_anew_is_not_gone_on_with(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "rm daemon.pid; touch daemon.pid; exit 3")
    code, output = kit.finish(kit.start())
    assert (code, len(kit.runs())) == (78, 1)
    assert "was moved, removed or made anew" in output


def test_status(tmp_path: Path) -> None:
    kit = Kit(tmp_path, f"mkdir -p state; {WAITING}")
    assert kit.finish(kit.start("--status")) == (3, "not running\n")
    process = kit.start()
    (run,) = kit.await_runs(1)
    code, output = kit.finish(kit.start("--status"))
    assert (code, "not ready" in output, str(process.pid) in output) == (4, True, True)
    (kit.folder / "logs").mkdir()
    (kit.folder / "logs" / "site.log").write_text("2026 ERROR   cannot start yet\n")
    code, output = kit.finish(kit.start("--status"))
    assert output.endswith("not ready\nlast error: 2026 ERROR   cannot start yet\n")
    (kit.folder / "state").mkdir(exist_ok=True)
    (kit.folder / "state" / "ready.json").write_text('{"pid": 7, "fl_port": 8002}')
    code, output = kit.finish(kit.start("--status"))
    assert code == 0
    assert output.splitlines()[1].startswith("serves since 20")
    assert output.splitlines()[1].endswith("UTC: pid: 7, fl_port: 8002")
    assert kit.stop().stdout == "stopped\n"
    kit.finish(process)
    assert kit.finish(kit.start("--status"))[0] == 3
    assert not alive(int(run.split()[0]))


def test_a_program_that_has_crashed_does_not_serve(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "mkdir -p state; touch state/ready.json; exit 1")
    kit.environment["FLP_BACKOFF_MS"] = "60000"
    process = kit.start()
    wait_until(lambda: "starting again" in line_of(process))
    code, output = kit.finish(kit.start("--status"))
    assert (code, "not ready" in output) == (4, True)
    kit.stop()
    kit.finish(process)


def test_status_says_that_it_pauses_and_why(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "kill -KILL $$")
    kit.environment["FLP_BACKOFF_MS"] = "600000"
    process = kit.start()
    wait_until(lambda: waits_for(process.pid) == ["sleep"])
    pause = r"pauses after crash 1 of 5: exit code 137 \(signal KILL\); starts again at 20.* UTC"
    code, output = kit.finish(kit.start("--status"))
    assert code == 4
    assert re.fullmatch(f"processes: {process.pid}\nnot ready: {pause}\n", output)
    code, output = kit.finish(kit.start("--background"))
    assert code == IN_USE
    assert re.fullmatch(
        f"start.sh: already running: {process.pid}; {pause}\n", without_root(output)
    )
    assert kit.stop().stdout == "stopped\n"
    code, output = kit.finish(process)
    assert (code, output.splitlines()[-1]) == (0, f"start.sh: {STOPPED}")


def without_root(output: str) -> str:
    lines = output.splitlines(keepends=True)
    return "".join(line for line in lines if "runs as root" not in line)


def test_status_says_that_a_restart_was_asked_for(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "exit 75")
    kit.environment["FLP_BACKOFF_MS"] = "600000"
    process = kit.start()
    wait_until(lambda: waits_for(process.pid) == ["sleep"])
    assert (
        "not ready: pauses after a restart that was asked for; starts"
        in (kit.finish(kit.start("--status"))[1])
    )
    kit.stop()
    kit.finish(process)


def test_a_pause_ends_with_the_next_start(tmp_path: Path) -> None:
    kit = Kit(tmp_path, f"((count > 1)) || exit 3; {WAITING}")
    process = kit.start()
    pid = kit.await_runs(2)[1].split()[0]
    pids = kit.folder / "daemon.pid"
    wait_until(lambda: pids.read_text() == f"{process.pid}\n{pid}\n")
    kit.stop()
    kit.finish(process)


def test_what_was_stopped_in_a_pause_does_not_promise_to_start_again(tmp_path: Path) -> None:
    body = "mkdir -p state; : >state/ready.json; while [[ ! -e go ]]; do sleep 0.02; done; exit 3"
    kit = Kit(tmp_path, body)
    kit.environment["FLP_BACKOFF_MS"] = "600000"
    assert kit.finish(kit.start("--background"))[0] == 0
    (kit.folder / "go").touch()
    console = kit.folder / "logs" / "console.log"
    wait_until(lambda: "starting again in 600000 ms" in console.read_text())
    assert kit.stop().stdout == "stopped\n"
    code, output = kit.finish(kit.start("--status"))
    said = f"not running\nlast error: start.sh: exit code 3\nstart.sh: {STOPPED}\n"
    assert (code, output) == (3, said)


WARNING = "2026 WARNING get tasks: try 12 failed: no connection\n"


@pytest.mark.parametrize(
    ("console", "told"),
    [
        (WARNING * 2, ""),
        (f"2026 ERROR   odd\n{WARNING}", "2026 ERROR   odd"),
        (f"start.sh: exit code 1; starting again in 4000 ms\n{WARNING}", "start.sh: exit code 1"),
        ("ImportError: no x\nstart.sh: gave up\n", "ImportError: no x\nstart.sh: gave up"),
        (
            "2026 ERROR   cannot start yet: full; it tries again by itself until this\n",
            "2026 ERROR   cannot start yet: full",
        ),
        (
            "start.sh: cannot start yet: No space left; it goes on by itself once there is\n",
            "start.sh: cannot start yet: No space left",
        ),
    ],
    ids=["warnings", "error", "crash", "import", "program waits", "script waits"],
)
def test_only_errors_are_told_of_what_does_not_run(tmp_path: Path, console: str, told: str) -> None:
    kit = Kit(tmp_path, "exit 0")
    (kit.folder / "logs").mkdir()
    (kit.folder / "logs" / "console.log").write_text(console)
    said = f"last error: {told}\n" if told else ""
    assert kit.finish(kit.start("--status")) == (3, f"not running\n{said}")


def test_what_kept_it_from_being_ready_has_passed_once_it_is(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "exit 0")
    log = kit.folder / "logs" / "site.log"
    log.parent.mkdir()
    log.write_text("2026 ERROR   cannot start yet\n2026 INFO    ready: fl_port 1\n")
    assert kit.finish(kit.start("--status")) == (3, "not running\n")
    log.write_text(log.read_text() + "2026 ERROR   no room for what starts\n")
    told = "last error: 2026 ERROR   no room for what starts\n"
    assert kit.finish(kit.start("--status")) == (3, f"not running\n{told}")


def test_a_sudden_end_is_told_where_nothing_else_tells_of_it(waiting: Kit) -> None:
    process = waiting.start()
    (run,) = waiting.await_runs(1)
    (waiting.folder / "state").mkdir()
    (waiting.folder / "state" / "ready.json").write_text("{}")
    process.kill()
    os.kill(int(run.split()[0]), signal.SIGKILL)
    wait_until(lambda: not alive(int(run.split()[0])))
    process.communicate()
    told = "it ended without warning: killed, or the machine went down\n"
    assert waiting.finish(waiting.start("--status")) == (3, f"not running\n{told}")


def test_status_looks_at_the_disk_that_has_least(waiting: Kit) -> None:
    (waiting.folder / "state").symlink_to("/proc")  # a file system that has no byte free
    process = waiting.start()
    waiting.await_runs(1)
    output = waiting.finish(waiting.start("--status"))[1]
    assert f"last error: 0 KiB are free on the disk of {waiting.folder}/state\n" in output
    waiting.stop()
    waiting.finish(process)


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def test_status_tells_that_nobody_would_start_it_again(waiting: Kit) -> None:
    process = waiting.start()
    waiting.await_runs(1)
    wait_until(lambda: len((waiting.folder / "daemon.pid").read_text().split()) == 2)
    assert "supervised" not in waiting.finish(waiting.start("--status"))[1]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # nobody reaps it
    code, output = waiting.finish(waiting.start("--status"))
    assert f"processes: {waiting.runs()[0].split()[0]}\n" in output, "not that of a zombie"
    assert "not supervised: start.sh was ended" in output
    waiting.stop()
    process.communicate(timeout=DEADLINE_S)


def test_status_names_the_end_and_no_error_of_an_earlier_process(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "echo 'cannot start: the certificate has expired' >&2; exit 78")
    log = kit.folder / "logs" / "site.log"
    log.parent.mkdir()
    log.write_text("2026 ERROR   of before\n2026 INFO    site-1 of project test starts\n")
    assert kit.finish(kit.start("--status")) == (3, "not running\n")
    os.utime(log, (1, 1))
    kit.finish(kit.start("--background"))
    output = kit.finish(kit.start("--status"))[1]
    assert "last error: cannot start: the certificate has expired" in output
    assert kit.finish(kit.start("--background"))[0] == 78
    assert "has expired" in (log.parent / "console.log.1").read_text()


def test_crashes_after_a_good_while_do_not_add_up(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "((count < 9)) && exit 3; exit 0")
    kit.environment["FLP_CRASH_WINDOW_S"] = "0"
    code, output = kit.finish(kit.start())
    assert (code, len(kit.runs())) == (0, 9), output
    assert "in 2 ms" not in output


def test_75_asks_for_a_restart_however_often(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "((count < 8)) && exit 75; exit 0")
    code, output = kit.finish(kit.start())
    assert (code, len(kit.runs())) == (0, 8), output


def test_78_is_not_tried_again(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "echo 'the kit is refused' >&2; exit 78")
    code, output = kit.finish(kit.start())
    assert (code, len(kit.runs())) == (78, 1)
    assert "the kit is refused" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_the_end_awaited(waiting: Kit, number: int) -> None:
    process = waiting.start()
    (run,) = waiting.await_runs(1)
    process.send_signal(number)
    code, output = waiting.finish(process)
    assert code == 0, output
    assert (waiting.log.parent / "log.term").read_text() == "term\n"
    assert not alive(int(run.split()[0]))


def test_a_signal_ends_the_back_off(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "exit 3")
    kit.environment["FLP_BACKOFF_MS"] = "600000"
    process = kit.start()
    wait_until(lambda: waits_for(process.pid) == ["sleep"])
    process.send_signal(signal.SIGTERM)
    kit.finish(process)  # within a tenth of the back-off
    assert len(kit.runs()) == 1


def test_only_one_instance(waiting: Kit) -> None:
    process = waiting.start()
    waiting.await_runs(1)
    code, output = waiting.finish(waiting.start())
    assert code == IN_USE
    assert f"already running: {process.pid}" in output
    process.terminate()
    waiting.finish(process)
    assert len(waiting.runs()) == 1


def test_stop_stops_and_then_says_so(waiting: Kit) -> None:
    process = waiting.start()
    waiting.await_runs(1)
    assert waiting.stop().stdout == "stopped\n"
    assert waiting.finish(process)[0] == 0
    assert waiting.stop().stdout == "not running\n"


def test_an_orphaned_program_keeps_its_lock_and_can_be_stopped(waiting: Kit) -> None:
    process = waiting.start()
    (run,) = waiting.await_runs(1)
    numbers = f"{process.pid}\n{run.split()[0]}\n"
    wait_until(lambda: (waiting.folder / "daemon.pid").read_text() == numbers)
    process.kill()
    process.wait()
    code, output = waiting.finish(waiting.start())
    assert (code, "already running" in output) == (IN_USE, True)
    assert waiting.stop().stdout == "stopped\n"
    assert not alive(int(run.split()[0]))
    process.communicate()


def test_stop_kills_what_does_not_end(tmp_path: Path) -> None:
    body = "trap '' TERM; : >\"$KIT_LOG.deaf\"; for _ in {1..600}; do sleep 0.05; done"
    kit = Kit(tmp_path, body)
    process = kit.start()
    (run,) = kit.await_runs(1)
    wait_until((tmp_path / "log.deaf").exists)
    result = kit.stop(FLP_STOP_S="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"stopped, killed after 1 s: processes {process.pid} " in result.stdout
    assert not alive(int(run.split()[0]))
    assert kit.finish(process)[0] == -signal.SIGKILL
    assert kit.stop().stdout == "not running\n"


def test_stop_leaves_a_stranger_alone_whose_number_is_in_the_file(waiting: Kit) -> None:
    process = waiting.start()
    (run,) = waiting.await_runs(1)
    stranger = subprocess.Popen(["sleep", "60"], cwd=waiting.folder)
    try:
        pids = waiting.folder / "daemon.pid"
        pids.write_text(f"{stranger.pid}\n{pids.read_text()}")
        assert waiting.stop().stdout == "stopped\n"
        assert stranger.poll() is None
        assert not alive(int(run.split()[0]))
        waiting.finish(process)
    finally:
        stranger.kill()
        stranger.wait()


def test_once_becomes_the_program(waiting: Kit) -> None:
    process = waiting.start("--once")
    (run,) = waiting.await_runs(1)
    assert int(run.split()[0]) == process.pid
    code, output = waiting.finish(waiting.start())
    assert (code, "already running" in output) == (IN_USE, True)
    assert waiting.stop().stdout == "stopped\n"
    assert waiting.finish(process)[0] == 0


def test_background_detaches_once_it_serves(tmp_path: Path) -> None:
    kit = Kit(tmp_path, f"mkdir -p state; sleep 0.3; : > state/ready.json; {WAITING}")
    code, output = kit.finish(kit.start("--background"))
    assert code == 0
    assert "started in the background" in output
    assert (kit.folder / "state" / "ready.json").exists()
    assert (kit.folder / "logs" / "console.log").exists()
    assert kit.stop().stdout == "stopped\n"


def test_background_says_when_nothing_serves(waiting: Kit) -> None:
    waiting.environment["FLP_READY_S"] = "1"
    code, output = waiting.finish(waiting.start("--background"))
    assert code == 1
    assert "not ready after 1 s" in output
    assert waiting.stop().stdout == "stopped\n"


def test_background_reports_an_early_end(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "echo 'the kit is refused' >&2; exit 78")
    code, output = kit.finish(kit.start("--background"))
    assert code == 78
    assert "it stopped at once" in output
    assert "the kit is refused" in output


def test_the_interpreter_is_found_in_local_python(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "exit 0")
    del kit.environment["FLP_PYTHON"]
    (kit.folder / "local" / "python").write_text(f"{kit.python}\n")
    assert kit.finish(kit.start())[0] == 0
    assert len(kit.runs()) == 1


@pytest.mark.parametrize(
    ("python", "message"),
    [("/nowhere/python", "there is no interpreter"), ("/bin/false", "has no flplatform")],
)
def test_a_wrong_interpreter_is_named(tmp_path: Path, python: str, message: str) -> None:
    kit = Kit(tmp_path, "exit 0")
    kit.environment["FLP_PYTHON"] = python
    code, output = kit.finish(kit.start())
    assert code == 78
    assert message in output


def test_wrong_words_and_wrong_kits(tmp_path: Path) -> None:
    kit = Kit(tmp_path, "exit 0")
    assert kit.finish(kit.start("--daemon"))[0] == 2
    (kit.folder / "startup" / "fed_client.json").unlink()
    code, output = kit.finish(kit.start())
    assert code == 78
    assert "is not the kit of a server or a site" in output
