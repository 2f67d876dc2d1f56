"""What environments gave before a VecNormalize, and the statistics with which each step of it was normalised."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeAlias

import numpy as np
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus.attributes import PlusModel

Moments: TypeAlias = dict[str | None, tuple[np.ndarray, np.ndarray]]
"""Mean and variance of each normalised key; an observation that is no Dict has the single key None."""


class OriginalObservations:
    """Follows the last observations of a model during its rollouts. The rollout buffer calls it at each step.

    What it knows of the last observations is in ``model._last_original_obs``, which a checkpoint holds, and in
    ``moments``.

    :param model: the model, whose environments were reset
    :param normalize: its VecNormalize
    """

    def __init__(self, model: PlusModel, normalize: VecNormalize) -> None:
        self._model = model
        self.normalize = normalize
        self._steps: list[tuple[Any, Moments]] = []
        self._followed: Any = None
        self.moments: Moments = {}
        """The statistics with which the last observations were normalised."""

    def begin_learning(self) -> None:
        """Find out what the last observations are, unless they are those of the last step that was added."""
        last, original = self._model._last_obs, self._model._last_original_obs
        if original is not None and original is self._followed:
            return
        self.moments = moments_of(self.normalize)
        for known in (original, self.normalize.get_original_obs()):
            if known is not None and _are_close(self.normalized(known, self.moments), last):
                self._follow(known)
                return
        # The model has these observations of other environments, or of an earlier version
        self._follow(self.normalize.unnormalize_obs(last))

    def _follow(self, original: Any) -> None:  # noqa: ANN401  # array or dict
        self._followed = self._model._last_original_obs = original

    def state(self) -> list[tuple[str | None, np.ndarray, np.ndarray]]:
        """Return the statistics of the last observations as plain values, for a checkpoint.

        Where several processes have merged their statistics after a rollout, these are no longer the normaliser's.
        """
        return [(key, *moments) for key, moments in self.moments.items()]

    def set_state(self, state: object) -> None:
        """Go on from the last observations of a checkpoint, which the model has already.

        :param state: what :meth:`state` has returned
        :raises ValueError: for statistics of other keys or shapes, or with impossible numbers
        """
        own = moments_of(self.normalize)
        if not isinstance(state, list) or not all(_is_moments(entry, own) for entry in state) or len(state) != len(own):
            raise ValueError(f"original_observations must be mean and variance of each of {[*own]}")
        self.moments = {key: (mean, var) for key, mean, var in state}
        self._followed = self._model._last_original_obs

    def add(self, step: int) -> None:
        """Note a step whose outcome the environments have returned: the observations before it, and those after it.

        :param step: number of the step in the rollout; those after it are forgotten
        """
        self._steps[step:] = [(self._followed, self.moments)]
        self.moments = moments_of(self.normalize)
        self._follow(self.normalize.get_original_obs())

    def rows(self, steps: np.ndarray, envs: np.ndarray) -> Any:  # noqa: ANN401  # array or dict
        """Return what the environments gave before steps of the rollout.

        :param steps: number of the step in the rollout, shape (batch,)
        :param envs: index of the environment, shape (batch,)
        :return: shape (batch, *observation shape), or a dict of such arrays
        """
        originals = [_by_key(original) for original, _ in self._steps]
        rows = {key: np.stack([original[key] for original in originals])[steps, envs] for key in originals[0]}
        return rows if isinstance(self._followed, dict) else rows[None]

    def moments_of_rows(self, steps: np.ndarray) -> Moments:
        """Return the statistics with which the observations before steps of the rollout were normalised.

        :param steps: number of the step in the rollout, shape (batch,)
        :return: mean and variance of each row, shape (batch, *observation shape)
        """
        return {
            key: tuple(np.stack([moments[key][part] for _, moments in self._steps])[steps] for part in range(2))
            for key in self.moments
        }

    def normalized(self, observations: Any, moments: Moments) -> Any:  # noqa: ANN401  # arrays or a dict
        """Normalise observations as VecNormalize does, with given statistics.

        :param observations: in the env's units, shape (batch, *observation shape), or a dict of such arrays
        :param moments: the statistics, which are broadcast to the observations
        :return: float32, except for keys that are not normalised
        """
        found = dict(_by_key(observations))
        for key, (mean, var) in moments.items():
            found[key] = as_normalized(self.normalize, found[key], mean, var)
        return found if isinstance(observations, dict) else found[None]


def as_normalized(normalize: VecNormalize, observations: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Normalise an array by the arithmetic of VecNormalize, whose public method knows only its present statistics.

    :param normalize: the normaliser, for its bounds
    :param observations: in the env's units, shape (batch, ...)
    :param mean: means, which are broadcast to the observations
    :param var: variances, likewise
    :return: float32
    """
    clip = normalize.clip_obs
    normalized: np.ndarray = np.clip((observations - mean) / np.sqrt(var + normalize.epsilon), -clip, clip)
    return normalized.astype(np.float32)


def moments_of(normalize: VecNormalize) -> Moments:
    """Copy the statistics of a normaliser.

    :param normalize: the normaliser
    """
    statistics = normalize.obs_rms
    by_key: Any = statistics if isinstance(statistics, dict) else {None: statistics}
    return {key: (deepcopy(each.mean), deepcopy(each.var)) for key, each in by_key.items()}


def replaces_arithmetic(normalize: VecNormalize) -> bool:
    """Whether a subclass of VecNormalize normalises observations in a way of its own.

    :param normalize: the normaliser
    """
    names = ("normalize_obs", "_normalize_obs", "get_original_obs")
    return any(getattr(type(normalize), name) is not getattr(VecNormalize, name) for name in names)


def _is_moments(entry: object, own: Moments) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 3 or entry[0] not in own:
        return False
    like = own[entry[0]][0]
    are_arrays = all(isinstance(part, np.ndarray) and part.dtype == np.float64 for part in entry[1:])
    return are_arrays and all(part.shape == like.shape and np.isfinite(part).all() for part in entry[1:])


def _are_close(observations: Any, others: Any) -> bool:  # noqa: ANN401  # arrays or dicts
    parts, other_parts = _by_key(observations), _by_key(others)
    return all(
        key in parts and np.shape(parts[key]) == np.shape(part) and np.allclose(parts[key], part, rtol=1e-5, atol=1e-5)
        for key, part in other_parts.items()
    )


def _by_key(observations: Any) -> dict[str | None, Any]:  # noqa: ANN401  # an array or a dict
    return observations if isinstance(observations, dict) else {None: observations}
