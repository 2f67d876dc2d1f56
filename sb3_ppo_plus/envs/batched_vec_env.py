"""Environments of ``gymnasium.vector``, which step in batches, as a VecEnv of SB3."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_ppo_plus.envs.batches import check_spaces, checked_counts, episode_info, observation_parts, row_of
from sb3_ppo_plus.envs.members import Members, members_of
from sb3_ppo_plus.envs.questions import base_of
from sb3_ppo_plus.envs.replaced_statistics import StatisticsOfSome, replaced_statistics
from sb3_ppo_plus.envs.vector_infos import FINAL_OBSERVATIONS, infos_of_envs
from sb3_ppo_plus.trees import tree_leaves, tree_map


class BatchedVecEnv(VecEnv):
    """A ``gymnasium.vector`` environment as a VecEnv. As there, ``step`` begins new episodes by itself.

    Where an environment is done, ``step`` returns the first observation of the next episode, and ``infos`` has the last
    one of the episode that ended, as with SB3's ``DummyVecEnv``. Episodes are counted as SB3's ``Monitor`` does.

    Some environments can begin an episode only in the step after (``AutoresetMode.NEXT_STEP``). That step is no
    transition: the action has no effect, and the reward is 0. Then the first of the two steps returns the last
    observation. The second returns done again, and ``was_reset`` says so.

    :param env: the environment
    :raises ValueError: for an observation or action space that SB3 does not know, or EnvPool's asynchronous mode
    """

    was_reset: np.ndarray
    """Which environments only began an episode in the last step, shape (n_envs,): their rows are no transitions."""
    is_last: np.ndarray
    """Which environments have returned the last observation of an episode, and will begin one in the next step."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if getattr(env, "is_async", False):
            raise ValueError(f"{env}: EnvPool must have batch_size equal to num_envs={env.num_envs}")
        self.env: Any = env
        self._members: Members = members_of(env)
        self._mode = _autoreset_mode(env)
        self._resets_some = self._mode is AutoresetMode.DISABLED or (
            self._mode is AutoresetMode.NEXT_STEP and _can_reset_some(env)
        )
        self.has_reset_rows = self._mode is AutoresetMode.NEXT_STEP and not self._resets_some
        """Whether the environment takes a step to begin an episode."""
        self._actions: Any = None
        self._is_envpool = _is_envpool(env)
        self._is_batch_of_structures = isinstance(env.single_action_space, spaces.Tuple | spaces.Dict)
        # Of Gymnasium's own, copy=True gives new arrays at each step. What wrappers do is not known
        inner = _inside_statistics(env)
        self._gives_copies = type(inner) in (SyncVectorEnv, AsyncVectorEnv) and inner.copy is True
        check_spaces(env, env.single_observation_space, env.single_action_space, takes_hybrid=True)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._shapes = [
            (key, (self.num_envs, *(part.shape or ()))) for key, part in observation_parts(env.single_observation_space)
        ]
        self._begin_counting()

    def _begin_counting(self) -> None:
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self.is_last = np.zeros(self.num_envs, bool)
        self.was_reset = np.zeros(self.num_envs, bool)
        self._start = time.time()

    def reset(self) -> VecEnvObs:
        """Begin an episode in each environment. The seeds of ``seed`` are used once."""
        seeds, options = self._seeds, self._options
        arguments: dict[str, Any] = {}
        if any(seed is not None for seed in seeds):
            # Those that consist of single environments take a seed for each
            arguments["seed"] = list(seeds) if self._members.exist else seeds[0]
        if any(options):
            if any(other != options[0] for other in options):
                raise ValueError(f"{self.env} takes the same options for all environments, got {options}")
            arguments["options"] = dict(options[0])
        observations, infos = self._members.reset(arguments)
        self._begin_counting()
        self.reset_infos = infos_of_envs(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        first: VecEnvObs = self._own(observations)
        return first

    def step_async(self, actions: Any) -> None:  # noqa: ANN401  # an array, or a list of structures
        """Keep the actions for :meth:`step_wait`.

        :param actions: shape (n_envs, *action shape); for a Tuple or Dict action space a list of structures
        """
        if self._is_batch_of_structures:
            empty: Any = create_empty_array(self.action_space, self.num_envs)
            actions = concatenate(self.action_space, actions, empty)
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all environments.

        :return: observations, rewards and dones of all, and an info for each
        :raises ValueError: for rewards or ends of episodes of a wrong shape
        """
        observations, rewards, terminated, truncated, vector_infos = self.env.step(self._actions)
        self._check_shapes(observations, rewards, terminated, truncated)
        observations = self._own(observations)
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        dones = terminated | truncated
        infos = infos_of_envs(vector_infos, self.num_envs)
        self._returns += rewards
        self._lengths += 1
        if self.has_reset_rows:
            self.was_reset, self.is_last = self.is_last, dones
        if self.was_reset.any():
            self._after_reset_rows(observations, infos)
        if dones.any():
            observations = self._after_ends(observations, dones, truncated & ~terminated, infos)
        return observations, np.array(rewards, np.float32), dones | self.was_reset, infos

    def _check_shapes(self, observations: Any, *numbers: Any) -> None:  # noqa: ANN401  # what an environment gives
        for name, array in zip(("rewards", "terminated", "truncated"), numbers, strict=True):
            if np.shape(array) != (self.num_envs,):
                raise ValueError(f"{self.env}: {name} must have the shape ({self.num_envs},), got {np.shape(array)}")
        for key, expected in self._shapes:
            array = observations if key is None else observations[key]
            if np.shape(array) != expected:
                where = "" if key is None else f"[{key!r}]"
                raise ValueError(
                    f"{self.env}: observations{where} must have the shape {expected}, got {np.shape(array)}"
                )

    def _after_reset_rows(self, observations: Any, infos: list[dict[str, Any]]) -> None:  # noqa: ANN401  # array or dict
        for index in self.was_reset.nonzero()[0].tolist():
            self.reset_infos[index] = infos[index]
            # Wrappers of VecEnvs look for it where done is True
            infos[index] = {"terminal_observation": row_of(observations, index)}
        self._returns[self.was_reset] = 0.0
        self._lengths[self.was_reset] = 0

    def _after_ends(
        self,
        observations: Any,  # noqa: ANN401  # array or dict
        dones: np.ndarray,
        only_truncated: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> Any:  # noqa: ANN401  # array or dict
        """Complete the infos of episodes that have ended, and begin new ones where the environment does not.

        :return: observations, with first ones of new episodes
        """
        for index in dones.nonzero()[0].tolist():
            info = infos[index]
            if self._mode is AutoresetMode.SAME_STEP:
                info = self._info_before_reset(index, info)
            else:
                info["terminal_observation"] = row_of(observations, index)
            info["TimeLimit.truncated"] = bool(only_truncated[index])
            counts = (float(self._returns[index]), int(self._lengths[index]), time.time() - self._start)
            info.setdefault("episode", episode_info(*counts))
            infos[index] = info
        self._returns[dones] = 0.0
        self._lengths[dones] = 0
        return self._reset_some(observations, dones) if self._resets_some else observations

    def _info_before_reset(self, index: int, info: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in FINAL_OBSERVATIONS if name in info]
        if not names:
            raise ValueError(
                f"{self.env} has autoreset_mode={self._mode}, but environment {index} is done without "
                f"{FINAL_OBSERVATIONS[0]!r} in its info: {sorted(info)}"
            )
        final = dict(info.pop("final_info", {}))
        final["terminal_observation"] = info.pop(names[0])
        self.reset_infos[index] = info
        return final

    def _reset_some(self, observations: Any, dones: np.ndarray) -> Any:  # noqa: ANN401  # array or dict
        first, infos = self.env.reset(options={"reset_mask": dones})
        if self._is_envpool:
            # It gives the rows of these environments only
            for stored, given in zip(tree_leaves(observations), tree_leaves(first), strict=True):
                stored[dones] = given
            return observations
        for index, info in enumerate(infos_of_envs(infos, self.num_envs)):
            if dones[index]:
                self.reset_infos[index] = info
        return self._own(first)

    def _own(self, observations: Any) -> Any:  # noqa: ANN401  # array or dict
        """Copy observations, if the environment may write the next ones into these arrays."""
        return observations if self._gives_copies else tree_map(np.array, observations)

    def running_episodes(self) -> dict[str, Any]:
        """Return what the episodes that go on have brought so far, as plain values."""
        return {
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "is_last": self.is_last.tolist(),
            "seconds": time.time() - self._start,
        }

    def set_running_episodes(self, episodes: dict[str, Any]) -> None:
        """Put back what :meth:`running_episodes` has returned.

        :param episodes: its values, which may be hostile
        :raises ValueError: if they are not those of so many environments
        """
        numbers = checked_counts(self.env, episodes, self.num_envs, ("returns", "lengths", "is_last", "seconds"))
        self._returns, self._lengths = numbers["returns"].astype(np.float64), numbers["lengths"].astype(np.int64)
        self.is_last = numbers["is_last"]
        self._start = time.time() - float(numbers["seconds"])

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return an image of each environment that renders one."""
        images: Any = self.env.render()
        return list(images) if isinstance(images, tuple | list) else [images]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Get an attribute of some environments, see SB3's ``VecEnv``.

        Where the vector environment does not consist of single ones, it is its own.
        """
        if attr_name == "render_mode":
            return [self.env.render_mode] * len(self._indices(indices))
        return self._members.get(attr_name, self._indices(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:  # noqa: ANN401  # SB3's
        """Set an attribute of some environments, see SB3's ``VecEnv``."""
        self._members.set(attr_name, value, self._indices(indices))

    def has_attr(self, attr_name: str) -> bool:
        """Whether each environment has an attribute."""
        return self._members.have(attr_name)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of some environments, see SB3's ``VecEnv``."""
        return self._members.call(method_name, self._indices(indices), method_args, method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether environments have a wrapper. It is True for ``Monitor``, whose work this class does."""
        if issubclass(wrapper_class, Monitor):
            return [True] * len(self._indices(indices))
        return self._members.are_wrapped(wrapper_class, self._indices(indices))

    def _indices(self, indices: VecEnvIndices) -> list[int]:
        found: Iterable[int] = self._get_indices(indices)
        return list(found)


def resetting_env_in(env: VecEnv | None) -> BatchedVecEnv | None:
    """Return the environment inside all wrappers, if some of its steps only begin episodes.

    :param env: the outermost vectorised environment
    """
    base = None if env is None else base_of(env)
    return base if isinstance(base, BatchedVecEnv) and base.has_reset_rows else None


@contextmanager
def statistics_of_transitions(env: VecEnv | None) -> Iterator[None]:
    """Keep the steps that only begin episodes out of the statistics of a VecNormalize around an environment.

    They are then those of the same environments that begin episodes at once: last observations of episodes do not
    count there either.

    :param env: the outermost vectorised environment
    """
    resetting = resetting_env_in(env)
    if resetting is None:
        yield
        return
    rows = {"obs_rms": lambda: ~resetting.is_last, "ret_rms": lambda: ~resetting.was_reset}
    with replaced_statistics(env, lambda name, own: StatisticsOfSome(own, rows[name])):
        yield


def _autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    mode = env.metadata.get("autoreset_mode")
    if isinstance(mode, AutoresetMode):
        return mode
    warnings.warn(
        f"{env} has no metadata['autoreset_mode'] of gymnasium.vector.AutoresetMode, got {mode!r}: NEXT_STEP is taken",
        stacklevel=4,
    )
    return AutoresetMode.NEXT_STEP


def _can_reset_some(env: VectorEnv[Any, Any, Any]) -> bool:
    """Whether single environments can be reset although they would do so by themselves in the next step."""
    if _is_envpool(env):
        return True
    # Other wrappers may count the observations of all environments again
    inner = _inside_statistics(env)
    # Without shared memory, workers of AsyncVectorEnv would reset once more
    return type(inner) is SyncVectorEnv or (type(inner) is AsyncVectorEnv and inner.shared_memory)


def _inside_statistics(env: VectorEnv[Any, Any, Any]) -> Any:  # noqa: ANN401  # a VectorEnv, of which some have further attributes
    while type(env) is RecordEpisodeStatistics:
        env = env.env
    return env


def _is_envpool(env: VectorEnv[Any, Any, Any]) -> bool:
    return all(hasattr(env, name) for name in ("send", "recv", "xla", "all_env_ids"))
