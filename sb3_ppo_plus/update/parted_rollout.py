"""Minibatches in parts: their random order, and what the whole minibatch decides for each part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.distributed.parts import Parts
from sb3_ppo_plus.rollout_batch import Minibatch


class PartedMinibatch(NamedTuple):
    """A minibatch of which each part is computed by itself.

    :param parts: the parts of this process. Their ``weights`` and ``advantages`` are those of the whole minibatch
    :param owner: has the random stream of each part, and adds what all parts have computed
    """

    parts: list[Minibatch]
    owner: Parts


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations from the mean: float64 arrays of one shape."""

    number: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of_groups(cls, values: np.ndarray, groups: np.ndarray, n_groups: int) -> Moments:
        """Compute the moments of groups of values.

        :param values: float64, shape (n,)
        :param groups: number of each value's group, shape (n,)
        :param n_groups: number of groups
        """
        number = np.bincount(groups, minlength=n_groups).astype(np.float64)
        mean = np.bincount(groups, values, n_groups) / np.maximum(number, 1)
        return cls(number, mean, np.bincount(groups, (values - mean[groups]) ** 2, n_groups))

    def together_with(self, other: Moments) -> Moments:
        """Return the moments of both (Chan et al. 1979, eq. 1.5)."""
        number = self.number + other.number
        share, difference = other.number / np.maximum(number, 1), other.mean - self.mean
        squares = self.squares + other.squares + difference**2 * self.number * share
        return Moments(number, self.mean + difference * share, squares)


def moments_of_all(moments: list[Moments], owner: Parts) -> Moments:
    """Return the moments over all parts, with the same bits in each process.

    :param moments: of each part of this process
    :param owner: the parts
    """
    first, *others = owner.gather([np.stack(each) for each in moments])
    total = Moments(*first)
    for other in others:
        total = total.together_with(Moments(*other))
    return total


class PartedRollout:
    """A rollout whose minibatches consist of equally many transitions of each part, each part permuted by itself.

    :param buffer: the full buffer of this process
    :param batch_size: transitions per minibatch, over all parts
    :param owner: the parts
    :param n_updates: number of epochs that were done before this update
    :param normalize_advantage: normalise the advantages of each minibatch
    """

    def __init__(
        self,
        buffer: PPOPlusRolloutBuffer,
        batch_size: int,
        owner: Parts,
        n_updates: int,
        *,
        normalize_advantage: bool,
    ) -> None:
        self._owner = owner
        self._normalizes = normalize_advantage
        self._generators = owner.permutations_of(n_updates)
        self._indices = [buffer.indices_of_part(part, owner.n_here) for part in range(owner.n_here)]
        # Rows of indices are transitions, or sequences of them
        self._n_rows = owner.size_of(batch_size) // (buffer.sequence_length or 1)
        rollout = buffer.rollout()
        self._advantages = rollout.advantages.cpu().numpy().astype(np.float64)
        zeros = th.zeros_like(rollout.advantages)
        self._rollout = replace(rollout, advantages=rollout.advantages.clone(), weights=zeros)

    def minibatches(self) -> Iterator[PartedMinibatch]:
        """Yield every transition once, in a new random order; the last minibatch may be short."""
        pairs = zip(self._indices, self._generators, strict=True)
        permuted = [indices[generator.permutation(len(indices))] for indices, generator in pairs]
        self._weigh(permuted)
        device = self._rollout.advantages.device
        of_parts = [th.split(th.from_numpy(indices).to(device), self._n_rows) for indices in permuted]
        for indices_of_parts in zip(*of_parts, strict=True):
            yield PartedMinibatch([Minibatch(self._rollout, indices) for indices in indices_of_parts], self._owner)

    def _weigh(self, permuted: list[np.ndarray]) -> None:
        """Write the advantages of this epoch, and the weight of each transition in the mean over its minibatch."""
        n_minibatches = -(-len(permuted[0]) // self._n_rows)
        real, numbers = [], []
        for indices in permuted:
            number_of_row = np.arange(len(indices)) // self._n_rows
            is_real = indices >= 0
            real.append(indices[is_real])
            numbers.append(np.broadcast_to(number_of_row, indices.T.shape).T[is_real])
        moments = [
            Moments.of_groups(self._advantages[indices], number, n_minibatches)
            for indices, number in zip(real, numbers, strict=True)
        ]
        whole = moments_of_all(moments, self._owner)
        weights, advantages = np.zeros_like(self._advantages), self._advantages.copy()
        deviation = np.sqrt(whole.squares / np.maximum(whole.number - 1, 1))
        for indices, number in zip(real, numbers, strict=True):
            weights[indices] = 1 / whole.number[number]
            if self._normalizes:
                normal = (advantages[indices] - whole.mean[number]) / (deviation[number] + 1e-8)
                # One element has no deviation
                advantages[indices] = np.where(whole.number[number] > 1, normal, advantages[indices])
        assert self._rollout.weights is not None
        self._rollout.weights.copy_(th.from_numpy(weights))
        self._rollout.advantages.copy_(th.from_numpy(advantages))
