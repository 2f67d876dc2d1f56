"""Decides whether a model uses action masks."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.envs.questions import has_attribute, wrappers_of
from sb3_ppo_plus.envs.tensor_vec_env import TensorVecEnv
from sb3_ppo_plus.masking.sources import ActionMaskSource, envs_of
from sb3_ppo_plus.masking.tensor_source import TensorMaskSource
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.policies.flat_actions import parts_of
from sb3_ppo_plus.policies.masked_distributions import can_be_masked, mask_sizes
from sb3_ppo_plus.policies.masks import MASK_KEY, has_mask_key


def offers_masks(env: VecEnv, action_space: spaces.Space[Any]) -> bool:
    """Whether every environment offers action masks, and its actions can be masked.

    :param env: the outermost vectorised environment
    :param action_space: its action space
    """
    if not can_be_masked(action_space):
        return False
    if has_mask_key(env.observation_space):
        return True
    # An attribute of this name need not be a method. Those in subprocesses cannot be looked at
    return has_attribute(env, EXPECTED_METHOD_NAME) and all(
        callable(each.get_wrapper_attr(EXPECTED_METHOD_NAME)) for each in envs_of(env) or ()
    )


def decide_masking(
    action_masking: bool | None, env: VecEnv, action_space: spaces.Space[Any], obstacle: Exception | None
) -> bool:
    """Decide whether to use the masks of an environment.

    :param action_masking: PPOPlus's argument
    :param env: the training environment
    :param action_space: its action space
    :param obstacle: why the model cannot take masks, or None. If masks are required, it is raised. Otherwise it is
        warned of, if the environment offers masks
    :raises ValueError: if masks are required and not offered, or if those among the observations are not valid masks
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
            f"The environments offer action masks, which are not used: {obstacle}. "
            "action_masking=False turns this warning off.",
            stacklevel=2,
        )
        return False
    if is_offered and has_mask_key(env.observation_space):
        check_mask_key(env, action_space)
    return is_offered


def takes_masks(policy_class: type[Any]) -> bool:
    """Whether ``forward`` and ``evaluate_actions`` of a policy class take ``action_masks``.

    :param policy_class: class of the policy
    """
    methods = (policy_class.forward, policy_class.evaluate_actions)
    return all("action_masks" in inspect.signature(method).parameters for method in methods)


def check_mask_key(env: VecEnv, action_space: spaces.Space[Any]) -> None:
    """Check the masks among the observations of an environment.

    :param env: the training environment, with the observation key
    :param action_space: its action space
    :raises ValueError: if their size is not that of the action space's masks, if a VecNormalize changes them, or if
        the observations hold nothing else
    """
    assert isinstance(env.observation_space, spaces.Dict)
    if len(env.observation_space.spaces) == 1:
        raise ValueError(
            f"observations must hold more than the mask, which is no feature, got {env.observation_space}; "
            "with action_masking=False it is a feature"
        )
    shape, size = env.observation_space[MASK_KEY].shape, sum(mask_sizes(action_space))
    if shape is None or int(np.prod(shape)) != size:
        raise ValueError(
            f"the observation key {MASK_KEY!r} must hold a mask of shape ({size},) for {action_space}, got "
            f"{env.observation_space[MASK_KEY]}; with action_masking=False it is a feature"
        )
    for wrapper in wrappers_of(env):
        if isinstance(wrapper, VecNormalize) and wrapper.norm_obs and MASK_KEY in (wrapper.norm_obs_keys or ()):
            raise ValueError(
                f"VecNormalize normalises the observation key {MASK_KEY!r}, which is a mask: give it norm_obs_keys "
                f"without that key, got {wrapper.norm_obs_keys}"
            )


def obstacle_to_masks(model: PlusModel) -> Exception | None:
    """Return why a model cannot take masks, as an error to raise; None if it can.

    :param model: the model
    """
    policy_class, buffer_class = model.policy_class, model.rollout_buffer_class
    if not takes_masks(policy_class):
        return TypeError(f"{policy_class.__name__}'s forward and evaluate_actions lack action_masks")
    if buffer_class is None or not issubclass(buffer_class, PPOPlusRolloutBuffer):
        return TypeError(f"{buffer_class} stores no masks; subclass PPOPlusRolloutBuffer instead")
    leaves = (model.action_space, *(part.space for part in parts_of(model.action_space)))
    has_binary = any(isinstance(space, spaces.MultiBinary) for space in leaves)
    if has_binary and model._built_for_masks is False:
        return ValueError("a model with MultiBinary actions that was built without masks has no logits for them")
    return None


class MaskUse:
    """Decides once for each environment whether a model uses its masks.

    Asking an environment takes time.
    """

    def __init__(self) -> None:
        self._env: VecEnv | None = None
        self._is_used = False
        self._has_warned = False

    def decide(self, env: VecEnv, model: PlusModel) -> bool:
        """Decide whether a model uses the masks of an environment, by :func:`decide_masking`.

        :param env: the training environment
        :param model: the model
        :raises ValueError: see :func:`decide_masking`
        :raises TypeError: if masks are required and the policy or the rollout buffer does not take them
        """
        if self._env is not env:
            obstacle = obstacle_to_masks(model)
            self._is_used = decide_masking(model.action_masking, env, model.action_space, obstacle)
            self._env = env
        return self._is_used

    def builds_for_masks(self, model: PlusModel) -> bool:
        """Whether the policy of a model must be built for masks.

        :param model: the model; one that was saved knows how its policy was built
        """
        uses_masks = model.action_masking is True if model.env is None else self.decide(model.env, model)
        if model._built_for_masks is not None:
            return model._built_for_masks
        return uses_masks and issubclass(model.policy_class, ActorCriticPlusPolicy)

    def source(self, env: VecEnv, model: PlusModel) -> ActionMaskSource | None:
        """Return the source of a rollout's masks; None if the model uses no masks.

        :param env: the training environment
        :param model: the model
        """
        if not self.decide(env, model):
            return None
        model._was_given_masks = True
        if isinstance(env, TensorVecEnv):
            return TensorMaskSource(env, model.action_space, model.policy)
        return ActionMaskSource(env, model.action_space, model.policy)

    def warn_of_no_masks(self, model: PlusModel) -> None:
        """Warn once, if a model was trained with masks and now predicts without masks.

        :param model: the model
        """
        if self._has_warned or not model.needs_masks:
            return
        self._has_warned = True
        warnings.warn(
            "This model was trained with action masks and now predicts without them: call "
            "predict(..., action_masks=...), or use model.masked(env), which asks env for them",
            stacklevel=3,
        )
