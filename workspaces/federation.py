"""The demo federation: `python -m workspaces.federation demo|up|console|down`.

It does what an operator does, with the same commands: provision, edit the local files, run each
participant's start.sh, submit a job from the console, read its tables, run stop.sh.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
OUT = Path(os.environ.get("FLP_DEMO_FOLDER", HERE / "federation")).resolve()
PROJECT = HERE / "heart" / "project.yml"
KITS = OUT / "heart" / "kits"
SITES = ("cleveland", "hungary", "switzerland", "va")
ADMIN = "amy@coordinator.org"
PROGRAMS = ("flplatform.entrypoints.server", "flplatform.entrypoints.client")
STOP_S = 40.0
KILL_S = 5.0


def main(arguments: Sequence[str]) -> int:
    """Carry out one of the verbs; return the exit status."""
    verbs = {"demo": demo, "up": up, "console": console, "down": down}
    if len(arguments) != 1 or arguments[0] not in verbs:
        print(f"usage: python -m workspaces.federation {'|'.join(verbs)}", file=sys.stderr)
        return 2
    return verbs[arguments[0]]()


def demo() -> int:
    """Everything, from no kit to a stopped federation."""
    begun = time.monotonic()
    if running():
        print("a federation is running; `make down` stops it", file=sys.stderr)
        return 1
    try:
        if code := up(quiet=True):
            return code
        say("submitting the heart-disease job, signed by its author")
        code = admin("submit_job workspaces/heart --wait", "show_metrics", "cross_val")
        say(isolation())
    finally:
        down()
    say(f"done in {time.monotonic() - begun:.0f} s; `make up` keeps one running to play with")
    return code


def up(quiet: bool = False) -> int:
    """Provision (afresh) and start all five; leave them running."""
    if running():
        print("a federation is running; `make down` stops it", file=sys.stderr)
        return 1
    shutil.rmtree(OUT, ignore_errors=True)
    say("provisioning a server, four hospitals and an admin")
    subprocess.run(
        [sys.executable, "-m", "provisioning.cli", "provision", PROJECT, "--out", OUT],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for site in SITES:
        path = HERE / "heart" / "data" / f"{site}.csv"
        text = f"datasets:\n  heart: {{path: {json.dumps(str(path))}, allow: [any]}}\n"
        (KITS / site / "local" / "datasets.yml").write_text(text)
        # The admin's organisation wrote the code: a hospital whose host offers no sandbox would
        # decline it. These four say yes beforehand, so that the demo runs on every machine.
        policy = "allow_foreign_code_unsandboxed: true\n"
        (KITS / site / "local" / "policy.yml").write_text(policy)
    say("starting them, each by its own start.sh")
    start(["server"])
    ready = json.loads((KITS / "server" / "state" / "ready.json").read_text())
    # The ports that it got are its own from now on: whoever restarts it finds it again.
    lines = [f"{kind}_address: 127.0.0.1:{ready[f'{kind}_port']}\n" for kind in ("fl", "admin")]
    (KITS / "server" / "local" / "overrides.yml").write_text("".join(lines))
    for name in (*SITES, ADMIN):
        port = ready["admin_port" if name == ADMIN else "fl_port"]
        (KITS / name / "local" / "overrides.yml").write_text(f'servers: ["localhost:{port}"]\n')
    start(SITES)
    if not quiet:
        passphrase = OUT / "heart" / "secrets" / f"{ADMIN}.txt"
        say(f"running; `make console` opens the console (passphrase in {passphrase})")
        say("try there: submit_job workspaces/heart, check_status all, cross_val")
        say("`make down` stops it")
    return 0


def running() -> list[psutil.Process]:
    """Return the demo's servers, sites and supervisors, whatever has become of their kits.

    A kit that was removed or provisioned anew knows nothing of what was started from it before:
    command lines do.
    """
    kits = f"{KITS}{os.sep}"
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or ()
        is_program = any(word in PROGRAMS for word in words)
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            word.startswith(kits) and (is_program or word.endswith("/startup/start.sh"))
            for word in words
        ):
            found.append(process)
    return found


def start(names: Sequence[str]) -> None:
    """Start participants at the same time, and wait until they serve."""
    env = {**os.environ, "FLP_PYTHON": sys.executable}
    command = ["bash", "startup/start.sh", "--background"]

    def one(name: str) -> None:
        subprocess.run(command, cwd=KITS / name, env=env, check=True, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(one, names))


def admin(*lines: str) -> int:
    """Run console commands, and return the console's exit status."""
    commands = [part for line in lines for part in ("-c", line)]
    command = console_command(*commands, "--yes")
    return subprocess.run(command, check=False, cwd=HERE.parent).returncode


def isolation() -> str:
    """Say under which isolation the hospitals ran the job's code."""
    command = console_command("--json", "-c", "sys_info client")
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=HERE.parent)
    rows = json.loads(done.stdout)["rows"]
    levels = Counter(str(row["cells"].get("isolation", "unknown")) for row in rows)
    found = ", ".join(f"{level} at {count} of {len(rows)} sites" for level, count in levels.items())
    return f"isolation of the job's code: {found}"


def console() -> int:
    """Open the console in place of this process, so that Ctrl-C is the console's alone."""
    command = console_command()
    os.chdir(HERE.parent)
    os.execv(command[0], command)


def console_command(*options: str) -> list[str]:
    """Return the command line of `fl_admin` with the demo's admin kit."""
    passphrase = OUT / "heart" / "secrets" / f"{ADMIN}.txt"
    base = [sys.executable, "-m", "flplatform.entrypoints.admin", str(KITS / ADMIN)]
    return [*base, "--password-file", str(passphrase), *options]


def down() -> int:
    """Stop what `up` started: sites first, so that they can say goodbye."""
    if not running():
        say("nothing is running")
        return 0

    def one(name: str) -> None:
        script = KITS / name / "startup" / "stop.sh"
        if script.exists():
            subprocess.run(["bash", script], check=False, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(len(SITES)) as pool:
        list(pool.map(one, SITES))
    one("server")
    left = end(running())
    for process in left:
        print(f"process {process.pid} does not end", file=sys.stderr)
    return 1 if left else 0


def end(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """End processes that stop.sh has not found; return those that do not."""
    if not processes:
        return []
    say(f"ending {len(processes)} processes whose kits were removed or made anew")
    pids = {process.pid for process in processes}
    for process in processes:
        # A supervisor passes the signal on; a second one would cut the program short.
        with suppress(psutil.NoSuchProcess):
            if process.ppid() not in pids:
                process.terminate()
    _, left = psutil.wait_procs(processes, timeout=STOP_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return list(psutil.wait_procs(left, timeout=KILL_S)[1])


def say(text: str) -> None:
    """Print a step."""
    print(f"── {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
