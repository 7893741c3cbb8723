"""A failed sync ends a process that serves, and is an error to everybody else."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import errno, os, sys
from pathlib import Path
from flplatform.files.durable import end_on_failed_sync, write_atomic

def refuse(handle):
    raise OSError(int(sys.argv[2]), "refused")

os.fsync = refuse
if sys.argv[3] == "serves":
    end_on_failed_sync()
try:
    write_atomic(Path(sys.argv[1]), b"x")
except OSError as error:
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("number", "kind", "code"), [(5, "serves", 70), (28, "serves", 3), (5, "is a tool", 3)]
)
def test_a_failed_sync(tmp_path: Path, number: int, kind: str, code: int) -> None:
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(number), kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert not path.exists()
    assert ("cannot be made durable" in done.stderr) == (code == 70)
    if code == 70:
        assert ".tmp-" in done.stderr, "it names the file"
