"""What a TensorVecEnv must not return, and what happens then."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tensor_walks import N_ENVS, SETTINGS, TensorWalk

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.errors import NonFiniteError


class Odd(TensorWalk):
    """A walk whose third step differs.

    :param changes: called with the step; returns what the environment returns in its place
    """

    def __init__(self, changes, **arguments):
        super().__init__(**arguments)
        self.changes, self.n_steps = changes, 0

    def step_tensor(self, actions):
        step = super().step_tensor(actions)
        self.n_steps += 1
        return self.changes(step) if self.n_steps == 3 else step


def of_nobody(step):
    return step._replace(terminated=None, truncated=th.ones(N_ENVS, dtype=th.bool), final_observations=None)


DICT = {"observation_space": spaces.Dict({"near": spaces.Box(-9, 9, (2,)), "sign": spaces.Discrete(2)})}
ODD_STEPS = {
    "rewards of another shape": (lambda s: s._replace(rewards=s.rewards[:, None]), r"rewards .*\(3,\), got \(3, 1\)"),
    "integer rewards": (lambda s: s._replace(rewards=s.rewards.long()), "rewards must be floats, got torch.int64"),
    "arrays": (lambda s: s._replace(rewards=s.rewards.numpy()), "rewards must be a tensor, got ndarray"),
    "too few observations": (lambda s: s._replace(observations=s.observations[:2]), r"observations .*\(2, 2\)"),
    "numbers as flags": (lambda s: s._replace(terminated=s.terminated.long()), "terminated must be torch.bool"),
    "two flags too few": (lambda s: s._replace(truncated=s.truncated[:1]), r"truncated .* \(3,\), got \(1,\)"),
    "neither flag": (lambda s: s._replace(terminated=None, truncated=None), "terminated or truncated, both are None"),
    "final ones of a wrong shape": (
        lambda s: s._replace(final_observations=s.final_observations[0]),
        r"final_observations .*\(3, 2\), got \(2,\)",
    ),
    "another device": (
        lambda s: s._replace(rewards=s.rewards.to("meta")),
        "rewards must be on the environment's device cpu, got meta",
    ),
    "no final ones": (of_nobody, "has truncated an episode, and final_observations is None"),
}


@pytest.mark.parametrize("name", ODD_STEPS)
def test_an_odd_step_is_an_error_before_the_buffer_has_it(name):
    changes, message = ODD_STEPS[name]
    model = PPOPlus("MlpPolicy", Odd(changes), **SETTINGS)
    with pytest.raises((ValueError, TypeError), match=f"<Odd>: .*{message}"):
        model.learn(32)
    assert model.rollout_buffer.pos == 2


def test_a_missing_key_is_named():
    def without_sign(step):
        return step._replace(observations={"near": step.observations["near"]})

    with pytest.raises(ValueError, match=r"keys \['near', 'sign'\], got \['near'\]"):
        PPOPlus("MultiInputPolicy", Odd(without_sign, **DICT), **SETTINGS).learn(32)


@pytest.mark.parametrize("name", ["rewards", "observations"])
def test_a_nan_is_refused_at_its_step(name):
    def with_nan(step):
        tensor = getattr(step, name).clone()
        tensor[1] = th.nan
        return step._replace(**{name: tensor})

    with pytest.raises(NonFiniteError, match=rf"{name.rstrip('s')} of env 1 at step 2"):
        PPOPlus("MlpPolicy", Odd(with_nan), **SETTINGS).learn(32)


def test_a_nan_among_final_observations_counts_where_its_value_does():
    def with_nan(step):
        final = step.final_observations.clone()
        final[1:] = th.nan
        truncated = th.tensor([False, True, False])
        return step._replace(final_observations=final, truncated=truncated, terminated=~truncated)

    with pytest.raises(NonFiniteError, match="terminal observation of env 1 at step 2"):
        PPOPlus("MlpPolicy", Odd(with_nan), **SETTINGS).learn(32)


def test_a_reset_is_checked():
    class OddReset(TensorWalk):
        def reset_tensor(self):
            return super().reset_tensor()[:1]

    with pytest.raises(ValueError, match=r"<OddReset>: observations must have the shape \(3, 2\), got \(1, 2\)"):
        PPOPlus("MlpPolicy", OddReset(), **SETTINGS).learn(32)


@pytest.mark.parametrize(
    "arguments",
    [
        {"action_space": spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2,))])},
        {"observation_space": spaces.Tuple([spaces.Discrete(2)])},
        {"observation_space": spaces.Dict({"text": spaces.Text(5)})},
    ],
)
def test_spaces_that_it_does_not_take_are_named(arguments):
    with pytest.raises(ValueError, match=f"TensorWalk: {next(iter(arguments))}.* must be Box, Discrete"):
        TensorWalk(**arguments)


def test_one_flag_is_enough():
    class OnlyTerminates(TensorWalk):
        def step_tensor(self, actions):
            step = super().step_tensor(actions)
            return step._replace(terminated=step.terminated | step.truncated, truncated=None, final_observations=None)

    model = PPOPlus("MlpPolicy", OnlyTerminates(), **SETTINGS).learn(100)
    assert len(model.ep_info_buffer) > 5
    assert np.isfinite(model.rollout_buffer.rewards).all()
