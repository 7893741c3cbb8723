"""Tests that are left out count as failures in CI, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import pytest
pytest_plugins = ["tests.strictness"]
{module}
def test_runs(): pass
def test_skips(): pytest.skip("no such thing here")
@pytest.mark.may_skip
def test_may_skip(): pytest.skip("is run by another set")
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


def played(folder: Path, ci: str, module: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(TESTS.format(module=module))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = may_skip: x\nxfail_strict = true\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.strictness", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(("ci", "code", "counts"), [
    ("", 0, "1 passed, 2 skipped, 1 xfailed"),
    ("true", 1, "1 failed, 1 passed, 1 skipped, 1 xfailed"),
])  # fmt: skip
def test_a_skip_fails_in_ci(tmp_path: Path, ci: str, code: int, counts: str) -> None:
    found = played(tmp_path, ci)
    assert (found.returncode, counts in found.stdout) == (code, True), found.stdout
    if ci:
        assert "skipped where nothing may be left out" in found.stdout
        assert "no such thing here" in found.stdout


@pytest.mark.parametrize(("ci", "code"), [("", 5), ("true", 2)])
def test_a_module_that_skips_fails_in_ci(tmp_path: Path, ci: str, code: int) -> None:
    found = played(tmp_path, ci, 'pytest.importorskip("no_such_package")')
    assert found.returncode == code, found.stdout
