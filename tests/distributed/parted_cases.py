"""Training runs whose environments and minibatches are divided: among micro-batches, or among processes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch as th
from environments import BOX, DICT, IMAGE, MASKED_ACTION_SPACES, MaskedEnv, ToyEnv
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus import PPOPlus, ResumableEnv

N_ENVS, N_STEPS, BATCH_SIZE = 8, 16, 32


class WithDropout(BaseFeaturesExtractor):
    """Draws random numbers in the update too."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layers = th.nn.Sequential(th.nn.Linear(observation_space.shape[0], 8), th.nn.Dropout(0.3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


def toys(n_envs: int, **kwargs: Any) -> VecEnv:
    return make_vec_env(lambda: ToyEnv(**kwargs), n_envs, wrapper_class=ResumableEnv)


def masked(n_envs: int) -> VecEnv:
    actions = MASKED_ACTION_SPACES["multi_discrete"]
    return make_vec_env(lambda: MaskedEnv(actions), n_envs, wrapper_class=ResumableEnv)


@dataclass
class Case:
    """A model and its environments.

    :param make_env: makes as many environments as it is told
    :param policy: the policy's name
    :param policy_kwargs: its arguments
    :param arguments: further arguments of PPOPlus
    """

    make_env: Callable[[int], VecEnv] = toys
    policy: str = "MlpPolicy"
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def make_model(self, n_envs: int = N_ENVS, **others: Any) -> PPOPlus:
        given = {"n_steps": N_STEPS, "batch_size": BATCH_SIZE, "n_epochs": 2, "seed": 3, "device": "cpu"}
        given |= {"policy_kwargs": {"net_arch": [8]} | self.policy_kwargs} | self.arguments | others
        return PPOPlus(self.policy, self.make_env(n_envs), **given)


def both_negative(observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    return -observations, -actions


LSTM = {"lstm_hidden_size": 8, "memory_kwargs": {"sequence_length": 8}}
CASES = {
    "mlp": Case(),
    "discrete": Case(lambda n: toys(n, action_space=spaces.Discrete(3))),
    "cnn": Case(
        lambda n: toys(n, observation_space=IMAGE),
        "CnnPolicy",
        {"features_extractor_kwargs": {"features_dim": 8}},
    ),
    "dict": Case(
        lambda n: toys(n, observation_space=DICT, action_space=spaces.MultiDiscrete([3, 2])),
        "MultiInputPolicy",
        {"features_extractor_kwargs": {"cnn_output_dim": 8}},
    ),
    "masks": Case(masked, arguments={"action_masking": True}),
    "lstm": Case(policy="MlpLstmPolicy", policy_kwargs=LSTM),
    # The last sequence of a rollout is padded
    "padded gru": Case(policy_kwargs={"memory": "gru", "memory_kwargs": {"hidden_size": 8, "sequence_length": 6}}),
    "gtrxl": Case(policy_kwargs={"memory": "gtrxl", "memory_kwargs": {"hidden_size": 8, "sequence_length": 8}}),
    "transformer": Case(
        lambda n: toys(n, observation_space=spaces.Box(-1, 1, (4, 3))),
        policy_kwargs={
            "features_extractor_class": "transformer",
            "features_extractor_kwargs": {"seq_len": 4, "d_model": 8},
        },
    ),
    "beta": Case(policy_kwargs={"action_dist": "beta"}),
    "squashed": Case(policy_kwargs={"action_dist": "squashed_gaussian"}),
    "gsde": Case(arguments={"use_sde": True, "sde_sample_freq": 5}),
    "dropout": Case(policy_kwargs={"features_extractor_class": WithDropout}),
    "vec_normalize": Case(lambda n: VecNormalize(toys(n))),
    "vec_normalize of a dict": Case(
        lambda n: VecNormalize(toys(n, observation_space=spaces.Dict({"a": BOX, "b": BOX})), norm_obs_keys=["a"]),
        "MultiInputPolicy",
    ),
    "asymmetric": Case(
        lambda n: toys(n, observation_space=spaces.Dict({"a": BOX, "b": BOX, "hidden": BOX})),
        "MultiInputLstmPolicy",
        LSTM | {"actor_keys": ["a"], "critic_keys": ["a", "hidden"]},
    ),
    "symmetry": Case(
        lambda n: VecNormalize(toys(n, action_space=spaces.Box(-1, 1, (2,)))), arguments={"symmetry": both_negative}
    ),
    "smooth actions": Case(arguments={"caps_temporal": 0.3}),
    "smooth under noise": Case(arguments={"caps_spatial": 0.3}),
    "target_kl": Case(arguments={"target_kl": 0.003, "learning_rate": 0.01, "n_epochs": 4}),
    "schedules": Case(
        arguments={
            "learning_rate": "warmup_cos_3e-3",
            "critic_learning_rate": "lin_1e-2",
            "clip_range": "lin_0.3",
            "clip_range_vf": "cos_0.3",
            "ent_coef": "lin_0.1",
        }
    ),
    "amp": Case(arguments={"amp": "bf16"}),
    "own optimizer": Case(policy_kwargs={"optimizer_class": th.optim.NAdam}, arguments={"normalize_advantage": False}),
    "short minibatch": Case(arguments={"batch_size": 24}),
    "compile": Case(arguments={"compile": True}),
    "compiled vec_normalize": Case(lambda n: VecNormalize(toys(n)), arguments={"compile": True, "target_kl": 0.05}),
}
