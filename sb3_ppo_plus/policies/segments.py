"""Sequences of steps, cut at the starts of episodes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th


class Segments(NamedTuple):
    """Parts of sequences, cut at episode starts, longest first.

    :param starts: index of each segment's first step in the flattened sequences, shape (n_segments,)
    :param lengths: number of steps of each segment, shape (n_segments,)
    :param sequences: the sequence to which each segment belongs, shape (n_segments,)
    :param continues: whether the segment's episode began before its sequence, shape (n_segments,)
    """

    starts: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray
    continues: np.ndarray

    @classmethod
    def between(cls, episode_starts: np.ndarray) -> Segments:
        """Cut sequences before each episode start.

        :param episode_starts: bool, shape (n_sequences, length)
        """
        begins = episode_starts.copy()
        begins[:, 0] = True
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=begins.size)
        order = np.argsort(-lengths, kind="stable")
        starts = starts[order]
        return cls(starts, lengths[order], starts // begins.shape[1], ~episode_starts.reshape(-1)[starts])

    def buckets(self) -> list[slice]:
        """Group segments of similar lengths, which will be padded to the longest of their group.

        A group of n segments of length T costs about ``30 + T + T * n``, as measured for an LSTM's forward and backward
        pass on a CPU. A group is split where that saves cost.

        :return: slices of the segments, which cover all of them
        """
        found, todo = [], [slice(0, len(self.starts))]
        while todo:
            group = todo.pop()
            lengths = self.lengths[group]
            savings = (lengths[0] - lengths) * np.arange(len(lengths), 0, -1) - lengths - 30
            cut = group.start + int(savings.argmax())
            if cut > group.start and savings.max() > 0:
                todo += [slice(cut, group.stop), slice(group.start, cut)]
            else:
                found.append(group)
        return found


class TimeOrder(NamedTuple):
    """The steps of all segments, sorted by time, so that a step of time is a slice.

    :param rows: index of each step in the flattened sequences, shape (n_steps,)
    :param before: index of the step before, in this order; for first steps 0, shape (n_steps,)
    :param counts: how many segments have a step at each time; they only get fewer
    :param sequences: the sequence to which each segment belongs, shape (n_segments,)
    :param continues: whether the segment's episode began before its sequence, shape (n_segments, 1)
    """

    rows: th.Tensor
    before: th.Tensor
    counts: list[int]
    sequences: th.Tensor
    continues: th.Tensor

    @classmethod
    def of(cls, episode_starts: th.Tensor) -> TimeOrder:
        """Sort the steps of sequences.

        :param episode_starts: bool, shape (n_sequences, length)
        """
        segments = Segments.between(episode_starts.cpu().numpy())
        times = np.arange(segments.lengths[0])[:, None]
        is_real = times < segments.lengths
        counts = is_real.sum(axis=1)
        # The k-th segment's step is the k-th of each time
        begins_of_times = counts.cumsum() - counts
        before = np.where(times > 0, np.roll(begins_of_times, 1)[:, None] + np.arange(len(segments.starts)), 0)[is_real]
        to_device = episode_starts.device
        return cls(
            th.from_numpy((segments.starts + times)[is_real]).to(to_device),
            th.from_numpy(before).to(to_device),
            counts.tolist(),
            th.from_numpy(segments.sequences).to(to_device),
            th.from_numpy(segments.continues).to(to_device).unsqueeze(1),
        )

    def initial(self, state: th.Tensor) -> th.Tensor:
        """Return the states in which the segments begin; zero, even where ``state`` is NaN, if an episode begins.

        :param state: before the sequences, shape (n_sequences, hidden_size)
        """
        return th.where(self.continues, state[self.sequences], 0.0)

    def previous(self, values: th.Tensor, initial: th.Tensor) -> th.Tensor:
        """Return the values that each step found.

        :param values: after each step, shape (n_steps, hidden_size)
        :param initial: before the first steps, shape (n_segments, hidden_size)
        """
        found = values[self.before]
        found[: self.counts[0]] = initial
        return found

    def unsorted(self, values: th.Tensor) -> th.Tensor:
        """Put values back into the order of the sequences.

        :param values: shape (n_steps, size)
        """
        return th.empty_like(values).index_copy_(0, self.rows, values)
