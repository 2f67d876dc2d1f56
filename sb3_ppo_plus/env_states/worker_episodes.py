"""What a checkpoint holds of workers that may be started anew: without it, two episodes could become one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_ppo_plus.env_states.generator_state import generator_state, restored_generator
from sb3_ppo_plus.env_states.untrusted_state import may_replace
from sb3_ppo_plus.envs.restarting_remote import Episode, episodes_of, known_episodes


def episode_states(env: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # a VecEnv, or what one of another package wraps
    """Copy what the main process knows of the episodes of workers that may be started anew.

    As with other environments, the info of a reset is not saved.

    :param env: the innermost vectorised environment
    :return: plain values for each worker; empty if no worker could be started anew
    """
    states = []
    for episode in known_episodes(env):
        space = env.observation_space
        states.append(
            {
                "seeds": None if episode.seeds is None else generator_state(episode.seeds),
                "last_observation": _plain(space, episode.last_observation),
                "begun": None if episode.begun is None else _plain(space, episode.begun[0]),
                "reason": episode.reason,
            }
        )
    return states


def set_episode_states(env: Any, states: list[dict[str, Any]], trusted: bool) -> list[str]:  # noqa: ANN401  # see above
    """Put back what is known of the episodes, after the states of the environments.

    :param env: the innermost vectorised environment
    :param states: what :func:`episode_states` has returned
    :param trusted: False: observations must be some of the environments', and texts are not put back
    :return: names of what was left out
    """
    is_pending = any(state["begun"] is not None for state in states)
    if not isinstance(env, SubprocVecEnv):
        if is_pending:
            warnings.warn(
                "a worker had just been started anew when the checkpoint was written. Without a SubprocVecEnv, its "
                "episode and the next one become one",
                stacklevel=2,
            )
        return []
    if not states:
        # The run before could start no worker anew
        return []
    # One that starts no workers anew ends these episodes, but needs to know of no others
    episodes = episodes_of(env, None) if is_pending else known_episodes(env)
    left_out: set[str] = set()
    for episode, state in zip(episodes, states, strict=bool(episodes)):
        _set_episode(episode, state, None if trusted else env.observation_space, left_out)
    return sorted(left_out)


def _set_episode(episode: Episode, state: dict[str, Any], space: spaces.Space[Any] | None, left_out: set[str]) -> None:
    """Put back one state. With a space, observations that are not of it are left out."""
    observations = {name: state[name] for name in ("last_observation", "begun")}
    if space is not None:
        # Sampling from the space itself would change its generator
        sample = _plain(space, copy.deepcopy(space).sample())
        for name, value in observations.items():
            if value is not None and not may_replace(sample, value):
                left_out.add(f"{name} of a worker")
                observations[name] = None
    seeds = state["seeds"]
    if seeds is not None:
        restored = restored_generator(np.random.default_rng(0), seeds)
        if isinstance(restored, np.random.Generator):
            episode.seeds = restored
    episode.last_observation, begun = observations["last_observation"], observations["begun"]
    episode.begun = None if begun is None else (begun, {})
    episode.reason = state["reason"] if space is None else "the worker was started anew"


def _plain(space: spaces.Space[Any], observation: Any) -> Any:  # noqa: ANN401  # any observation
    """Turn an observation into arrays, whatever objects the environment returns that NumPy understands."""
    if observation is None:
        return None
    if isinstance(space, spaces.Dict):
        return {key: _plain(part, observation[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_plain(part, item) for part, item in zip(space.spaces, observation, strict=True))
    return np.array(observation)
