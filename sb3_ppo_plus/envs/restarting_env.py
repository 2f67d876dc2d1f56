"""A wrapper that replaces an environment when it fails, and a counter of these restarts for the log."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.argument_checks import integer_of_at_least
from sb3_ppo_plus.envs.questions import indices_of_wrapped, values_of_attribute


class RestartingEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Replaces an environment by a new one when its ``step`` or ``reset`` raises an exception.

    A step that fails ends the episode as truncated. It returns the last observation before it, reward 0,
    ``info["env_restarted"] = True`` and the error's text as ``info["env_error"]``. A new environment gets a new seed,
    drawn from the last seed given to ``reset``. Put ``Monitor`` outside: ``Monitor(RestartingEnv(make_env))``, as
    ``make_vec_env(lambda: RestartingEnv(make_env))`` does.

    It cannot be an ``env_wrapper`` of the RL Zoo, which gets an environment that exists already. Register an id whose
    entry point returns it: ``gymnasium.register(id, lambda **kwargs: RestartingEnv(lambda: MyEnv(**kwargs)))``.

    :param make_env: builds the environment
    :param max_restarts: restarts allowed within ``window``; one more failure raises the environment's own error
    :param window: time in seconds over which restarts are counted; None: all restarts count
    :raises TypeError: for a ``make_env`` that is no function
    :raises ValueError: for a ``max_restarts`` that is no integer of at least 0, or a ``window`` that is not above 0
    """

    def __init__(
        self, make_env: Callable[[], gym.Env[Any, Any]], max_restarts: int = 10, window: float | None = 3600.0
    ) -> None:
        if not callable(make_env):
            raise TypeError(
                f"make_env must be a function that builds an environment, got {make_env!r}. As env_wrapper of the RL "
                "Zoo, which is given an environment, RestartingEnv cannot build another: register an id whose "
                "entry_point returns RestartingEnv(make_env)"
            )
        max_restarts = integer_of_at_least(0, "max_restarts", max_restarts)
        if window is not None and not window > 0:
            raise ValueError(f"window must be None or a number of seconds above 0, got {window!r}")
        super().__init__(make_env())
        self.make_env = make_env
        self.max_restarts = max_restarts
        self.window = math.inf if window is None else window
        self.n_restarts = 0
        self._times: deque[float] = deque()
        self._last_observation: Any = None
        self._seeds: np.random.Generator | None = None
        self._is_new = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. If that fails, begin it in a new environment, with ``info["env_restarted"] = True``.

        :param seed: seed of the environment, from which the seeds of later ones are drawn
        :param options: passed to the environment
        """
        if seed is not None:
            self._seeds = np.random.default_rng(seed)
        elif self._is_new:
            seed = self._next_seed()
        has_failed = False
        while True:
            try:
                observation, info = self.env.reset(seed=seed, options=options)
                break
            except Exception as error:
                self._restart(error)
                has_failed, seed = True, self._next_seed()
        self._is_new = False
        self._last_observation = copy.deepcopy(observation)
        return observation, {**info, "env_restarted": True} if has_failed else info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401  # of any space
        """Take a step. If it fails, end the episode as truncated and replace the environment.

        :param action: an action of the environment's action space
        """
        if self._last_observation is None:
            # There is no episode: the error is the caller's mistake, and a new environment would not help
            return self.env.step(action)
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            last_observation, self._last_observation = self._last_observation, None
            self._restart(error)
            info = {"env_restarted": True, "env_error": f"{type(error).__name__}: {error}"}
            return last_observation, 0.0, False, True, info
        self._last_observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info

    def _restart(self, error: Exception) -> None:
        """Replace the environment. Building it may fail too: try again until there were too many restarts."""
        with suppress(Exception):
            self.env.close()
        while True:
            # Not monotonic(): training may be resumed on another machine, where its zero is a different moment
            now = time.time()
            while self._times and not 0 <= now - self._times[0] <= self.window:
                self._times.popleft()
            if len(self._times) >= self.max_restarts:
                error.add_note(
                    f"RestartingEnv gave up: {len(self._times)} restarts in the last {self.window:g} seconds"
                )
                raise error
            self._times.append(now)
            self.n_restarts += 1
            warnings.warn(f"The environment is built anew after {type(error).__name__}: {error}", stacklevel=3)
            try:
                env = self.make_env()
                break
            except Exception as another:
                error = another
        if (env.observation_space, env.action_space) != (self.env.observation_space, self.env.action_space):
            raise ValueError(f"make_env returned an environment with other spaces: {env}") from error
        self.env = env
        self._is_new = True

    def _next_seed(self) -> int | None:
        return None if self._seeds is None else int(self._seeds.integers(2**31))


class RestartCounter:
    """Counts the restarts of all RestartingEnvs in a vectorised environment.

    :param env: the vectorised environment
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self._indices = indices_of_wrapped(env, RestartingEnv)

    def count(self) -> int | None:
        """Return the number of restarts so far; None if no environment can restart."""
        counts = values_of_attribute(self.env, "n_restarts", self._indices) if self._indices else None
        # A VecEnv that claims to have every wrapper returns other things than numbers
        return sum(counts) if counts is not None and all(isinstance(count, int) for count in counts) else None
