"""Where action masks come from, and what they must be.

An environment offers them by a method ``action_masks()``, as sb3-contrib's MaskablePPO asks for it, or under the key
``action_mask`` of Dict observations, as PettingZoo and RLlib do. True, or 1, marks a valid action.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME, get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_ppo_plus.callbacks import iterate_callbacks
from sb3_ppo_plus.masked_distributions import MASKABLE_SPACES, mask_sizes

MASK_KEY = "action_mask"


def has_mask_key(observation_space: spaces.Space[Any]) -> bool:
    """Whether observations hold masks."""
    return isinstance(observation_space, spaces.Dict) and MASK_KEY in observation_space.spaces


def without_mask_key(observation_space: spaces.Space[Any]) -> spaces.Dict:
    """Return the Dict space of what is left for the features."""
    assert isinstance(observation_space, spaces.Dict)
    return spaces.Dict({key: space for key, space in observation_space.spaces.items() if key != MASK_KEY})


def split_off_mask(observations: PyTorchObs) -> tuple[PyTorchObs, th.Tensor]:
    """Part observations, a dict of tensors, from their masks of shape (batch, mask size)."""
    assert isinstance(observations, dict)
    features = {key: observation for key, observation in observations.items() if key != MASK_KEY}
    return features, observations[MASK_KEY].flatten(1) != 0


def offers_masks(env: VecEnv, action_space: spaces.Space[Any]) -> bool:
    """Whether every environment offers masks, of a space that can be masked."""
    if not isinstance(action_space, MASKABLE_SPACES):
        return False
    if has_mask_key(env.observation_space):
        return True
    try:
        # Attributes of that name have been something else than methods; those in subprocesses are not looked at
        is_offered = is_masking_supported(env)
        return is_offered and all(callable(each.get_wrapper_attr(EXPECTED_METHOD_NAME)) for each in _envs_of(env) or ())
    except NotImplementedError:
        # A VecEnv need not know its environments' attributes
        return False


def decide_masking(
    action_masking: bool | None, env: VecEnv, action_space: spaces.Space[Any], obstacle: Exception | None
) -> bool:
    """Whether the masks of an environment are to be used.

    :param action_masking: PPOPlus's argument
    :param env: the training environment
    :param action_space: its action space
    :param obstacle: why the model cannot take masks; raised if they are required, otherwise a warning if there are any
    :raises ValueError: if masks are required and not offered, or masks among the observations are none
    """
    if action_masking is False:
        return False
    is_offered = offers_masks(env, action_space)
    if action_masking and not is_offered:
        raise ValueError(
            "action_masking=True needs Discrete, MultiDiscrete or MultiBinary actions, and a method action_masks() of "
            f"every environment (sb3_contrib's ActionMasker adds one) or an observation key {MASK_KEY!r}; got "
            f"{action_space} and observations {env.observation_space}"
        )
    if is_offered and obstacle is not None:
        if action_masking:
            raise obstacle
        warnings.warn(
            f"The environments offer action masks, which are not used: {obstacle}. action_masking=False is silent.",
            stacklevel=2,
        )
        return False
    if is_offered and has_mask_key(env.observation_space):
        check_mask_key(env, action_space)
    return is_offered


def takes_masks(policy_class: type[Any]) -> bool:
    """Whether a policy class has the argument ``action_masks`` where rollout and update give it."""
    methods = (policy_class.forward, policy_class.evaluate_actions)
    return all("action_masks" in inspect.signature(method).parameters for method in methods)


def check_mask_key(env: VecEnv, action_space: spaces.Space[Any]) -> None:
    """Check the masks among the observations of an environment.

    :raises ValueError: if they have not the size of the action space's masks, or are normalised, or all there is
    """
    assert isinstance(env.observation_space, spaces.Dict)
    if len(env.observation_space.spaces) == 1:
        raise ValueError(
            f"observations must hold more than the mask, which is no feature, got {env.observation_space}; "
            "action_masking=False takes it for one"
        )
    shape, size = env.observation_space[MASK_KEY].shape, sum(mask_sizes(action_space))
    if shape is None or int(np.prod(shape)) != size:
        raise ValueError(
            f"the observation key {MASK_KEY!r} must hold a mask of shape ({size},) for {action_space}, got "
            f"{env.observation_space[MASK_KEY]}; action_masking=False takes it for a feature"
        )
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize) and env.norm_obs and MASK_KEY in (env.norm_obs_keys or ()):
            raise ValueError(
                f"VecNormalize normalises the observation key {MASK_KEY!r}, which is a mask: give it norm_obs_keys "
                f"without that key, got {env.norm_obs_keys}"
            )
        env = env.venv


def check_masks(masks: np.ndarray, sizes: Sequence[int], step: int | None = None) -> np.ndarray:
    """Check masks of several environments.

    :param masks: shape (n_envs, sum of sizes), or of that many elements; bool, or numbers 0 and 1
    :param sizes: number of choices of each action, see :func:`mask_sizes`
    :param step: for the message: step of the rollout, None outside one
    :return: bool, shape (n_envs, sum of sizes)
    :raises ValueError: for another shape, other numbers, or where an action has no valid choice
    """
    when = "" if step is None else f" at step {step} of the rollout"
    size = sum(sizes)
    if masks.size == 0 or masks.size % size:
        raise ValueError(f"action masks must have the shape (n_envs, {size}), got {masks.shape}{when}")
    masks = masks.reshape(-1, size)
    if masks.dtype != np.bool_:
        is_bool = (masks == 0) | (masks == 1)
        if not is_bool.all():
            index = int(np.flatnonzero(~is_bool.all(axis=1))[0])
            raise ValueError(f"action masks must be bool, or 0 and 1, got {masks[index]} of env {index}{when}")
        masks = masks.astype(np.bool_)
    if len(sizes) == 1:
        has_choice = masks.any(axis=1, keepdims=True)
    else:
        has_choice = np.logical_or.reduceat(masks, [0, *accumulate(sizes[:-1])], axis=1)
    if not has_choice.all():
        index, action = (int(position[0]) for position in np.nonzero(~has_choice))
        which = "action" if len(sizes) == 1 else f"choice of action {action}"
        raise ValueError(f"the action mask of env {index} leaves no valid {which}{when}")
    return masks


class ActionMaskSource:
    """Asks for the masks of each step of a rollout.

    :param env: the training environment
    :param action_space: its action space
    :param policy: which will be given the masks, unless it takes them out of the observations by itself
    """

    def __init__(self, env: VecEnv, action_space: spaces.Space[Any], policy: BasePolicy) -> None:
        self._env = env
        self._envs = _envs_of(env)
        self._sizes = mask_sizes(action_space)
        self._shape = (env.num_envs, sum(self._sizes))
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._device = None if policy.device.type == "cpu" else policy.device
        self._in_observations = has_mask_key(env.observation_space)
        self._policy_finds_them = self._in_observations and bool(getattr(policy, "has_mask_key", False))

    def ask(self, observations: Any, step: int) -> np.ndarray:  # noqa: ANN401  # array or dict
        """Ask for the masks of a step.

        :param observations: before the step
        :param step: steps done in this rollout, for the message of an error
        :return: bool, shape (n_envs, mask size)
        :raises ValueError: for masks of a wrong shape, or where an environment has no valid action
        """
        if self._in_observations:
            # A copy: they are kept for longer than a VecEnv may keep its observations
            masks = np.array(observations[MASK_KEY])
        else:
            masks = _stacked(self._ask_envs(), self._shape[1], step)
        # At each step, so that few operations must do for what is as it should be
        if masks.dtype == np.bool_ and masks.shape == self._shape:
            has_choice = np.logical_or.reduceat(masks, self._starts, axis=1)
            if b"\0" not in has_choice.tobytes():
                return masks
        return check_masks(masks, self._sizes, step)

    def _ask_envs(self) -> list[Any]:
        if self._envs is None:
            return self._env.env_method(EXPECTED_METHOD_NAME)
        return [env.get_wrapper_attr(EXPECTED_METHOD_NAME)() for env in self._envs]

    def context(self, masks: np.ndarray) -> dict[str, th.Tensor]:
        """Make keyword arguments for the policy.

        :param masks: as :meth:`ask` returned them
        :return: none where the policy finds the masks among the observations
        """
        if self._policy_finds_them:
            return {}
        tensor = th.from_numpy(masks)
        return {"action_masks": tensor if self._device is None else tensor.to(self._device)}


def _envs_of(env: VecEnv) -> list[gym.Env[Any, Any]] | None:
    """Find the environments to which ``env_method`` does no more than call their method; None: it may do more."""
    while isinstance(env, VecEnvWrapper) and type(env).env_method is VecEnvWrapper.env_method:
        env = env.venv
    if isinstance(env, DummyVecEnv) and type(env).env_method is DummyVecEnv.env_method:
        return env.envs
    return None


def _stacked(given: list[Any], size: int, step: int) -> np.ndarray:
    try:
        masks = np.array(given)
    except ValueError:
        # They have several shapes
        masks = np.empty(0)
    if masks.size == len(given) * size:
        return masks
    for index, mask in enumerate(given):
        if np.size(mask) != size:
            raise ValueError(
                f"action_masks() of env {index} must return the shape ({size},), got {np.shape(mask)} at step {step} "
                "of the rollout"
            )
    return np.array([np.reshape(mask, size) for mask in given])


class MaskFromInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Offers the ``action_mask`` that an environment puts into its infos, as Gymnasium's Taxi does.

    :param env: the environment
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._mask: np.ndarray | None = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(**kwargs)
        self._mask = info["action_mask"]
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:  # noqa: ANN401  # any space's
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._mask = info["action_mask"]
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Return the mask of the last info."""
        return np.asarray(self._mask)


