"""A short chain of random kills; kill_chain.py makes long ones."""

import kill_chain
import pytest


@pytest.mark.heavy
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_that_is_not():
    names = ("mlp", "vec_normalize", "lstm")
    chains = kill_chain.main(18, names=names)
    assert [(chain.n_kills, chain.has_same_bits) for chain in chains] == [(6, True)] * len(names)
