"""Counts of episodes in a checkpoint are checked, whatever they are."""

import pytest

from sb3_ppo_plus.envs.batches import checked_counts

NAMES = ("returns", "lengths", "seconds")
GOOD = {"returns": [0.5, 1.0], "lengths": [3, 4], "seconds": 2.5}


def test_counts_of_so_many_environments_are_taken():
    counts = checked_counts("the environments", GOOD, 2, NAMES)
    assert {name: array.tolist() for name, array in counts.items()} == GOOD


@pytest.mark.parametrize(
    "counts",
    [
        [],
        None,
        {},
        {**GOOD, "returns": [0.5]},
        {**GOOD, "returns": ["a", "b"]},
        {**GOOD, "lengths": [3.0, 4.0]},
        {**GOOD, "seconds": "2.5"},
        {**GOOD, "seconds": [2.5]},
        {**GOOD, "lengths": [[3], [4, 5]]},
    ],
)
def test_others_are_an_error(counts):
    with pytest.raises(ValueError, match=r"have no|inhomogeneous"):
        checked_counts("the environments", counts, 2, NAMES)
