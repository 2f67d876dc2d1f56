"""Models, a normaliser and a training run whose files must stay readable; any version's code can write and read them.

Only public names are imported here, of which every version since 0.1 has all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus import (
    ActorCriticPlusCnnPolicy,
    ActorCriticPlusPolicy,
    Constant,
    Cosine,
    Exponential,
    ImpalaCNN,
    Linear,
    MlpLstmPolicy,
    MultiInputActorCriticPlusPolicy,
    MultiInputExtractor,
    PPOPlus,
    PPOPlusDictRolloutBuffer,
    PPOPlusRolloutBuffer,
    ResumableEnv,
    TransformerExtractor,
    WarmupCosine,
)
from sb3_ppo_plus.masking import MaskFromInfo

N_ENVS, N_STEPS = 2, 16
SMALL = {"net_arch": [4]}
VECTOR = spaces.Box(-1.0, 1.0, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 7, 7), np.uint8)
DICT = spaces.Dict({"vector": VECTOR, "kind": spaces.Discrete(3)})
DICT_WITH_IMAGE = spaces.Dict({"image": IMAGE, "vector": VECTOR})
DICT_WITH_MASK = spaces.Dict({"vector": VECTOR, "action_mask": spaces.MultiBinary(3)})


class RandomEnv(gym.Env):
    """Random observations; the first action is valid always, each other one at every second step.

    :param observation_space: a Dict with the key "action_mask" shows the valid actions there
    :param action_space: Discrete, MultiDiscrete, MultiBinary or Box
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self._observation(), {"action_mask": self.valid_actions()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        reward = float(np.mean(action)) - 0.1 * self.n_steps
        return self._observation(), reward, False, self.n_steps >= 7, {"action_mask": self.valid_actions()}

    def _observation(self) -> Any:
        observation = self.observation_space.sample()
        if isinstance(observation, dict) and "action_mask" in observation:
            observation["action_mask"] = self.valid_actions()
        return observation

    def valid_actions(self) -> np.ndarray:
        """Return the mask in the layout of sb3-contrib: all choices of all dimensions in a row."""
        if isinstance(self.action_space, spaces.MultiBinary):
            sizes = [2] * int(np.prod(self.action_space.shape))
        elif isinstance(self.action_space, spaces.MultiDiscrete):
            sizes = self.action_space.nvec.tolist()
        else:
            sizes = [int(getattr(self.action_space, "n", 1))]
        masks = [(np.arange(size) == 0) | ((np.arange(size) + self.n_steps) % 2 == 0) for size in sizes]
        return np.concatenate(masks)


class PointEnv(gym.Env):
    """A point that is pushed along a line: sums and products alone, which every processor rounds alike."""

    observation_space = spaces.Box(-100.0, 100.0, (2,), np.float32)
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.point = np.array([2.0 * self.np_random.random() - 1.0, 0.0])
        return self.point.astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.point[1] += 0.1 * float(action[0]) + 0.1 * (self.np_random.random() - 0.5)
        self.point[0] += self.point[1]
        return self.point.astype(np.float32), -abs(float(self.point[0])), False, False, {}


def random_envs(observation_space: spaces.Space, action_space: spaces.Space, wrapper: Any = None) -> VecEnv:
    def make() -> gym.Env:
        env = RandomEnv(observation_space, action_space)
        return env if wrapper is None else wrapper(env)

    return make_vec_env(make, n_envs=N_ENVS, seed=0)


def cartpole() -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=0)


def pendulum() -> VecEnv:
    settings = {"max_episode_steps": 11}
    return make_vec_env("Pendulum-v1", n_envs=N_ENVS, seed=0, wrapper_class=ResumableEnv, env_kwargs=settings)


def images() -> VecEnv:
    return random_envs(IMAGE, spaces.Discrete(3))


def with_masks_in_infos() -> VecEnv:
    return random_envs(VECTOR, spaces.Discrete(3), MaskFromInfo)


def with_action_masker(action_space: spaces.Space) -> VecEnv:
    return random_envs(VECTOR, action_space, lambda env: ActionMasker(env, RandomEnv.valid_actions))


@dataclass
class Case:
    """A model.

    :param make_env: its environments
    :param policy: name or class
    :param policy_kwargs: of the constructor
    :param settings: further arguments of the constructor
    :param has_normalizer: its environments are normalised, and the normaliser is saved too
    """

    make_env: Callable[[], VecEnv] = cartpole
    policy: Any = "MlpPolicy"
    policy_kwargs: dict[str, Any] = field(default_factory=lambda: SMALL)
    settings: dict[str, Any] = field(default_factory=dict)
    has_normalizer: bool = False

    def make_model(self) -> PPOPlus:
        env = self.make_env()
        defaults = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
        arguments = {**defaults, "policy_kwargs": self.policy_kwargs, **self.settings}
        return PPOPlus(self.policy, VecNormalize(env) if self.has_normalizer else env, **arguments)


IMPALA = {"features_dim": 4, "channels": (2,)}
TRANSFORMER = {"seq_len": 2, "d_model": 4, "n_heads": 2, "n_layers": 1}

