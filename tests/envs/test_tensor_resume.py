"""Runs on tensors go on after a kill with the bits of a run without one."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize
from tensor_walks import SETTINGS, SavedTensorWalk, TensorWalk, assert_same_training

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.env_states.vec_env_state import set_vec_env_state, vec_env_state

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from torch_envs import TorchCartPole

MAKERS = {
    "walk": (SavedTensorWalk, {"action_masking": False}),
    "cart-pole": (lambda: TorchCartPole(3), {}),
    "masks": (SavedTensorWalk, {}),
    "LSTM": (SavedTensorWalk, {"policy_kwargs": {"memory": "lstm"}}),
    "through arrays": (lambda: VecNormalize(SavedTensorWalk()), {}),
    "without state": (TensorWalk, {}),
}


class StopAfter(BaseCallback):
    """Ends training after some steps."""

    def __init__(self, n_steps):
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self):
        return self.num_timesteps < self.n_steps


def interrupted(name, save_path, **arguments):
    make, others = MAKERS[name]
    stopped = PPOPlus("MlpPolicy", make(), **SETTINGS, **others, **arguments)
    stopped.learn(400, [TrainingCheckpoint(96, save_path), StopAfter(220)])
    assert stopped.num_timesteps < 230


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "without state"])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(name, trusted, tmp_path):
    make, arguments = MAKERS[name]
    whole = PPOPlus("MlpPolicy", make(), **SETTINGS, **arguments).learn(400)
    interrupted(name, tmp_path)
    resumed = PPOPlus.resume(tmp_path, make(), device="cpu", trusted=trusted).continue_learning()
    assert_same_training(resumed, whole)


@pytest.mark.filterwarnings("ignore:.*environments:UserWarning")
def test_an_environment_without_state_begins_new_episodes(tmp_path):
    interrupted("without state", tmp_path)
    resumed = PPOPlus.resume(tmp_path, TensorWalk(), device="cpu").continue_learning()
    assert resumed.num_timesteps >= 400


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["episodes"].update(returns=[0.0]),
        lambda state: state["episodes"].update(lengths=["x"] * 3),
        lambda state: state.pop("generator"),
        lambda state: state.update(generator=th.zeros(5, dtype=th.uint8)),
    ],
)
def test_a_hostile_state_is_refused(change):
    env = SavedTensorWalk()
    env.reset()
    state = vec_env_state(env)
    change(state)
    with pytest.raises((ValueError, TypeError)):
        set_vec_env_state(SavedTensorWalk(), state)


def test_counts_of_episodes_go_on():
    env, other = SavedTensorWalk(), SavedTensorWalk()
    env.reset()
    for _ in range(4):
        env.step(np.ones(3, np.int64))
    assert set_vec_env_state(other, vec_env_state(env))
    for _ in range(6):
        infos, others = env.step(np.ones(3, np.int64))[3], other.step(np.ones(3, np.int64))[3]
        for info, its_other in zip(infos, others, strict=True):
            assert info.get("episode", {}).get("r") == its_other.get("episode", {}).get("r")
            assert info.get("episode", {}).get("l") == its_other.get("episode", {}).get("l")
