"""Commands of installed packages, on a real server, through a real console."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.scenarios.conftest import ADMIN, ROOT
from workspaces.running import Federation

pytestmark = pytest.mark.scenario

EXAMPLE = ROOT / "examples" / "round_timer"
EXIT_CONFIG = 78


def wheel_of(source: Path, folder: Path) -> Path:
    """Make the wheel that setuptools would make of modules and a pyproject.toml."""
    about = tomllib.loads((source / "pyproject.toml").read_text())
    project = about["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for module in about["tool"]["setuptools"]["py-modules"]:
            wheel.write(source / f"{module}.py", f"{module}.py")
        for name, text in {
            "METADATA": "Metadata-Version: 2.1\n"
            f"Name: {project['name']}\nVersion: {project['version']}\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n",
            "entry_points.txt": "\n".join(lines) + "\n",
            "RECORD": "",
        }.items():
            wheel.writestr(f"{stem}.dist-info/{name}", text)
    return path


def can_build() -> bool:
    try:
        return tuple(map(int, version("setuptools").split(".")[:2])) >= (77, 0)
    except PackageNotFoundError:
        return False


def install(source: Path, folder: Path) -> Path:
    """Install a package with pip, without network, into a folder of its own; return that."""
    copy = shutil.copytree(source, folder / "source")
    target = folder / "installed"
    what = [copy, "--no-build-isolation"] if can_build() else [wheel_of(copy, folder)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
            *("--no-deps", "--no-index", "--target", target, *what),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def offer(folder: Path, code: str) -> None:
    """Put the traces of an installed package `fl-broken 0.3` into a folder."""
    (folder / "broken.py").write_text(code)
    about = folder / "fl_broken-0.3.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fl-broken\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text(
        "[flplatform.command_modules]\nbroken = broken:Module\n"
    )


def test_the_example_passes_its_own_tests(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE],
        env=environment(install(EXAMPLE, tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_example_adds_a_command(federation, tmp_path, monkeypatch):
    installed = install(EXAMPLE, tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment(installed)["PYTHONPATH"])
    running = federation("site-1")
    running.local("server", "resources.yml", "reserve_bytes: 0\ncommand_modules: [round_timer]\n")
    running.start_all()
    assert "command module round_timer of flplatform-round-timer 0.1" in running.output("server")
    let_go = running.hold("site-1", 1)
    running.steps_job(rounds=3)
    assert running.ask("submit_job steps")["ok"]
    console = subprocess.Popen(
        [
            *(sys.executable, "-m", "flplatform.entrypoints.admin", running.kit(ADMIN)),
            *("--password-file", running.passphrase_file(), "-c", "round_times 1"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with console:
        assert console.stdout is not None
        assert console.stdout.readline().startswith("timing run 1 (steps) from round 1 on")
        let_go()
        shown = console.stdout.read()
    assert console.returncode == 0
    for number in (1, 2, 3):
        assert f"round {number}" in shown
    assert "round_times [RUN]" in running.console("help round_times").stdout
    refused = running.ask("round_times 1")
    assert refused["exit_code"] == 1
    assert "round_times is legal while a run is" in refused["errors"][0]["message"]


def test_what_is_not_listed_is_not_loaded(federation, tmp_path, monkeypatch):
    offer(tmp_path, "raise AssertionError('loaded')")
    monkeypatch.setenv("PYTHONPATH", environment(tmp_path)["PYTHONPATH"])
    running = federation("site-1")
    running.start("server")
    assert running.ask("round_times 1")["exit_code"] == 2


MODULE = """
from flplatform.hci import CommandSpec, NoArguments

async def handler(connection, args):
    pass

class Module:
    name = summary = "broken"

    def __init__(self, parts):
        pass

    def commands(self):
        return [CommandSpec("abort", "summary", NoArguments, handler, "view", False, ("abort",))]
"""

BROKEN = {
    "missing": ("", "'broken' is not installed"),
    "import": ("import nonesuch", "ModuleNotFoundError: No module named 'nonesuch'"),
    "taken": (MODULE, "command abort: the name abort is taken"),
}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    federation = Federation(tmp_path_factory.mktemp("extending"), {})
    resources = "reserve_bytes: 0\ncommand_modules: [broken]\n"
    federation.local("server", "resources.yml", resources)
    return federation.kit("server")


@pytest.mark.parametrize("case", BROKEN)
def test_a_listed_module_that_is_wrong_stops_the_start(kit, tmp_path, case):
    code, complaint = BROKEN[case]
    if case != "missing":
        offer(tmp_path, code)
    done = subprocess.run(
        [sys.executable, "-m", "flplatform.entrypoints.server", kit],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_CONFIG, done.stderr
    said = done.stderr.split("cannot start: ")[1]
    assert complaint in said
    assert ("local/resources.yml" if case == "missing" else "broken of fl-broken 0.3") in said
    assert "Traceback" not in done.stderr
