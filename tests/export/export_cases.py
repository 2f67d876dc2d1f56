"""Models of every action distribution and network in views of one environment, and what their exports do there."""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import PendulumEnv
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.export.trial import rounding_unit
from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.masked_distributions import flattened_choices, mask_sizes

SIZE, N_ENVS, N_FRAMES = 36, 4, 4
BOX = spaces.Box(np.array([-0.5, 2.0], np.float32), np.array([3.0, 2.5], np.float32))
BETA = {"action_dist": "beta"}
HYBRID_OF_FLOATS = spaces.Tuple(
    [
        spaces.Discrete(3, start=2),
        spaces.Dict({"near": BOX, "far away": spaces.Box(-1.0, 4.0, (), np.float64)}),
        spaces.MultiDiscrete([[2, 3], [4, 2]]),
        spaces.Box(-2.0, 1.0, (2, 1), np.float16),
    ]
)
HYBRID = spaces.Dict(
    {"first": HYBRID_OF_FLOATS, "bits": spaces.MultiBinary(2), "steps": spaces.Box(-3, 4, (2,), np.int64)}
)
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
    "hybrid": (HYBRID, {}, {}),
    "hybrid_beta": (HYBRID_OF_FLOATS, BETA, {}),
}
#: Those whose actions, or parts of them, can be masked
MASKABLE = ("discrete", "multi_discrete", "multi_binary", "hybrid", "hybrid_beta")
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
    for is_masked in ((False, True) if distribution in MASKABLE else (False,))
]


class PartOfActions(NamedTuple):
    """The actions of several environments, or one part of them.

    :param actions: shape (n_envs, *shape of the part)
    :param low: the lowest values
    :param high: the highest values
    :param is_box: whether they are those of a Box
    :param unit: by how much rounding to the dtype may change them: 0 for float32 and float64, 1 for integers of a Box
    """

    actions: np.ndarray
    low: np.ndarray
    high: np.ndarray
    is_box: bool
    unit: np.ndarray | float = 0.0


def parts_of_actions(space, actions):
    """The parts of actions: as many as a Tuple or Dict has, or one."""
    if isinstance(space, spaces.Tuple | spaces.Dict):
        flat = FlatActionSpace(space)
        of_envs = [flat.values(action) for action in actions]
        return [
            _part(part.space, np.stack(values))
            for part, values in zip(flat.parts, zip(*of_envs, strict=True), strict=True)
        ]
    return [_part(space, np.asarray(actions))]


def _part(space, actions):
    if isinstance(space, spaces.Box):
        unit = 1.0 if space.dtype.kind in "iu" else rounding_unit(actions)
        return PartOfActions(actions.astype(np.float64), np.float64(space.low), np.float64(space.high), True, unit)
    start = np.asarray(getattr(space, "start", 0))
    n_choices = np.reshape(mask_sizes(flattened_choices(space)), space.shape)
    return PartOfActions(actions.astype(np.float64), start, start + n_choices - 1, False)


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
        parts = parts_of_actions(self.action_space, [action])
        fractions = [np.mean((part.actions[0] - part.low) / (part.high - part.low)) for part in parts]
        torque = 4.0 * np.mean(fractions) - 2.0
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
        nets = model.policy.action_net
        for net in nets if isinstance(nets, th.nn.ModuleList) else [nets]:
            # The gaps of logits must change more than their biases do
            net.weight *= 3.0 if isinstance(model.action_space, spaces.Box) else 10.0


class Difference(NamedTuple):
    """How actions of an export differ from those of ``predict``.

    :param n: number of observations
    :param error: largest difference, as a part of the action range; 0 for discrete actions
    :param n_other: number of observations with another discrete action, where the gap of the logits is over 1e-4
    :param n_close: number of observations with a smaller gap
    :param n_rounded: number of observations with an integer or float16 of a Box that was rounded to its neighbour. Such
        a difference is no part of ``error``
    :param n_distinct: number of different actions
    """

    n: int
    error: float
    n_other: int
    n_close: int
    n_rounded: int
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
        parts = parts_of_actions(model.action_space, actions)
        distinct |= {tuple(part.actions[env].tobytes() for part in parts) for env in range(len(actions))}
        for name, export in exports.items():
            given, states[name] = export.predict(raw_observations, states[name], starts, action_masks=masks)
            found[name].append(_errors(parts, parts_of_actions(model.action_space, given)))
        taken, _ = model.predict(observations, state, starts, False, action_masks=masks)
        if isinstance(model.action_space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            taken = taken.astype(model.action_space.dtype)
        state = next_state
        observations, _, starts, _ = seen.step(taken)
        raw_observations = raw.step(taken)[0]
    gap = np.concatenate(gaps)
    results = {}
    for name, errors in found.items():
        of_boxes, are_other, are_rounded = (np.concatenate(column) for column in zip(*errors, strict=True))
        results[name] = Difference(
            n=len(gap),
            error=float(of_boxes.max()),
            n_other=int(are_other[gap > 1e-4].sum()),
            n_close=int((gap <= 1e-4).sum()),
            n_rounded=int(are_rounded.sum()),
            n_distinct=len(distinct),
        )
    return results


def _errors(expected, given):
    """For each environment: largest difference of its Box parts, in parts of their range; whether a choice differs, and
    whether a number was rounded to its neighbour."""
    n_envs = len(expected[0].actions)
    of_boxes, are_other, are_rounded = np.zeros(n_envs), np.zeros(n_envs, bool), np.zeros(n_envs, bool)
    for part, other in zip(expected, given, strict=True):
        difference = np.abs(part.actions - other.actions)
        if part.is_box:
            are_rounded |= ((difference > 0) & (difference <= part.unit)).reshape(n_envs, -1).any(axis=1)
            beyond = np.maximum(0.0, difference - part.unit) / (part.high - part.low)
            of_boxes = np.maximum(of_boxes, beyond.reshape(n_envs, -1).max(axis=1))
        else:
            are_other |= difference.reshape(n_envs, -1).any(axis=1)
    return of_boxes, are_other, are_rounded


def gaps_of(policy, observations, masks, state, starts):
    """By how much the most probable choices' logits exceed the second ones, for each observation."""
    tensors, _ = policy.obs_to_tensor(observations)
    states = RNNStates(tuple(map(th.as_tensor, state)), ()) if state is not None else None
    with th.no_grad():
        distribution = policy.get_distribution(tensors, masks, states, th.as_tensor(starts))
    return th.stack([th.full((len(starts),), th.inf), *_gaps_in(distribution)]).amin(dim=0).numpy()


def _gaps_in(distribution):
    if hasattr(distribution, "parts"):
        return [gap for part in distribution.parts for gap in _gaps_in(part)]
    if isinstance(distribution, BernoulliDistribution):
        return [distribution.distribution.logits.abs().amin(dim=1)]
    if not hasattr(distribution, "logits"):
        return []
    top = distribution.logits.double().topk(2, dim=1).values
    return [top[:, 0] - top[:, 1]]