class MaskedPredictor:
    """A model whose ``predict`` asks an environment for masks; everything else is the model's.

    Masks among the observations are taken from there.

    :param model: a PPOPlus model
    :param env: the environment that it acts in: a VecEnv, or a single environment
    :raises ValueError: if the environment has neither a method ``action_masks()`` nor masks among its observations
    """

    def __init__(self, model: Any, env: GymEnv) -> None:  # noqa: ANN401  # PPOPlus, whose module imports this one
        if not has_mask_key(env.observation_space) and not is_masking_supported(env):
            raise ValueError(
                "masked(env) needs a method action_masks() of env (sb3_contrib's ActionMasker adds one) or an "
                f"observation key {MASK_KEY!r}, got {env}"
            )
        vars(self).update(_model=model, _env_with_masks=env)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions, see ``PPOPlus.predict``; the environment is asked where no ``action_masks`` are given."""
        model, env = vars(self)["_model"], vars(self)["_env_with_masks"]
        if action_masks is None and not has_mask_key(env.observation_space):
            action_masks = get_action_masks(env)
        elif action_masks is None and not getattr(model.policy, "has_mask_key", False):
            assert isinstance(observation, dict)
            action_masks = observation[MASK_KEY]
        prediction: tuple[np.ndarray, tuple[np.ndarray, ...] | None] = model.predict(
            observation, state, episode_start, deterministic, action_masks
        )
        return prediction

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the model has
        # An object that is being copied has nothing yet
        if "_model" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["_model"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["_model"], name, value)


def evaluate_with_masks(callback: BaseCallback, model: Any) -> None:  # noqa: ANN401  # PPOPlus
    """Have every ``EvalCallback`` in ``callback`` predict with the masks of its environment, if that offers any.

    sb3-contrib's ``MaskableEvalCallback`` asks for masks by itself.

    :param callback: with everything inside it, see ``callbacks.iterate_callbacks``
    :param model: the model that trains
    """
    for child in iterate_callbacks(callback):
        if not isinstance(child, EvalCallback) or isinstance(child, MaskableEvalCallback):
            continue
        if offers_masks(child.eval_env, model.action_space):
            child.model = MaskedPredictor(model, child.eval_env)  # type: ignore[assignment]  # all that EvalCallback uses


def evaluate_without_masks(callback: BaseCallback, model: Any) -> None:  # noqa: ANN401  # PPOPlus
    """Undo :func:`evaluate_with_masks`."""
    for child in iterate_callbacks(callback):
        if isinstance(child, EvalCallback):
            child.model = model
