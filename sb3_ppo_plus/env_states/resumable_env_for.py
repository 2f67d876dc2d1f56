"""A ResumableEnv for any environment, with which a training run begins in any case."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym

from sb3_ppo_plus.env_states.episode_recorder import chain_of
from sb3_ppo_plus.env_states.resumable_env import ResumableEnv


def resumable_env_for(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Wrap an environment so that a run with it goes on exactly after a resume, if that is possible.

    After the first reset, the wrapper chooses the way: by state if all attributes of the environment can be saved, else
    by replay. If neither can be, or the proof finds a difference, a :class:`TrainingCheckpoint` warns of it when
    training starts, and episodes begin anew at a resume. Bits of training are changed only where the proof finds a
    difference: its steps have then moved what is not saved, such as a generator in a module.

    It is made for ``make_vec_env(env_id, wrapper_class=resumable_env_for)``.

    :param env: the environment, with its wrappers
    :return: a :class:`ResumableEnv`; or ``env`` itself if one of its layers is one, or saves itself outermost, and with
        a warning if it is no Gymnasium environment
    """
    if not isinstance(env, gym.Env):
        warnings.warn(
            f"a {type(env).__name__} is no gymnasium.Env, so it is not saved in checkpoints: its episodes begin anew "
            "at a resume",
            stacklevel=2,
        )
        return env
    if any(isinstance(layer, ResumableEnv) for layer in chain_of(env)):
        return env
    return ResumableEnv(env, by="auto")
