"""The environments of an entry of hyperparameters, made as the RL Zoo makes them: for training and for scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
from rl_zoo3.utils import get_wrapper_class
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, unwrap_vec_normalize

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.errors import PlainStateError

FIRST_EVALUATION_SEED = 10_000_000
"""Episode i of every evaluation begins with this seed plus i."""

Wrapper = Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]


class FixedStarts(gym.Wrapper[Any, Any, Any, Any]):
    """Begins episode i with the seed ``first_seed + i``, whatever seed ``reset`` is given.

    :param env: the environment
    :param first_seed: seed of the first episode
    """

    def __init__(self, env: gym.Env[Any, Any], first_seed: int = FIRST_EVALUATION_SEED) -> None:
        super().__init__(env)
        self._next_seed = first_seed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode.

        :param seed: not used
        :param options: handed on
        """
        observation, info = self.env.reset(seed=self._next_seed, options=options)
        self._next_seed += 1
        return observation, info


@dataclass
class ZooEnvs:
    """What an entry says about its environments.

    :param env_id: Gymnasium's id
    :param n_envs: number of environments for training
    :param normalize: arguments of VecNormalize; None: no VecNormalize
    :param frame_stack: number of stacked observations
    :param wrapper: the entry's ``env_wrapper``
    """

    env_id: str
    n_envs: int = 1
    normalize: dict[str, Any] | None = None
    frame_stack: int = 1
    wrapper: Wrapper | None = field(default=None, repr=False)

    @classmethod
    def take_from(cls, entry: dict[str, Any], env_id: str) -> "ZooEnvs":
        """Take out of an entry what is about environments; the algorithm's arguments are left in it.

        :param entry: hyperparameters as the RL Zoo writes them; changed
        :param env_id: Gymnasium's id
        """
        register_envs(env_id)
        entry.pop("n_timesteps", None)
        normalize = entry.pop("normalize", False)
        if isinstance(normalize, str):
            # The RL Zoo's own file has a Python expression here
            normalize = eval(normalize)
        settings: dict[str, Any] | None = None
        if normalize:
            settings = dict(normalize) if isinstance(normalize, dict) else {}
            settings["gamma"] = entry.get("gamma", 0.99)
        wrapper = get_wrapper_class(entry)
        entry.pop("env_wrapper", None)
        return cls(env_id, int(entry.pop("n_envs", 1)), settings, int(entry.pop("frame_stack", 1)), wrapper)

    def for_training(self, seed: int, resumable: bool = False) -> VecEnv:
        """Make the training environments; environment i gets the seed ``seed + i``.

        :param seed: seed of the first one
        :param resumable: put :class:`ResumableEnv` around each
        """
        return self._make(self.n_envs, seed, ResumableEnv if resumable else None)

    def for_evaluation(self, trained_on: VecEnv, seed: int = 0, outermost: Wrapper | None = FixedStarts) -> VecEnv:
        """Make one environment for scores: rewards as they are, observations normalised as at the end of training.

        :param trained_on: the training environments, whose statistics are used and stay as they are
        :param seed: seed of the environment, which FixedStarts makes ineffective
        :param outermost: wrapper of the environment
        """
        env = self._make(1, seed, outermost)
        ours, theirs = unwrap_vec_normalize(env), unwrap_vec_normalize(trained_on)
        if ours is not None and theirs is not None:
            ours.training, ours.norm_reward = False, False
            if theirs.norm_obs:
                ours.obs_rms = theirs.obs_rms
        return env

    def can_be_saved(self) -> bool:
        """Whether :class:`ResumableEnv` can save the state of such an environment; asks one that it makes for this."""
        env: VecEnv = self._make(1, 0, ResumableEnv)
        try:
            env.reset()
            env.env_method("get_resume_state")
        except PlainStateError:
            return False
        finally:
            env.close()
        return True

    def _make(self, n_envs: int, seed: int, outermost: Wrapper | None) -> VecEnv:
        def wrap(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
            inner = env if self.wrapper is None else self.wrapper(env)
            return inner if outermost is None else outermost(inner)

        env: VecEnv = make_vec_env(self.env_id, n_envs=n_envs, seed=seed, wrapper_class=wrap)
        if self.normalize is not None:
            env = VecNormalize(env, **self.normalize)
        return VecFrameStack(env, self.frame_stack) if self.frame_stack > 1 else env


def register_envs(env_id: str) -> None:
    """Register the RL Zoo's environments and those of memory_envs.py, if ``env_id`` is not known yet.

    :param env_id: Gymnasium's id
    """
    if env_id not in gym.registry:
        import memory_envs  # noqa: F401  # registers TMaze-v0 and CueAndMask-v0
        import rl_zoo3.import_envs  # noqa: F401  # registers CartPoleNoVel-v1 and the like
