"""SB3's VecNormalize for environments on tensors."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_ppo_plus.envs.replaced_statistics import statistics_in
from sb3_ppo_plus.envs.tensor_episodes import StepInfos
from sb3_ppo_plus.envs.tensor_statistics import TensorStatistics, moments_of, take
from sb3_ppo_plus.envs.tensor_vec_env import Observations, TensorStep, TensorVecEnv, arrays_of, is_free_to_wait
from sb3_ppo_plus.trees import tree_map

_SETTINGS = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")


class TensorVecNormalize(VecNormalize, TensorVecEnv):
    """Normalises observations and rewards as SB3's ``VecNormalize`` does, on the environment's device.

    The statistics are those of ``VecNormalize`` but for rounding: here, means of a step are float64 too. SB3's
    callbacks, which copy them to an evaluation environment, take either class.

    :param venv: a TensorVecEnv
    :param arguments: those of ``VecNormalize``
    :raises TypeError: for another environment
    """

    def __init__(self, venv: TensorVecEnv, *arguments: Any, **others: Any) -> None:
        if not isinstance(venv, TensorVecEnv):
            raise TypeError(f"TensorVecNormalize takes a TensorVecEnv, got {venv!r}: use SB3's VecNormalize")
        super().__init__(venv, *arguments, **others)
        self.tensor_env = venv
        self.device, self.generator, self.episodes = venv.device, venv.generator, venv.episodes
        self.old_obs: Any = None
        self.old_reward: Any = None
        self.returns: Any = th.zeros(self.num_envs, dtype=th.float64, device=self.device)

    @classmethod
    def of(cls, normalize: VecNormalize, venv: TensorVecEnv) -> Self:
        """Make one with the settings and a copy of the statistics of a ``VecNormalize``.

        :param normalize: SB3's class, or ours
        :param venv: the environment to wrap, with the same observation space
        """
        made = cls(venv, **{name: getattr(normalize, name) for name in _SETTINGS})
        _copy_statistics(normalize, made)
        return made

    def as_vec_normalize(self, venv: VecEnv) -> VecNormalize:
        """Return SB3's class with the same settings and a copy of the statistics, to save it, for example.

        :param venv: the environment to wrap, with the same observation space
        """
        made = VecNormalize(venv, **{name: getattr(self, name) for name in _SETTINGS})
        _copy_statistics(self, made)
        return made

    def reset_tensor(self) -> Observations:
        """Begin an episode in each environment, and return normalised observations."""
        observations = self.tensor_env.reset_checked()
        self.old_obs = observations
        self.returns = th.zeros_like(self.returns)
        self._learn_observations(observations)
        normalized: Observations = self._normalized(observations)
        return normalized

    def reset_checked(self) -> Observations:
        """See :meth:`TensorVecEnv.reset_checked`."""
        return self.reset_tensor()

    def step_tensor(self, actions: th.Tensor) -> TensorStep:
        """Step each environment, and normalise what it returns."""
        return self.step_checked(actions)[0]

    def step_checked(self, actions: th.Tensor) -> tuple[TensorStep, StepInfos]:
        """See :meth:`TensorVecEnv.step_checked`. Episodes are counted before rewards are normalised."""
        step, infos = self.tensor_env.step_checked(actions)
        self.old_obs, self.old_reward = step.observations, step.rewards
        self._learn_observations(step.observations)
        if self.training:
            self.returns = self.returns * self.gamma + step.rewards
            take(self._statistics("ret_rms"), self.returns)
        rewards, final = step.rewards, step.final_observations
        if self.norm_reward:
            _, var = moments_of(self._statistics("ret_rms"), self.device)
            rewards = (rewards / (var + self.epsilon).sqrt()).clamp(-self.clip_reward, self.clip_reward)
        if final is not None and not (is_free_to_wait(self.device) and not bool(infos.dones.any())):
            final = self._normalized(final)
        self.returns = self.returns.masked_fill(infos.dones, 0.0)
        infos.final_observations = final
        normalized = step._replace(
            observations=self._normalized(step.observations), rewards=rewards.float(), final_observations=final
        )
        return normalized, infos

    def _learn_observations(self, observations: Any) -> None:  # noqa: ANN401  # tensor or dict
        if self.training and self.norm_obs:
            statistics = self._statistics("obs_rms")
            for key, each in statistics.items() if isinstance(statistics, dict) else [(None, statistics)]:
                take(each, observations if key is None else observations[key])

    def _normalized(self, observations: Any) -> Any:  # noqa: ANN401  # tensor or dict
        if not self.norm_obs:
            return observations
        statistics = self._statistics("obs_rms")
        if not isinstance(statistics, dict):
            return self._normalized_part(observations, statistics)
        return {
            key: self._normalized_part(part, statistics[key]) if key in statistics else part
            for key, part in observations.items()
        }

    def _normalized_part(self, part: th.Tensor, statistics: RunningMeanStd) -> th.Tensor:
        mean, var = moments_of(statistics, self.device)
        return ((part - mean) / (var + self.epsilon).sqrt()).clamp(-self.clip_obs, self.clip_obs).float()

    def _statistics(self, name: str) -> Any:  # noqa: ANN401  # statistics, or a dict of them
        """Return statistics, on the device. Others may have put those of SB3 in their place."""
        found = vars(self)[name]
        of_keys = found if isinstance(found, dict) else {None: found}
        if any(type(each) is RunningMeanStd for each in of_keys.values()):
            own = {
                key: TensorStatistics(each, self.device) if type(each) is RunningMeanStd else each
                for key, each in of_keys.items()
            }
            vars(self)[name] = found = own if isinstance(found, dict) else own[None]
        return found

    def reset(self) -> np.ndarray | dict[str, np.ndarray]:
        """See :meth:`TensorVecEnv.reset`."""
        first: Any = TensorVecEnv.reset(self)
        arrays: np.ndarray | dict[str, np.ndarray] = first
        return arrays

    def step_async(self, actions: np.ndarray) -> None:
        """See :meth:`TensorVecEnv.step_async`."""
        TensorVecEnv.step_async(self, actions)

    def step_wait(self) -> VecEnvStepReturn:
        """See :meth:`TensorVecEnv.step_wait`."""
        return TensorVecEnv.step_wait(self)

    def get_original_obs(self) -> Any:  # noqa: ANN401  # array or dict
        """Return the observations of the last step before they were normalised, as arrays."""
        return arrays_of(self.old_obs)

    def get_original_reward(self) -> np.ndarray:
        """Return the rewards of the last step before they were normalised, as an array."""
        original: np.ndarray = arrays_of(self.old_reward)
        return original

    def set_venv(self, venv: VecEnv) -> None:
        """Not supported: what is saved is SB3's class."""
        raise ValueError("a TensorVecNormalize is not loaded: use TensorVecNormalize.of(VecNormalize.load(...), venv)")

    def save(self, save_path: str) -> None:
        """Save what SB3's ``VecNormalize.save`` would save; ``VecNormalize.load`` and :meth:`of` load it.

        :param save_path: the file
        """
        self.as_vec_normalize(self.tensor_env).save(save_path)

    def get_resume_state(self) -> dict[str, Any]:
        """Return statistics and running returns, as plain values and tensors."""
        return {**tree_map(_numbers_of, statistics_in(self)), "returns": self.returns.cpu()}

    def set_resume_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`get_resume_state` has returned.

        :param state: its values, which may be hostile
        :raises ValueError: for statistics of another shape
        """
        for name in ("obs_rms", "ret_rms"):
            found = vars(self).get(name)
            if isinstance(found, dict):
                for key, each in found.items():
                    _set_numbers(each, state[name][key], f"{name}[{key!r}]")
            elif found is not None:
                _set_numbers(found, state[name], name)
        returns = state["returns"]
        if not isinstance(returns, th.Tensor) or returns.shape != self.returns.shape:
            raise ValueError(f"returns must be a tensor of {self.num_envs} numbers, got {returns!r:.80}")
        self.returns = returns.to(self.returns)


def _copy_statistics(source: VecNormalize, target: VecNormalize) -> None:
    vars(target).update(tree_map(lambda each: each.copy(), statistics_in(source)))


def _numbers_of(statistics: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.array(statistics.mean), "var": np.array(statistics.var), "count": float(statistics.count)}


def _set_numbers(statistics: RunningMeanStd, numbers: Any, name: str) -> None:  # noqa: ANN401  # may be hostile
    for part in ("mean", "var"):
        given, shape = np.asarray(numbers[part]), np.shape(getattr(statistics, part))
        if given.dtype.kind != "f" or given.shape != shape or not np.isfinite(given).all():
            raise ValueError(f"{part} of {name} must be finite numbers of shape {shape}")
    count = numbers["count"]
    if not isinstance(count, float) or not 0 <= count < np.inf or (np.asarray(numbers["var"]) < 0).any():
        raise ValueError(f"{name} must have a count and variances that are not negative")
    statistics.mean, statistics.var, statistics.count = numbers["mean"], numbers["var"], count