CASES = {
    "defaults": Case(),
    "schedules_by_string": Case(
        pendulum,
        settings={
            "learning_rate": "lin_1e-3_1e-4",
            "critic_learning_rate": "warmup_cos_1e-3",
            "clip_range": "cos_0.2_0.1",
            "clip_range_vf": "exp_0.2_0.1",
            "ent_coef": "0.01",
            "vf_coef": "lin_0.5_0.4",
        },
    ),
    "schedules_by_object": Case(
        pendulum,
        settings={
            "learning_rate": WarmupCosine(1e-3, 0.2, 1e-5),
            "critic_learning_rate": Exponential(1e-3, 1e-4),
            "clip_range": Cosine(0.2, 0.1),
            "clip_range_vf": Constant(0.2),
            "ent_coef": Linear(0.1, 0.01, 0.5),
            "vf_coef": LinearSchedule(0.5, 0.1, 0.9),
        },
    ),
    "other_settings": Case(
        pendulum,
        settings={
            "amp": True,
            "max_skipped": 3,
            "normalize_advantage": False,
            "on_non_finite": "skip",
            "pessimistic_value_clip": False,
            "target_kl": 0.5,
        },
    ),
    "names": Case(
        policy_kwargs={
            "net_arch": [4],
            "activation_fn": "relu",
            "optimizer_class": "rmsprop",
            "features_extractor_class": "transformer",
            "features_extractor_kwargs": TRANSFORMER,
        }
    ),
    "classes": Case(
        policy=ActorCriticPlusPolicy,
        policy_kwargs={
            "net_arch": [4],
            "activation_fn": th.nn.ELU,
            "optimizer_class": th.optim.AdamW,
            "features_extractor_class": TransformerExtractor,
            "features_extractor_kwargs": TRANSFORMER,
        },
        settings={"rollout_buffer_class": PPOPlusRolloutBuffer},
    ),
    # A list: SB3 makes one of a tuple, where it needs no pickle
    "cnn": Case(
        images,
        "CnnPolicy",
        {"features_extractor_class": "impala_cnn", "features_extractor_kwargs": IMPALA | {"channels": [2]}},
    ),
    "cnn_classes": Case(
        images,
        ActorCriticPlusCnnPolicy,
        {"features_extractor_class": ImpalaCNN, "features_extractor_kwargs": IMPALA},
    ),
    "dict": Case(
        lambda: random_envs(DICT, spaces.MultiDiscrete([3, 2])),
        "MultiInputPolicy",
        settings={"rollout_buffer_class": PPOPlusDictRolloutBuffer},
    ),
    "dict_classes": Case(
        lambda: random_envs(DICT_WITH_IMAGE, spaces.Discrete(3)),
        MultiInputActorCriticPlusPolicy,
        {
            "net_arch": [4],
            "features_extractor_class": MultiInputExtractor,
            "features_extractor_kwargs": {"extractors": {"image": {"class": ImpalaCNN, **IMPALA}}},
        },
    ),
    "beta": Case(
        pendulum, policy_kwargs=SMALL | {"action_dist": "beta", "action_dist_kwargs": {"deterministic": "mode"}}
    ),
    "squashed_gaussian": Case(pendulum, policy_kwargs=SMALL | {"action_dist": "squashed_gaussian"}),
    "gsde_with_vec_normalize": Case(
        pendulum,
        policy_kwargs=SMALL | {"squash_output": True},
        settings={"use_sde": True, "sde_sample_freq": 4},
        has_normalizer=True,
    ),
    "multi_binary": Case(lambda: random_envs(VECTOR, spaces.MultiBinary(2))),
    "masks_in_infos": Case(with_masks_in_infos),
    "masks_of_multi_discrete": Case(
        lambda: with_action_masker(spaces.MultiDiscrete([3, 2])), settings={"action_masking": True}
    ),
    "masks_of_multi_binary": Case(lambda: with_action_masker(spaces.MultiBinary(2))),
    "mask_among_observations": Case(lambda: random_envs(DICT_WITH_MASK, spaces.Discrete(3)), "MultiInputPolicy"),
    "lstm": Case(
        pendulum, "MlpLstmPolicy", SMALL | {"lstm_hidden_size": 4, "shared_lstm": True, "enable_critic_lstm": False}
    ),
    "lstm_class": Case(
        policy=MlpLstmPolicy, policy_kwargs=SMALL | {"memory_kwargs": {"hidden_size": 4, "sequence_length": 8}}
    ),
    "gru": Case(policy_kwargs=SMALL | {"memory": "gru", "memory_kwargs": {"hidden_size": 4, "shared": True}}),
    "gtrxl": Case(
        policy_kwargs=SMALL
        | {
            "memory": "gtrxl",
            "memory_kwargs": {"hidden_size": 4, "n_layers": 1, "memory_length": 4, "sequence_length": 8},
        }
    ),
}
# Of these the policy is saved by itself too
POLICY_FILES = ("defaults", "classes", "dict_classes", "beta", "lstm", "gtrxl")

# The run that is interrupted
N_UPDATES, INTERRUPTED_AFTER = 4, 2
TOTAL_TIMESTEPS = N_UPDATES * N_STEPS * N_ENVS


class Interrupted(Exception):
    """Ends a run in the middle of a rollout."""


class Interrupt(BaseCallback):
    """Raises :class:`Interrupted` in the rollout that follows the last update before it."""

    def _on_step(self) -> bool:
        if self.num_timesteps > (INTERRUPTED_AFTER + 0.5) * N_STEPS * N_ENVS:
            raise Interrupted
        return True


def points() -> VecEnv:
    return make_vec_env(
        lambda: gym.wrappers.TimeLimit(PointEnv(), 11), n_envs=N_ENVS, seed=0, wrapper_class=ResumableEnv
    )


def make_run_env() -> VecEnv:
    return VecNormalize(points())


def make_run() -> PPOPlus:
    """Make the model whose training is interrupted: schedules, a normaliser and episodes that go on count."""
    settings = {"learning_rate": "lin_3e-3", "critic_learning_rate": 1e-3, "clip_range_vf": "cos_0.3"}
    return Case(make_run_env, settings=settings).make_model()


def make_evaluation() -> EvalCallback:
    env = VecNormalize(points(), training=False)
    return EvalCallback(env, n_eval_episodes=2, eval_freq=N_STEPS, deterministic=False, verbose=0)
