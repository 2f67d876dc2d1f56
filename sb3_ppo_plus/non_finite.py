"""What happens at numbers that are not finite: in what the environments return, and in the loss and its gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ppo_plus.update_history import METRICS

TERMS = {"policy_loss": "policy loss", "value_loss": "value loss", "entropy_loss": "entropy"}
ON_NON_FINITE = ("raise", "skip")


class NonFiniteError(FloatingPointError):
    """A number that training depends on is NaN or infinite; no step was taken on it."""


class EnvOutputCheck:
    """Refuses observations and rewards that are not finite.

    :param env: the training environment
    """

    def __init__(self, env: VecEnv) -> None:
        self._normalize = unwrap_vec_normalize(env)

    def __call__(self, observations: Any, rewards: np.ndarray | None, step: int) -> None:  # noqa: ANN401  # array or dict
        """Check what an environment's ``step`` or ``reset`` has returned.

        :param observations: shape (n_envs, *observation shape), or a dict of such
        :param rewards: shape (n_envs,); None after a reset
        :param step: step of the rollout, for the message
        :raises NonFiniteError: names environment and step, and the raw value where a VecNormalize keeps it
        """
        normalize = self._normalize
        if rewards is not None:
            self._check("reward", rewards, None if normalize is None else normalize.old_reward, step)
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
        :param step: step of the rollout
        :raises NonFiniteError: as above
        """
        for array in observation.values() if isinstance(observation, dict) else (observation,):
            if not np.isfinite(array).all():
                raise NonFiniteError(f"the terminal observation of env {index} at step {step} is {array}")

    def _check(self, name: str, array: np.ndarray, raw: Any, step: int) -> None:  # noqa: ANN401  # array, dict or None
        # One product is the cheapest check; it may overflow, so that _raise_at looks closer
        if array.dtype.kind == "f" and not math.isfinite(np.vdot(array, array)):
            self._raise_at(name, array, raw, step)
        # A VecNormalize that does not learn turns infinity into the bound at which it clips
        if isinstance(raw, np.ndarray) and raw.dtype.kind == "f" and not math.isfinite(np.vdot(raw, raw)):
            self._raise_at(name, array, raw, step)

    def _raise_at(self, name: str, array: np.ndarray, raw: Any, step: int) -> None:  # noqa: ANN401  # as above
        where = tuple(next(iter(np.argwhere(~np.isfinite(array))), ()))
        text = ""
        if isinstance(raw, np.ndarray):
            # Running statistics spread one environment's value over all
            raw_where = tuple(next(iter(np.argwhere(~np.isfinite(raw))), ()))
            if raw_where:
                where = raw_where if raw.shape == array.shape else (raw_where[0], *where[1:])
            if where:
                text = f"; before VecNormalize it is {raw[where] if raw.shape == array.shape else raw[where[0]]}"
        if not where:
            return
        position = f" at position {tuple(map(int, where[1:]))}" if len(where) > 1 else ""
        raise NonFiniteError(
            f"the {name} of env {where[0]} at step {step} of the rollout is {array[where]}{position}{text}"
        )


class Skipped(NamedTuple):
    """Steps that were left out.

    :param total: all so far
    :param in_a_row: without a step in between, up to now
    """

    total: int
    in_a_row: int


def check_steps(
    table: th.Tensor,
    skipped: Skipped,
    max_in_a_row: int | None,
    *,
    checks_gradient: bool,
    n_minibatches: int,
    after: str,
) -> tuple[th.Tensor, Skipped]:
    """Find the minibatches of an update whose loss or gradient was not finite, on which no step was taken.

    :param table: metrics of the minibatches that were to be stepped on, shape (n, len(METRICS))
    :param skipped: steps left out before the update
    :param max_in_a_row: how many of them are allowed in a row; None: none at all
    :param checks_gradient: False: a gradient scaler deals with overflowing gradients
    :param n_minibatches: in an epoch
    :param after: end of the message
    :return: which of the minibatches were fine, bool of shape (n,), and the steps left out by now
    :raises NonFiniteError: says which term, epoch and minibatch
    """
    columns = [METRICS.index(name) for name in ("loss", "grad_norm")[: 1 + checks_gradient]]
    is_fine = table[:, columns].isfinite().all(dim=1)
    total, in_a_row = skipped
    for index in range(0 if is_fine.all() else len(is_fine)):
        in_a_row = 0 if is_fine[index] else in_a_row + 1
        total += in_a_row > 0
        if in_a_row > (0 if max_in_a_row is None else max_in_a_row):
            values = dict(zip(METRICS, table[index].tolist(), strict=True))
            terms = [f"the {text} is {values[name]}" for name, text in TERMS.items() if not math.isfinite(values[name])]
            terms = terms or [f"the norm of the gradient is {values['grad_norm']}, of the loss {values['loss']}"]
            row = "" if max_in_a_row is None else f", the {in_a_row}th in a row, and max_skipped={max_in_a_row}"
            raise NonFiniteError(
                f"{' and '.join(terms)} in epoch {index // n_minibatches}, minibatch {index % n_minibatches}{row}, "
                f"{after}"
            )
    return is_fine, Skipped(total, 0 if is_fine.all() else in_a_row)
