"""Models of every action distribution and network in views of one environment, and what their exports do there."""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import PendulumEnv
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.policies.masked_distributions import mask_sizes

SIZE, N_ENVS, N_FRAMES = 36, 4, 4
BOX = spaces.Box(np.array([-0.5, 2.0], np.float32), np.array([3.0, 2.5], np.float32))
BETA = {"action_dist": "beta"}
#: Action space, arguments of the policy and of the model
DISTRIBUTIONS = {
    "gaussian": (BOX, {}, {}),
    "squashed_gaussian": (BOX, {"action_dist": "squashed_gaussian"}, {}),
    "beta_mean": (BOX, BETA, {}),
    "beta_mode": (BOX, {**BETA, "action_dist_kwargs": {"deterministic": "mode"}}, {}),
    "gsde": (BOX, {}, {"use_sde": True}),
    "gsde_squashed": (BOX, {"squash_output": True, "use_expln": True, "full_std": False}, {"use_sde": True}),
    "discrete": (spaces.Discrete(5), {}, {}),
    "multi_discrete": (spaces.MultiDiscrete([3, 2, 4]), {}, {}),
    "multi_binary": (spaces.MultiBinary(3), {}, {}),
}
DISCRETE = ("discrete", "multi_discrete", "multi_binary")
#: Kind of observations, policy, its arguments
NETWORKS = {
    "mlp": ("vector", "MlpPolicy", {}),
    "cnn": ("image", "CnnPolicy", {"features_extractor_kwargs": {"features_dim": 16}}),
    "transformer": ("frames", "MlpPolicy", {"features_extractor_class": "transformer"}),
    "dict": ("dict", "MultiInputPolicy", {"features_extractor_kwargs": {"cnn_output_dim": 16}}),
    "lstm": ("vector", "MlpPolicy", {"memory": "lstm", "memory_kwargs": {"hidden_size": 16, "n_layers": 2}}),
    "gru": ("vector", "MlpPolicy", {"memory": "gru", "memory_kwargs": {"hidden_size": 16}}),
    "gtrxl": ("vector", "MlpPolicy", {"memory": "gtrxl", "memory_kwargs": {"hidden_size": 16, "memory_length": 8}}),
}
TRANSFORMER = {"seq_len": N_FRAMES, "d_model": 16, "n_heads": 2, "n_layers": 1}


class Case(NamedTuple):
    """One model.

    :param distribution: a key of ``DISTRIBUTIONS``
    :param network: a key of ``NETWORKS``
    :param is_normalized: whether there is a VecNormalize
    :param is_masked: whether the environment offers masks
    """

    distribution: str
    network: str
    is_normalized: bool = False
    is_masked: bool = False

    def __str__(self):
        extras = ["normalized"] * self.is_normalized + ["masked"] * self.is_masked
        return "-".join([self.distribution, self.network, *extras])


ALL_CASES = [
    Case(distribution, network, is_normalized, is_masked)
    for distribution in DISTRIBUTIONS
    for network in NETWORKS
    for is_normalized in (False, True)
    for is_masked in ((False, True) if distribution in DISCRETE else (False,))
]


