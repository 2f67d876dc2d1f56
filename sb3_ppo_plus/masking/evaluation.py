"""Predicting and evaluating with the masks of an environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME, get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.envs.questions import has_attribute
from sb3_ppo_plus.masking.usage import offers_masks
from sb3_ppo_plus.policies.flat_actions import parts_of
from sb3_ppo_plus.policies.mask_layout import flat_mask
from sb3_ppo_plus.policies.masks import MASK_KEY, has_mask_key


class MaskedPredictor:
    """A model whose ``predict`` asks an environment for action masks. All other attributes are the model's.

    If the observations hold the masks, they are taken from the observations.

    :param model: a PPOPlus model
    :param env: the environment that it acts in: a VecEnv, or a single environment
    :raises ValueError: if the environment has neither a method ``action_masks()`` nor masks among its observations
    """

    def __init__(self, model: Any, env: GymEnv) -> None:  # noqa: ANN401  # PPOPlus, whose module imports this one
        has_method = has_attribute(env, EXPECTED_METHOD_NAME) if isinstance(env, VecEnv) else is_masking_supported(env)
        if not has_mask_key(env.observation_space) and not has_method:
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
        """Choose actions as ``PPOPlus.predict`` does, with the environment's masks if none are given.

        :param observation: of one environment or of several, or a dict of such arrays
        :param state: state of the policy's memory, if it has one
        :param episode_start: where an episode begins, shape (n_envs,)
        :param deterministic: whether to choose the most likely actions
        :param action_masks: True where an action is valid; None: ask the environment
        :return: actions, and the next state of the memory
        """
        model, env = vars(self)["_model"], vars(self)["_env_with_masks"]
        if action_masks is None and not has_mask_key(env.observation_space):
            action_masks = get_action_masks(env) if not parts_of(env.action_space) else _masks_of_structures(env)
        elif action_masks is None and not getattr(model.policy, "has_mask_key", False):
            assert isinstance(observation, dict)
            action_masks = observation[MASK_KEY]
        prediction: tuple[np.ndarray, tuple[np.ndarray, ...] | None] = model.predict(
            observation, state, episode_start, deterministic, action_masks
        )
        return prediction

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the model has
        # copy.copy asks a new object for attributes before it has any
        if "_model" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["_model"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["_model"], name, value)


def _masks_of_structures(env: GymEnv) -> Any:  # noqa: ANN401  # what the environments return
    if isinstance(env, VecEnv):
        return [flat_mask(env.action_space, mask) for mask in env.env_method(EXPECTED_METHOD_NAME)]
    return env.get_wrapper_attr(EXPECTED_METHOD_NAME)()


def evaluate_with_masks(callback: BaseCallback, model: Any) -> None:  # noqa: ANN401  # PPOPlus
    """If a model uses masks, let every ``EvalCallback`` predict with those of its environment, if it offers any.

    sb3-contrib's ``MaskableEvalCallback`` asks for masks by itself.

    :param callback: the callback of ``learn``, with all callbacks inside it
    :param model: the model that is trained
    """
    if model.env is None or not model._mask_use.decide(model.env, model):
        return
    for child in iterate_callbacks(callback):
        if not isinstance(child, EvalCallback) or isinstance(child, MaskableEvalCallback):
            continue
        if offers_masks(child.eval_env, model.action_space):
            child.model = MaskedPredictor(model, child.eval_env)  # type: ignore[assignment]  # no BaseAlgorithm


def evaluate_without_masks(callback: BaseCallback, model: Any) -> None:  # noqa: ANN401  # PPOPlus
    """Undo :func:`evaluate_with_masks`.

    :param callback: the callback of ``learn``, with all callbacks inside it
    :param model: the model that is trained
    """
    for child in iterate_callbacks(callback):
        if isinstance(child, EvalCallback):
            child.model = model
