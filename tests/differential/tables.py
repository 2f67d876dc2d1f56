"""What the names in a configuration stand for: spaces, policies, optimisers, schedules, wrappers."""

import numpy as np
import torch as th
from custom_parts import (
    CustomPolicy,
    HalfOptimized,
    NoisyExtractor,
    PartlyFrozenPolicy,
    ScaledAdvantages,
    ScaledDictAdvantages,
    SometimesUsed,
    SpectralExtractor,
    TwoGroups,
    UnshuffledBuffer,
)
from environments import ACTION_SPACES, BOX, CHANNEL_FIRST, IMAGE, SMALL_DICT, ToyEnv
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecCheckNan, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

OBSERVATIONS = {
    "box": BOX,
    "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "float16": spaces.Box(-1.0, 1.0, (3,), np.float16),
    "int64": spaces.Box(-9, 9, (3,), np.int64),
    "uint8": spaces.Box(0, 255, (4,), np.uint8),
    "one number": spaces.Box(-2.0, 3.0, (1,), np.float32),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "unbounded": spaces.Box(-np.inf, np.inf, (4,), np.float32),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 4, 2]),
    "multi_binary": spaces.MultiBinary(4),
    "binary matrix": spaces.MultiBinary((2, 2)),
    "image": IMAGE,
    "channel first": CHANNEL_FIRST,
    "dict": SMALL_DICT,
    "big dict": spaces.Dict(
        {
            "float64": spaces.Box(-1.0, 1.0, (2,), np.float64),
            "choices": spaces.MultiDiscrete([2, 3]),
            "bits": spaces.MultiBinary(3),
            "matrix": spaces.Box(-1.0, 1.0, (2, 2), np.float32),
        }
    ),
    "dict with image": spaces.Dict({"vector": BOX, "image": IMAGE}),
}
ACTIONS = {
    **ACTION_SPACES,
    "unit box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "float64 box": spaces.Box(-1.0, 1.0, (2,), np.float64),
    "matrix": spaces.Box(-1.0, 1.0, (2, 2), np.float32),
    "one number": spaces.Box(-2.0, 2.0, (1,), np.float32),
    "discrete from 1": spaces.Discrete(3, start=1),
    "one bit": spaces.MultiBinary(1),
}

POLICIES = {
    "SB3's": ActorCriticPolicy,
    "SB3's for dicts": MultiInputActorCriticPolicy,
    "custom": CustomPolicy,
    "partly frozen": PartlyFrozenPolicy,
    "sometimes used": SometimesUsed,
    "half optimized": HalfOptimized,
    "two groups": TwoGroups,
}
EXTRACTORS = {"noisy": NoisyExtractor, "spectral": SpectralExtractor}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "hardtanh": nn.Hardtanh,
    "dropout": nn.Dropout,
    "prelu": nn.PReLU,
}
BUFFERS = {
    "SB3's": (RolloutBuffer, DictRolloutBuffer),
    "own advantages": (ScaledAdvantages, ScaledDictAdvantages),
    "own get": (UnshuffledBuffer, DictRolloutBuffer),
}


class SignDescent(th.optim.Optimizer):
    """A user's own optimiser, which steps by the signs of the gradients."""

    def __init__(self, parameters, lr=1e-3):
        super().__init__(parameters, {"lr": lr})

    @th.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())


class CautiousAdam(th.optim.Adam):
    """A user's own subclass, which forgets some of each step."""

    @th.no_grad()
    def step(self, closure=None):
        before = [parameter.clone() for group in self.param_groups for parameter in group["params"]]
        super().step(closure)
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for old, parameter in zip(before, parameters, strict=True):
            parameter.lerp_(old, 0.1)


OPTIMIZERS = {
    "adam": (th.optim.Adam, {}),
    "adam, eps": (th.optim.Adam, {"eps": 1e-5}),
    "adam, amsgrad": (th.optim.Adam, {"eps": 1e-5, "amsgrad": True}),
    "adam, weight_decay": (th.optim.Adam, {"eps": 1e-5, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "adam, foreach": (th.optim.Adam, {"eps": 1e-5, "foreach": True}),
    "adam, not foreach": (th.optim.Adam, {"eps": 1e-5, "foreach": False}),
    "adam, maximize": (th.optim.Adam, {"eps": 1e-5, "maximize": True}),
    "adam, fused": (th.optim.Adam, {"eps": 1e-5, "fused": True}),
    "adamw": (th.optim.AdamW, {"eps": 1e-5}),
    "adamw, amsgrad": (th.optim.AdamW, {"eps": 1e-5, "weight_decay": 0.3, "amsgrad": True}),
    "sgd": (th.optim.SGD, {}),
    "sgd, momentum": (th.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "sgd, nesterov": (th.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "sgd, maximize": (th.optim.SGD, {"maximize": True, "foreach": True}),
    "rmsprop": (th.optim.RMSprop, {}),
    "rmsprop, eps": (th.optim.RMSprop, {"eps": 1e-5, "alpha": 0.9, "weight_decay": 0.01}),
    "rmsprop, centered": (th.optim.RMSprop, {"eps": 1e-5, "centered": True, "momentum": 0.5}),
    "adagrad": (th.optim.Adagrad, {}),
    "nadam": (th.optim.NAdam, {}),
    "adamax": (th.optim.Adamax, {}),
    "own": (SignDescent, {}),
    "own adam": (CautiousAdam, {}),
}
# The others divide gradients that are nothing but rounding by numbers as small, which makes steps of them. Theirs are
# not comparable to rounding
COMPARABLE_OPTIMIZERS = [
    name
    for name, (optimizer, settings) in OPTIMIZERS.items()
    if issubclass(optimizer, th.optim.SGD) or settings.get("eps", 0.0) >= 1e-5
]


class Float64Rewards(VecEnvWrapper):
    """Rewards as a SubprocVecEnv has them."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards.astype(np.float64), dones, infos


WRAPPERS = {
    "normalize": VecNormalize,
    "normalize observations": lambda env: VecNormalize(env, norm_reward=False, clip_obs=0.8),
    "normalize rewards": lambda env: VecNormalize(env, norm_obs=False, clip_reward=0.5, gamma=0.9),
    "normalize as it is": lambda env: VecNormalize(env, training=False),
    "stack": lambda env: VecFrameStack(env, 3),
    "monitor": VecMonitor,
    "float64 rewards": Float64Rewards,
    "check": VecCheckNan,
}


class StartingAction(ToyEnv):
    """ToyEnv for Discrete spaces that do not start at 0: SB3's actions always do."""

    def step(self, action):
        return super().step(action + self.action_space.start)


def coefficient(value):
    """A coefficient as the algorithms take it; ("falls", x) is a callable and ("linear", x, y) SB3's schedule."""
    if not isinstance(value, list | tuple):
        return value
    kind, start, *end = value
    if kind == "linear":
        return LinearSchedule(start, *end, 1.0)
    return lambda progress: start * (0.1 + 0.9 * progress)