class PendulumView(gym.Env):
    """Gymnasium's Pendulum with other observations and actions, and episodes of 40 steps.

    :param kind: "vector", "image" (channels last), "channels_first" or "dict"
    :param action_space: the torque is the mean of an action's parts, each from its lowest to its highest value
    """

    def __init__(self, kind, action_space):
        self.pendulum, self.kind, self.action_space = PendulumEnv(), kind, action_space
        image = spaces.Box(0, 255, (1, SIZE, SIZE) if kind == "channels_first" else (SIZE, SIZE, 1), np.uint8)
        vector = self.pendulum.observation_space
        self.observation_space = {
            "dict": spaces.Dict(
                {"vector": vector, "kind": spaces.Discrete(4), "image": image, "bits": spaces.MultiBinary(2)}
            ),
            "vector": vector,
        }.get(kind, image)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        observation, info = self.pendulum.reset(seed=int(self.np_random.integers(2**31)))
        return self._view(observation), info

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        low, high = (
            (self.action_space.low, self.action_space.high)
            if isinstance(self.action_space, spaces.Box)
            else (0, np.array(mask_sizes(self.action_space)) - 1)
        )
        torque = 4.0 * np.mean((np.asarray(action) - low) / (high - low)) - 2.0
        observation, reward, _, _, info = self.pendulum.step(np.array([torque], np.float32))
        self.n_steps += 1
        return self._view(observation), float(reward), False, self.n_steps >= 40, info

    def _view(self, observation):
        if self.kind == "vector":
            return observation
        image = np.zeros((SIZE, SIZE), np.uint8)
        steps = np.linspace(0, SIZE // 2 - 1, SIZE)
        rows, columns = (SIZE // 2 + np.rint(steps * part).astype(int) for part in observation[:2])
        image[rows, columns] = np.linspace(100, 255, SIZE)
        image = image[None] if self.kind == "channels_first" else image[..., None]
        if self.kind != "dict":
            return image
        quarter = int(observation[0] > 0) + 2 * int(observation[1] > 0)
        bits = np.array([observation[2] > 0, observation[2] > 1], np.int8)
        return {"vector": observation, "kind": quarter, "image": image, "bits": bits}


class MaskedPendulumView(PendulumView):
    """Forbids about half of the actions at each step."""

    def action_masks(self):
        sizes = mask_sizes(self.action_space)
        rng = np.random.default_rng([self.n_steps, int(1000 * abs(self.pendulum.state[0]))])
        masks = [rng.random(size) < 0.5 for size in sizes]
        for mask in masks:
            mask[rng.integers(len(mask))] = True
        return np.concatenate(masks)


def make_envs(case, n_envs=N_ENVS, seed=0):
    """Two equal vectorised environments, as the model sees them and without a normaliser; the normaliser or None."""
    kind, _, _ = NETWORKS[case.network]
    if kind == "image" and case.is_normalized:
        # VecNormalize makes numbers of pixels, and SB3 then takes the channels to be first
        kind = "channels_first"
    env_class = MaskedPendulumView if case.is_masked else PendulumView
    view = "vector" if kind == "frames" else kind
    envs = []
    for _ in range(2):
        envs.append(DummyVecEnv([lambda: env_class(view, DISTRIBUTIONS[case.distribution][0])] * n_envs))
        envs[-1].seed(seed)
    seen, raw = envs
    normalize = None
    if case.is_normalized:
        seen = normalize = VecNormalize(seen, norm_obs_keys=["vector"] if kind == "dict" else None, clip_obs=2.0)
    if kind == "frames":
        seen, raw = VecFrameStack(seen, N_FRAMES), VecFrameStack(raw, N_FRAMES)
    return seen, raw, normalize


def make_model(case, n_steps=16):
    """A model after some updates, whose parameters were disturbed: its actions fill their range. And its envs."""
    seen, raw, normalize = make_envs(case)
    _, dist_kwargs, settings = DISTRIBUTIONS[case.distribution]
    _, policy, kwargs = NETWORKS[case.network]
    policy_kwargs = {"net_arch": [16], **kwargs, **dist_kwargs}
    if case.network == "transformer":
        policy_kwargs["features_extractor_kwargs"] = TRANSFORMER
    if case.network == "cnn" and case.is_normalized:
        policy_kwargs["normalize_images"] = False
    model = PPOPlus(
        policy,
        seen,
        n_steps=n_steps,
        batch_size=32,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs=policy_kwargs,
        **settings,
    )
    model.learn(2 * n_steps * N_ENVS)
    disturb(model)
    if normalize is not None:
        normalize.training = False
    return model, seen, raw, normalize


def disturb(model, scale=0.3):
    """Add noise to the parameters of a model's policy: at first, actions depend on observations only a little."""
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for name, parameter in model.policy.named_parameters():
            if name != "log_std":
                parameter += (
                    scale * th.randn(parameter.shape, generator=generator) / max(1.0, parameter[0].numel() ** 0.5)
                )
        # The gaps of logits must change more than their biases do
        model.policy.action_net.weight *= 3.0 if isinstance(model.action_space, spaces.Box) else 10.0


class Difference(NamedTuple):
    """How actions of an export differ from those of ``predict``.

    :param n: number of observations
    :param error: largest difference, as a part of the action range; 0 for discrete actions
    :param n_other: number of observations with another discrete action, where the gap of the logits is over 1e-4
    :param n_close: number of observations with a smaller gap
    :param n_distinct: number of different actions
    """

    n: int
    error: float
    n_other: int
    n_close: int
    n_distinct: int


def differences(case, model, seen, raw, exports, n_steps):
    """Let a model act, and ask its exports for the same actions.

    :param exports: what ``load_exported`` returned, by name
    :param n_steps: steps of each of the ``N_ENVS`` environments
    :return: a Difference for each export
    """
    for env in (seen, raw):
        env.seed(1)
    observations, raw_observations = seen.reset(), raw.reset()
    state, states = None, dict.fromkeys(exports)
    starts = np.ones(seen.num_envs, bool)
    found = {name: [] for name in exports}
    distinct, gaps = set(), []
    for _ in range(n_steps):
        masks = np.stack(seen.env_method("action_masks")) if case.is_masked else None
        gaps.append(gaps_of(model.policy, observations, masks, state, starts))
        actions, next_state = model.predict(observations, state, starts, True, action_masks=masks)
        distinct |= {action.tobytes() for action in actions}
        for name, export in exports.items():
            given, states[name] = export.predict(raw_observations, states[name], starts, action_masks=masks)
            difference = np.abs(given.astype(np.float64) - actions)
            if isinstance(model.action_space, spaces.Box):
                difference /= model.action_space.high - model.action_space.low
            found[name].append(difference.reshape(len(actions), -1).max(axis=1))
        taken, _ = model.predict(observations, state, starts, False, action_masks=masks)
        taken = taken if isinstance(model.action_space, spaces.Box) else taken.astype(model.action_space.dtype)
        state = next_state
        observations, _, starts, _ = seen.step(taken)
        raw_observations = raw.step(taken)[0]
    gap = np.concatenate(gaps)
    results = {}
    for name, errors in found.items():
        error = np.concatenate(errors)
        is_box = isinstance(model.action_space, spaces.Box)
        others = 0 if is_box else int((error[gap > 1e-4] > 0).sum())
        results[name] = Difference(
            len(error), float(error.max()) if is_box else 0.0, others, int((gap <= 1e-4).sum()), len(distinct)
        )
    return results


def gaps_of(policy, observations, masks, state, starts):
    """By how much the most probable choices' logits exceed the second ones, for each observation."""
    if isinstance(policy.action_space, spaces.Box):
        return np.full(len(starts), np.inf)
    tensors, _ = policy.obs_to_tensor(observations)
    states = RNNStates(tuple(map(th.as_tensor, state)), ()) if state is not None else None
    with th.no_grad():
        distribution = policy.get_distribution(tensors, masks, states, th.as_tensor(starts))
    if hasattr(distribution, "parts"):
        logits = [part.logits for part in distribution.parts]
    elif hasattr(distribution, "logits"):
        logits = [distribution.logits]
    else:
        return distribution.distribution.logits.abs().amin(dim=1).numpy()
    tops = [part.double().topk(2, dim=1).values for part in logits]
    return th.stack([top[:, 0] - top[:, 1] for top in tops]).amin(dim=0).numpy()
