"""A process that fails ends all the others, at whatever collective. ``faults.py`` tries them all."""

import faults
import pytest


@pytest.mark.parametrize(("distributed", "n_ranks"), [(True, 2), ("exact", 2), (True, 3)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "kill" else pytest.mark.heavy) for name in faults.FAULTS]
)
def test_a_fault_at_a_collective_ends_all(name, distributed, n_ranks, tmp_path):
    # Another one for each kind of fault
    first = list(faults.FAULTS).index(name)
    cases = faults.cases_of(n_ranks, distributed, tmp_path / "whole", 1)
    for at, faulty in cases[first :: len(cases) // 2]:
        wrong, _ = faults.outcome_of(name, n_ranks, distributed, tmp_path / f"{at}_{faulty}", at, faulty)
        assert wrong is None, f"collective {at}, rank {faulty}: {wrong}"
