"""Counting the episodes of environments that step on tensors, and infos that are made when somebody reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch as th

from sb3_ppo_plus.envs.batches import checked_counts, episode_info, row_of
from sb3_ppo_plus.torch_private import as_ordinary_tensor
from sb3_ppo_plus.trees import tree_map


class Dones(th.Tensor):
    """Which episodes ended. ``np.sum(dones)``, by which SB3's callbacks count, works too."""

    __torch_function__ = as_ordinary_tensor()

    def sum(self, *args: Any, axis: Any = None, out: Any = None, **kwargs: Any) -> th.Tensor:  # noqa: ANN401  # NumPy's arguments
        """Count the episodes; NumPy's argument ``axis`` is PyTorch's ``dim``, and ``out`` must be None."""
        if axis is not None:
            kwargs["dim"] = axis
        return self.as_subclass(th.Tensor).sum(*args, **kwargs)


class StepInfos(Sequence[dict[str, Any]]):
    """The infos of a step, one dict for each environment, which are made when somebody reads them.

    Those of episodes that ended have what SB3's ``DummyVecEnv`` and ``Monitor`` put there: ``terminal_observation``,
    ``TimeLimit.truncated`` and ``episode``, and the rows of ``TensorStep.extras``. The others are empty.

    :param dones: which episodes ended, bool, shape (n_envs,)
    :param timeouts: which of them were only truncated, bool, shape (n_envs,)
    :param returns: undiscounted returns of the episodes, shape (n_envs,)
    :param lengths: their numbers of steps, shape (n_envs,)
    :param seconds: time since the first episode began
    :param final_observations: see ``TensorStep``
    :param extras: see ``TensorStep``
    """

    def __init__(
        self,
        dones: th.Tensor,
        timeouts: th.Tensor,
        returns: th.Tensor,
        lengths: th.Tensor,
        seconds: float,
        final_observations: Any,  # noqa: ANN401  # tensor, dict or None
        extras: dict[str, th.Tensor] | None,
    ) -> None:
        self.dones, self.timeouts, self.returns, self.lengths = dones, timeouts, returns, lengths
        self.seconds, self.final_observations, self.extras = seconds, final_observations, extras
        self._infos: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.dones)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._read()[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._read())

    def without_observations(self) -> StepInfos:
        """Return infos without last observations, which the environment cannot change any more."""
        extras = {name: tensor.clone() for name, tensor in (self.extras or {}).items()}
        ends = (self.dones, self.timeouts, self.returns, self.lengths)
        return StepInfos(*ends, self.seconds, final_observations=None, extras=extras)

    def _read(self) -> list[dict[str, Any]]:
        if self._infos is None:
            self._infos = [{} for _ in range(len(self.dones))]
            indices = self.dones.nonzero().flatten()
            if len(indices):
                for index, info in zip(indices.tolist(), self._of_ended(indices), strict=True):
                    self._infos[index] = info
        return self._infos

    def _of_ended(self, indices: th.Tensor) -> Iterator[dict[str, Any]]:
        returns, lengths, timeouts = (
            tensor[indices].tolist() for tensor in (self.returns, self.lengths, self.timeouts)
        )
        final, extras = rows_as_arrays(self.final_observations, indices), rows_as_arrays(self.extras or {}, indices)
        for row in range(len(indices)):
            info: dict[str, Any] = {name: _plain(array[row]) for name, array in extras.items()}
            if final is not None:
                info["terminal_observation"] = row_of(final, row)
            info["TimeLimit.truncated"] = timeouts[row]
            info["episode"] = episode_info(returns[row], lengths[row], self.seconds)
            yield info


class TensorEpisodes:
    """Counts the episodes that go on.

    :param num_envs: number of environments
    :param device: where the tensors are
    """

    def __init__(self, num_envs: int, device: th.device) -> None:
        # Apple's GPUs have no float64
        self._returns = th.zeros(num_envs, dtype=th.float32 if device.type == "mps" else th.float64, device=device)
        self._lengths = th.zeros(num_envs, dtype=th.int64, device=device)
        self._none = th.zeros(num_envs, dtype=th.bool, device=device)
        self._start = time.time()

    def begin(self) -> None:
        """Begin an episode in each environment."""
        self._returns, self._lengths = th.zeros_like(self._returns), th.zeros_like(self._lengths)
        self._start = time.time()

    def count(self, step: Any) -> StepInfos:  # noqa: ANN401  # a TensorStep
        """Count a step.

        :param step: the step, whose tensors were checked
        """
        terminated, truncated = step.terminated, step.truncated
        if truncated is None:
            dones, timeouts = terminated.clone(), self._none
        elif terminated is None:
            dones = timeouts = truncated.clone()
        else:
            dones, timeouts = terminated | truncated, truncated & ~terminated
        returns, lengths = self._returns + step.rewards, self._lengths + 1
        # The old tensors belong to the infos of the step before
        self._returns, self._lengths = returns.masked_fill(dones, 0.0), lengths.masked_fill(dones, 0)
        seconds = time.time() - self._start
        return StepInfos(dones, timeouts, returns, lengths, seconds, step.final_observations, step.extras)

    def state(self) -> dict[str, Any]:
        """Return what the episodes that go on have brought so far, as plain values."""
        return {
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "seconds": time.time() - self._start,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` has returned.

        :param state: its values, which may be hostile
        :raises ValueError: if they are not those of so many environments
        """
        counts = checked_counts("the environments", state, len(self._returns), ("returns", "lengths", "seconds"))
        self._returns = th.tensor(counts["returns"], dtype=self._returns.dtype, device=self._returns.device)
        self._lengths = th.tensor(counts["lengths"], dtype=self._lengths.dtype, device=self._returns.device)
        self._start = time.time() - float(counts["seconds"])


def together_on_cpu(steps: list[StepInfos]) -> list[StepInfos]:
    """Fetch the infos of several steps from a device, and return those of steps that have ended episodes.

    :param steps: infos without last observations
    """
    if not steps:
        return []
    dones, timeouts, returns, lengths = (
        th.stack([getattr(step, name) for step in steps]).cpu() for name in ("dones", "timeouts", "returns", "lengths")
    )
    names = set.intersection(*(set(step.extras or {}) for step in steps))
    extras = {name: th.stack([(step.extras or {})[name] for step in steps]).cpu() for name in sorted(names)}
    return [
        StepInfos(
            *(dones[row], timeouts[row], returns[row], lengths[row], steps[row].seconds),
            final_observations=None,
            extras={name: tensor[row] for name, tensor in extras.items()},
        )
        for row in dones.any(dim=1).nonzero().flatten().tolist()
    ]


def rows_as_arrays(tensors: Any, indices: th.Tensor) -> Any:  # noqa: ANN401  # tensor, dict or None
    """Copy rows of tensors into arrays.

    :param tensors: a tensor of shape (n_envs, ...), a dict of them, or None
    :param indices: indices of the rows, int64
    """
    return None if tensors is None else tree_map(lambda tensor: tensor[indices].cpu().numpy(), tensors)


def _plain(value: Any) -> Any:  # noqa: ANN401  # an element or a row
    return value.item() if np.ndim(value) == 0 else value
