"""The simulation finds faults: each way of breaking the program is noticed."""

from tests.simulation.test_simulation import simulate


def test_a_broken_program_is_noticed() -> None:
    found = simulate("--mutations")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "train again after a restart: seed" in found.stdout


def test_a_broken_program_comes_with_a_story() -> None:
    found = simulate("--mutation", "leave out an update", "--seeds", "0:20", "--jobs", "2")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "faults are enough" in found.stdout
    assert "replay: python -m tests.simulation --seed" in found.stdout
