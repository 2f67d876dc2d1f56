"""A check of what environments return."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ppo_plus.errors import NonFiniteError


class EnvOutputCheck:
    """Refuses observations and rewards that are not finite.

    :param env: the training environment
    """

    def __init__(self, env: VecEnv) -> None:
        self._normalize = unwrap_vec_normalize(env)

    def __call__(self, observations: Any, rewards: np.ndarray | None, step: int) -> None:  # noqa: ANN401  # array or dict
        """Check what ``step`` or ``reset`` of the vectorised environment has returned.

        :param observations: shape (n_envs, *observation shape), or a dict of such arrays
        :param rewards: shape (n_envs,); None after a reset
        :param step: index of the step in the rollout, for the message
        :raises NonFiniteError: for NaN or infinity; the message names the environment and the step, and the value
            before normalisation where there is a VecNormalize
        """
        normalize = self._normalize
        if rewards is not None:
            # VecEnvs of other packages may return a list
            array = rewards if isinstance(rewards, np.ndarray) else np.asarray(rewards)
            self._check("reward", array, None if normalize is None else normalize.old_reward, step)
        raw: Any = None if normalize is None else normalize.old_obs
        if not isinstance(observations, dict):
            self._check("observation", observations, raw, step)
            return
        for key, array in observations.items():
            self._check(f"observation {key!r}", array, raw.get(key) if isinstance(raw, dict) else raw, step)

    def terminal(self, observation: Any, index: int, step: int) -> None:  # noqa: ANN401  # array or dict
        """Check the last observation of an episode whose value is bootstrapped.

        :param observation: ``infos[index]["terminal_observation"]``
        :param index: index of the environment
        :param step: index of the step in the rollout, for the message
        :raises NonFiniteError: for NaN or infinity; the message names the environment and the step
        """
        for array in observation.values() if isinstance(observation, dict) else (observation,):
            if not np.isfinite(array).all():
                raise NonFiniteError(f"the terminal observation of env {index} at step {step} is {array}")

    def _check(self, name: str, array: np.ndarray, raw: Any, step: int) -> None:  # noqa: ANN401  # array, dict or None
        # A dot product is the cheapest check. It may overflow although all numbers are finite: _raise_at finds out
        if array.dtype.kind == "f" and not math.isfinite(np.vdot(array, array)):
            self._raise_at(name, array, raw, step)
        # VecNormalize may clip infinity to a finite number, so the value before it is checked too
        if isinstance(raw, np.ndarray) and raw.dtype.kind == "f" and not math.isfinite(np.vdot(raw, raw)):
            self._raise_at(name, array, raw, step)

    def _raise_at(self, name: str, array: np.ndarray, raw: Any, step: int) -> None:  # noqa: ANN401  # array, dict or None
        where = tuple(next(iter(np.argwhere(~np.isfinite(array))), ()))
        text = ""
        if isinstance(raw, np.ndarray):
            # Running statistics spread one environment's NaN to all: the value before them shows where it came from
            raw_where = tuple(next(iter(np.argwhere(~np.isfinite(raw))), ()))
            if raw_where:
                where = raw_where if raw.shape == array.shape else (raw_where[0], *where[1:])
            if where:
                text = f"; before VecNormalize it is {raw[where] if raw.shape == array.shape else raw[where[0]]}"
        if not where:
            # All numbers are finite, only the dot product was too large
            return
        position = f" at position {tuple(map(int, where[1:]))}" if len(where) > 1 else ""
        raise NonFiniteError(
            f"the {name} of env {where[0]} at step {step} of the rollout is {array[where]}{position}{text}"
        )
