"""All programs under one name."""

import subprocess
import sys

import pytest

from flplatform.entrypoints.programs import PROGRAMS


def flplatform(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flplatform.entrypoints.programs", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_is_the_program_that_is_named(program: str) -> None:
    done = flplatform(program, "--help")
    assert done.returncode == 0, done.stderr
    assert f"fl_{program}" in done.stdout


@pytest.mark.parametrize(("words", "code"), [((), 2), (("stat",), 2), (("--help",), 0)])
def test_any_other_word_names_them(words: tuple[str, ...], code: int) -> None:
    done = flplatform(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == "usage: flplatform server|client|admin|state …\n"
