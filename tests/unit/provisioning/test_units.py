"""The systemd units: what they say fits the program; systemd itself is asked where it is."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from flplatform.entrypoints import process

TEMPLATES = Path(__file__).parents[3] / "provisioning" / "templates"
KINDS = ("server", "site")
MAKES_NAMESPACES = (
    "RestrictNamespaces", "SystemCallFilter", "ProtectKernelTunables", "ProtectKernelLogs",
    "ProtectProc", "ProcSubset", "PrivateDevices", "MemoryDenyWriteExecute",
)  # fmt: skip


def rendered(kind: str, kit: Path) -> str:
    """The unit as its own comment says to make it."""
    text = (TEMPLATES / f"{kind}.service").read_text()
    for word, value in (("@KIT@", str(kit)), ("@USER@", "root")):
        assert word in text
        text = text.replace(word, value)
    return text


def parsed(kind: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(rendered(kind, Path("/srv/kit")))
    return parser


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_knows_the_exit_codes(kind: str) -> None:
    unit = parsed(kind)
    service = unit["Service"]
    assert service["Type"] == "exec"
    assert service["ExecStart"] == '"/srv/kit/startup/start.sh" --once'
    assert service["Restart"] == "on-failure"
    assert service["RestartForceExitStatus"] == str(process.EXIT_RESTART)
    prevented = f"{process.EXIT_IN_USE} {process.EXIT_CONFIG}"
    assert service["RestartPreventExitStatus"] == prevented
    assert int(service["TimeoutStopSec"]) > process.DRAIN_S
    assert int(unit["Unit"]["StartLimitBurst"]) == 5
    assert int(unit["Unit"]["StartLimitIntervalSec"]) == 600
    assert "WatchdogSec" not in service  # nobody sends sd_notify


def test_a_site_may_make_its_sandbox() -> None:
    service = parsed("site")["Service"]
    assert not [key for key in MAKES_NAMESPACES if key in service]
    assert service["OOMPolicy"] == "continue"
    assert parsed("server")["Service"]["RestrictNamespaces"] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_systemd_accepts_a_unit(kind: str, tmp_path: Path) -> None:
    kit = tmp_path / "kit with spaces"
    (kit / "startup").mkdir(parents=True)
    shutil.copy(TEMPLATES / "start.sh", kit / "startup" / "start.sh")
    (kit / "startup" / "start.sh").chmod(0o755)
    unit = tmp_path / f"flplatform-{kind}.service"
    unit.write_text(rendered(kind, kit))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
