"""The simulation finds faults: each way of breaking the program is noticed."""

import pytest

from tests.simulation.mutations import MOST_SEEDS, MUTATIONS
from tests.simulation.test_simulation import simulate


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_program_is_noticed(name: str) -> None:
    found = simulate("--mutation", name, "--seeds", f"0:{MOST_SEEDS}", "--no-shrinking")
    assert found.returncode == 1, f"nothing was noticed\n{found.stdout}{found.stderr}"
    assert "replay: python -m tests.simulation --seed" in found.stdout, found.stderr
