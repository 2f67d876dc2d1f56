import numpy as np
import pytest
import torch as th

from sb3_ppo_plus.env_states.generator_state import global_generator_states, set_global_generator_states


def test_positions_outside_pytorchs_generators_memory_are_refused():
    before = global_generator_states()
    for n_draws in (0, 1, 623, 624, 625, 1000):
        th.manual_seed(3)
        th.randint(0, 9, (n_draws,))
        states = global_generator_states()
        expected = th.rand(3)
        set_global_generator_states(states)
        assert th.equal(th.rand(3), expected)
    for left, position in ((624, 624), (2, 624), (0, 0), (1, 2**40), (-1, 5)):
        forged = states["torch"].numpy().copy()
        forged[8:12], forged[16:24] = (
            np.array(value).view(np.uint8) for value in (np.int32([left]), np.uint64([position]))
        )
        with pytest.raises(ValueError, match=f"left={left}, next={position}; allowed: together up to 625"):
            set_global_generator_states(before | {"torch": th.from_numpy(forged)})
    for wrong in (states["torch"][:20], states["torch"].float()):
        with pytest.raises(ValueError, match="a state of PyTorch's random generator has bytes, got"):
            set_global_generator_states(before | {"torch": wrong})
    set_global_generator_states(before)
