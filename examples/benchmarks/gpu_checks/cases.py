"""What gpu_check.py trains: small environments, one case for each kind of policy and option, and what it compares."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus import PPOPlus

BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
MIXED = spaces.Dict({"vector": BOX, "kind": spaces.Discrete(4), "image": IMAGE})
FRAMES = spaces.Box(-1, 1, (4, 3), np.float32)
FORCE = spaces.Box(-2.0, 2.0, (2,), np.float32)
FOUR = spaces.Discrete(4)

N_ENVS, N_STEPS = 2, 16
ROLLOUT = N_ENVS * N_STEPS


class Toy(gym.Env):
    """Random observations, short episodes; with Discrete actions, masks that forbid one of them.

    The state is in plain attributes, so that ResumableEnv can save it.
    """

    def __init__(self, observation_space: spaces.Space = BOX, action_space: spaces.Space = FORCE) -> None:
        self.observation_space, self.action_space = copy.deepcopy(observation_space), copy.deepcopy(action_space)
        self.n_steps = 0
        if isinstance(action_space, spaces.Discrete):
            self.action_masks = self._masks

    def _masks(self) -> np.ndarray:
        masks = np.ones(int(self.action_space.n), bool)
        masks[self.n_steps % len(masks)] = False
        return masks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ANN401  # whatever the space
        self.n_steps += 1
        reward = float(np.tanh(np.mean(action)) + 0.1 * self.np_random.normal())
        is_over = bool(self.np_random.random() < 0.1)
        return self.observation_space.sample(), reward, is_over, self.n_steps >= 7, {}


def make_toys(wrapper: Callable[[gym.Env], gym.Env] | None = None, **env_kwargs: Any) -> VecEnv:  # Toy's
    """Build ``N_ENVS`` environments, seeded."""
    return make_vec_env(lambda: Toy(**env_kwargs), n_envs=N_ENVS, seed=0, wrapper_class=wrapper)


@dataclass(frozen=True)
class Case:
    """One configuration.

    :param policy: name of the policy
    :param env: arguments of :class:`Toy`
    :param policy_kwargs: the policy's
    :param settings: further arguments of the algorithm
    :param loose: computed in half precision
    :param runs_eagerly: ``compile=True`` compiles no gradient step
    """

    policy: str = "MlpPolicy"
    env: dict[str, Any] = field(default_factory=dict)
    policy_kwargs: dict[str, Any] = field(default_factory=lambda: {"net_arch": [16, 16]})
    settings: dict[str, Any] = field(default_factory=dict)
    loose: bool = False
    runs_eagerly: bool = False

    def build(
        self,
        device: str,
        algorithm: type[PPO] = PPOPlus,
        wrapper: Callable[[gym.Env], gym.Env] | None = None,
        **settings: Any,  # the algorithm's
    ) -> Any:  # noqa: ANN401  # a PPOPlus, whose private parts are looked at, or a PPO
        """Build a model in new environments.

        :param device: of the model
        :param algorithm: the class
        :param wrapper: of each environment
        :param settings: beside the case's own
        """
        both = {**copy.deepcopy(self.settings), **settings}
        if not issubclass(algorithm, PPOPlus):
            both.pop("action_masking", None)
        both = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 3, "seed": 0, **both}
        env = make_toys(wrapper, **self.env)
        return algorithm(self.policy, env, policy_kwargs=copy.deepcopy(self.policy_kwargs), device=device, **both)


def _with_net(**policy_kwargs: Any) -> dict[str, Any]:  # the policy's
    return {"net_arch": [16, 16], **policy_kwargs}


GTRXL = {"hidden_size": 16, "sequence_length": 8, "memory_length": 8}
TRANSFORMER = {"d_model": 8, "n_heads": 2}
CNN = Case(
    "CnnPolicy",
    env={"observation_space": IMAGE, "action_space": FOUR},
    policy_kwargs=_with_net(features_extractor_kwargs={"features_dim": 32}),
    settings={"action_masking": False},
)
CASES = {
    "box": Case(),
    "discrete": Case(env={"action_space": FOUR}, settings={"action_masking": False}),
    "cnn": CNN,
    "dict": Case(
        "MultiInputPolicy",
        env={"observation_space": MIXED, "action_space": spaces.MultiDiscrete([3, 2])},
        policy_kwargs=_with_net(features_extractor_kwargs={"cnn_output_dim": 16}),
    ),
    "gsde": Case(settings={"use_sde": True, "sde_sample_freq": 4}),
    "target_kl": Case(settings={"target_kl": 0.001, "learning_rate": 0.01}),
    "beta": Case(policy_kwargs=_with_net(action_dist="beta")),
    "squashed": Case(policy_kwargs=_with_net(action_dist="squashed_gaussian")),
    "masks": Case(env={"action_space": FOUR}),
    "critic_lr, clip_vf": Case(
        settings={"critic_learning_rate": "lin_1e-3", "clip_range_vf": 0.2, "ent_coef": "lin_0.01"}
    ),
    "gtrxl": Case(policy_kwargs={"net_arch": [8], "memory": "gtrxl", "memory_kwargs": GTRXL}),
    "lstm": Case(
        "MlpLstmPolicy",
        policy_kwargs={"net_arch": [8], "lstm_hidden_size": 16, "memory_kwargs": {"sequence_length": 8}},
        runs_eagerly=True,
    ),
    "gru": Case(
        policy_kwargs={
            "net_arch": [8],
            "memory": "gru",
            "memory_kwargs": {"hidden_size": 16, "sequence_length": 8},
        },
        runs_eagerly=True,
    ),
    "transformer": Case(
        env={"observation_space": FRAMES},
        policy_kwargs=_with_net(features_extractor_class="transformer", features_extractor_kwargs=TRANSFORMER),
    ),
    "sgd": Case(policy_kwargs=_with_net(optimizer_class=th.optim.SGD, optimizer_kwargs={"momentum": 0.9})),
    "bf16": Case(settings={"amp": True}, loose=True),
    "fp16": Case(settings={"amp": "fp16"}, loose=True, runs_eagerly=True),
    "cnn bf16": Case(CNN.policy, CNN.env, CNN.policy_kwargs, {**CNN.settings, "amp": True}, loose=True),
    "skip non-finite": Case(settings={"on_non_finite": "skip"}),
    "reduce-overhead": Case(settings={"compile": {"mode": "reduce-overhead"}}),
}
# Those that need a GPU
NEED_CUDA = ("fp16",)


def cases_for(names: list[str], device: str, quick: bool) -> list[str]:
    """Leave out what the device cannot do and, where it must be quick, all but the first."""
    possible = [name for name in names if device == "cuda" or name not in NEED_CUDA]
    return possible[:1] if quick else possible


def parameters_of(model: Any) -> th.Tensor:  # noqa: ANN401  # any algorithm of SB3's
    """Return all parameters of a model's policy as one float64 vector on the CPU."""
    return th.cat([parameter.detach().flatten().double().cpu() for parameter in model.policy.parameters()])


def difference(vector: th.Tensor, other: th.Tensor) -> float:
    """Return the largest difference of two vectors."""
    return float((vector - other).abs().max())


def wait_for_device(device: str) -> None:
    """Wait until the device has done all that it was told."""
    if device == "cuda":
        th.cuda.synchronize()
