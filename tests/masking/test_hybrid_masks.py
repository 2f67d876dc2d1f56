"""Masks of Tuple and Dict actions."""

import gymnasium as gym
import numpy as np
import pytest
from environments import ASYMMETRIC
from gymnasium import spaces
from hybrid_cases import HybridToy, MaskedHybridToy, build, make_env
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv


@pytest.mark.parametrize("as_structure", [False, True], ids=["one array", "structures"])
@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_masks_are_obeyed_at_each_step(as_structure, vec_env_cls):
    # MaskedHybridToy refuses masked choices
    env = make_env(3, MaskedHybridToy, as_structure=as_structure, vec_env_cls=vec_env_cls)
    model = build(env, batch_size=32).learn(3 * 96)
    masks = model.rollout_buffer.context["action_masks"]
    assert masks.shape == (32, 3, 3 + 4 + 11) and not masks.all() and model.needs_masks
    evaluate_policy(model.masked(env), env, 5, deterministic=False)
    actions, _ = model.predict(env.reset(), action_masks=env.env_method("action_masks"))
    env.step(actions)
    env.close()


def test_masks_of_one_environment_may_have_its_structure():
    env = MaskedHybridToy(as_structure=True)
    model = build(make_env(2, MaskedHybridToy, as_structure=True)).learn(64)
    observation, _ = env.reset(seed=0)
    for _ in range(50):
        action, _ = model.predict(observation, action_masks=env.action_masks())
        observation, *_ = env.step(action)
    observation, _ = env.reset()
    action, _ = model.masked(env).predict(observation)
    env.step(action)


def test_masks_may_be_among_the_observations():
    class InObservation(MaskedHybridToy):
        def __init__(self):
            super().__init__(spaces.Tuple((spaces.Discrete(4), ASYMMETRIC)))
            space = {"vector": self.observation_space, "action_mask": spaces.MultiBinary(4)}
            self.seen_space = spaces.Dict(space)

        def _seen(self, observation):
            return {"vector": observation, "action_mask": np.concatenate(self.masks).astype(np.int8)}

    class Seen(gym.ObservationWrapper):
        def __init__(self):
            super().__init__(InObservation())
            self.observation_space = self.env.seen_space

        def observation(self, observation):
            return self.env._seen(observation)

        def get_wrapper_attr(self, name):
            if name == "action_masks":
                raise AttributeError(name)
            return super().get_wrapper_attr(name)

    env = make_vec_env(Seen, 2, seed=0)
    model = build(env, policy="MultiInputPolicy", action_masking=True).learn(256)
    evaluate_policy(model, env, 5, deterministic=False)


def test_eval_callback_predicts_with_the_masks_of_its_environment():
    callback = EvalCallback(make_env(1, MaskedHybridToy, as_structure=True), eval_freq=16, verbose=0)
    build(make_env(2, MaskedHybridToy)).learn(64, callback)
    assert np.isfinite(callback.last_mean_reward)


class WrongMask(HybridToy):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def action_masks(self):
        return self.mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"kind": np.ones(2)}, "part 'kind' must have 3 elements"),
        ({"slots": {"which": np.ones(12)}}, "part 'slots.which' must have 11 elements"),
        ({"arguments": (np.ones(2), None)}, "part 'arguments.0' must be None"),
        ({"kind": np.zeros(3)}, "no valid choice of part 'kind'"),
        (np.ones(19), "part 'kind', part 'slots.flags'"),
    ],
)
def test_a_mask_that_does_not_fit_names_the_part(mask, message):
    with pytest.raises(ValueError, match=message):
        build(make_env(2, WrongMask, mask=mask)).learn(64)


def test_masks_are_required_only_where_a_part_can_be_masked():
    with pytest.raises(ValueError, match="action_masking=True needs"):
        build(make_env(action_space=spaces.Tuple((ASYMMETRIC,))), action_masking=True)
