"""`down` ends what `up` started, whatever has become of the kits meanwhile."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.unit.provisioning.test_scripts import DEADLINE_S, STAND_IN, TEMPLATES, WAITING
from workspaces import federation

SUPERVISORS: "list[subprocess.Popen[bytes]]" = []


@pytest.fixture
def kits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Kits of a server and a site, whose programs wait to be stopped."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(body=WAITING))
    python.chmod(0o700)
    monkeypatch.setenv("KIT_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(federation, "KITS", tmp_path / "kits")
    monkeypatch.setattr(federation, "SITES", ("site",))
    provision(tmp_path / "kits")
    yield tmp_path / "kits"
    for process in federation.running():
        process.kill()
    while SUPERVISORS:
        SUPERVISORS.pop().wait(timeout=DEADLINE_S)


def provision(kits: Path) -> None:
    for name, kind in (("server", "server"), ("site", "client")):
        for part in ("startup", "local"):
            (kits / name / part).mkdir(parents=True)
        (kits / name / "startup" / f"fed_{kind}.json").touch()
        (kits / name / "local" / "python").write_text(f"{kits.parent / 'python'}\n")
        for script in ("start.sh", "stop.sh"):
            shutil.copy(TEMPLATES / script, kits / name / "startup" / script)
            (kits / name / "startup" / script).chmod(0o700)


def started(kits: Path) -> list[psutil.Process]:
    """Start all; return supervisors and programs."""
    for name in ("server", "site"):
        SUPERVISORS.append(
            subprocess.Popen(
                [kits / name / "startup" / "start.sh"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
    until = time.monotonic() + DEADLINE_S
    while not settled(found := federation.running(), kits):
        assert time.monotonic() < until, f"only {found} run"
        time.sleep(0.01)
    return found


def settled(found: list[psutil.Process], kits: Path) -> bool:
    """Tell whether the programs have set their traps, and their supervisors wait for them."""
    log = kits.parent / "log"
    if len(found) != 4 or not log.exists() or len(log.read_text().splitlines()) != 2:
        return False
    return all(
        len((kits / name / "daemon.pid").read_text().splitlines()) == 2
        for name in ("server", "site")
    ) and all(
        len(psutil.Process(supervisor.pid).children()) == 1
        and psutil.Process(supervisor.pid).status() == psutil.STATUS_SLEEPING
        for supervisor in SUPERVISORS
    )


def test_down_stops_supervisors_and_programs(kits: Path) -> None:
    assert federation.down() == 0
    started(kits)
    assert federation.down() == 0
    assert not federation.running()
    assert [supervisor.wait(timeout=DEADLINE_S) for supervisor in SUPERVISORS] == [0, 0]


def test_down_ends_what_runs_from_kits_that_were_made_anew(
    kits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started(kits)
    shutil.rmtree(kits)
    provision(kits)
    assert federation.up() == 1  # nothing is provisioned over what runs
    assert federation.down() == 0
    assert "ending 4 processes" in capsys.readouterr().out
    assert not federation.running()
