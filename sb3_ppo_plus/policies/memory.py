"""Memories over time: LSTM and GRU, with exact resets at episode starts inside a sequence; GTrXL is in ``gtrxl.py``.

A memory turns features into outputs and carries a state from step to step. The state is a tuple of tensors whose second
dimension is that of the environments, as in ``nn.LSTM``. ``step`` and ``sequence`` compute the same function.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch as th
from torch import nn
from torch.nn.utils.rnn import PackedSequence

State = tuple[th.Tensor, ...]
"""What a memory carries from step to step: tensors of shape (n_layers, n_envs, ...)."""


class Memory(Protocol):
    """The attributes and methods that the policy needs of a memory."""

    output_dim: int

    def initial_state(self, n_envs: int) -> State:
        """Return the state in which an episode begins: all zeros.

        :param n_envs: number of environments
        """

    def step(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> tuple[th.Tensor, State]:
        """Take one step of every env.

        :param features: shape (n_envs, features_dim)
        :param state: the state before the step
        :param episode_starts: bool, shape (n_envs,): True where the env's state is reset before the step
        :return: outputs, shape (n_envs, output_dim), and the state after the step
        """

    def sequence(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
        """Take all steps of some sequences at once.

        :param features: shape (n_sequences, length, features_dim)
        :param state: the state before the first step, with a sequence in place of each env
        :param episode_starts: bool, shape (n_sequences, length): True where the state is reset before the step
        :return: outputs, shape (n_sequences, length, output_dim)
        """


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


def reset(state: State, episode_starts: th.Tensor) -> State:
    """Set the state of some envs to exactly zero, even where it was NaN.

    :param state: the state of all envs
    :param episode_starts: bool, shape (n_envs,): True where the state is reset
    :return: the new state; ``state`` is not changed
    """
    return tuple(
        th.where(episode_starts.view(1, -1, *[1] * (part.dim() - 2)), th.zeros_like(part), part) for part in state
    )


class LSTMMemory(nn.LSTM):
    """``nn.LSTM`` (Hochreiter and Schmidhuber 1997) as a memory, with the parameters of sb3-contrib's ``lstm_actor``.

    :param features_dim: size of the features
    :param hidden_size: size of the output and of each layer's two states
    :param n_layers: number of layers
    :param bias: as in ``nn.LSTM``
    :param dropout: between layers, as in ``nn.LSTM``; above 0, the first log-ratio of an update is not 0
    :param forget_bias: is added to the initial bias of the forget gates. With 1, the memory reaches further back at
        first (Jozefowicz et al. 2015, section 2.2). Without it, a cue from dozens of steps before may never be learned
    :raises ValueError: for a ``forget_bias`` with ``bias=False``
    """

    def __init__(
        self,
        features_dim: int,
        hidden_size: int = 256,
        n_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__(features_dim, hidden_size, n_layers, bias=bias, dropout=dropout)
        self.output_dim = hidden_size
        if forget_bias != 0.0:
            if not bias:
                raise ValueError(f"memory_kwargs: forget_bias={forget_bias!r} needs bias=True, got False")
            with th.no_grad():
                for layer in range(n_layers):
                    # PyTorch's order of gates: input, forget, cell, output
                    getattr(self, f"bias_hh_l{layer}")[hidden_size : 2 * hidden_size] += forget_bias

    def initial_state(self, n_envs: int) -> State:
        """Return the hidden and the cell state in which an episode begins: all zeros.

        :param n_envs: number of environments
        :return: two tensors of shape (n_layers, n_envs, hidden_size)
        """
        return _zeros(self, n_envs), _zeros(self, n_envs)

    def step(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> tuple[th.Tensor, State]:
        """Take one step of every env; parameters as in :meth:`Memory.step`."""
        hidden, cell = reset(state, episode_starts)
        new_hidden, new_cell = [], []
        for layer in range(self.num_layers):
            weights = getattr(self, f"weight_ih_l{layer}"), getattr(self, f"weight_hh_l{layer}")
            features, c = th.lstm_cell(features, (hidden[layer], cell[layer]), *weights, *_biases(self, layer))
            new_hidden.append(features)
            new_cell.append(c)
        return features, (th.stack(new_hidden), th.stack(new_cell))

    def sequence(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
        """Take all steps of sequences at once; parameters as in :meth:`Memory.sequence`."""
        return _run_segments(self, features, state, episode_starts)


class GRUMemory(nn.GRU):
    """``nn.GRU`` (Cho et al. 2014) as a memory.

    :param features_dim: size of the features
    :param hidden_size: size of the output and of each layer's state
    :param n_layers: number of layers
    :param bias: as in ``nn.GRU``
    :param dropout: between layers, as in ``nn.GRU``; above 0, the first log-ratio of an update is not 0
    """

    def __init__(
        self, features_dim: int, hidden_size: int = 256, n_layers: int = 1, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__(features_dim, hidden_size, n_layers, bias=bias, dropout=dropout)
        self.output_dim = hidden_size

    def initial_state(self, n_envs: int) -> State:
        """Return the hidden state in which an episode begins: all zeros.

        :param n_envs: number of environments
        :return: one tensor of shape (n_layers, n_envs, hidden_size)
        """
        return (_zeros(self, n_envs),)

    def step(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> tuple[th.Tensor, State]:
        """Take one step of every env; parameters as in :meth:`Memory.step`."""
        (hidden,) = reset(state, episode_starts)
        new_hidden = []
        for layer in range(self.num_layers):
            weights = getattr(self, f"weight_ih_l{layer}"), getattr(self, f"weight_hh_l{layer}")
            features = th.gru_cell(features, hidden[layer], *weights, *_biases(self, layer))
            new_hidden.append(features)
        return features, (th.stack(new_hidden),)

    def sequence(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
        """Take all steps of sequences at once; parameters as in :meth:`Memory.sequence`."""
        return _run_segments(self, features, state, episode_starts)


def _zeros(rnn: nn.RNNBase, n_envs: int) -> th.Tensor:
    return next(rnn.parameters()).new_zeros(rnn.num_layers, n_envs, rnn.hidden_size)


def _biases(rnn: nn.RNNBase, layer: int) -> tuple[th.Tensor | None, th.Tensor | None]:
    if not rnn.bias:
        return None, None
    return getattr(rnn, f"bias_ih_l{layer}"), getattr(rnn, f"bias_hh_l{layer}")


def _run_segments(rnn: nn.RNNBase, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
    """Run all segments between episode starts side by side: no loop over time, and no gradient across a start."""
    segments = Segments.between(episode_starts.cpu().numpy())
    # On the CPU only an LSTM has a kernel for whole sequences, and that kernel takes no packed ones
    is_padded = isinstance(rnn, nn.LSTM) and features.device.type == "cpu"
    groups = segments.buckets() if is_padded else [slice(0, len(segments.starts))]
    positions = np.empty(episode_starts.numel(), np.int64)
    outputs, n_rows = [], 0
    for group in groups:
        starts, lengths = segments.starts[group], segments.lengths[group]
        times = np.arange(lengths[0])[:, None]
        is_real = times < lengths
        # Padding repeats the first step. Its value does not matter, because it comes after all steps that are read
        steps = np.where(is_real, starts + times, starts)
        to_device = partial(th.as_tensor, device=features.device)
        sequences, continues = to_device(segments.sequences[group]), to_device(segments.continues[group])
        states = reset(tuple(part[:, sequences] for part in state), ~continues)
        hx = states if len(states) > 1 else states[0]
        flat = features.flatten(0, 1)
        if is_padded:
            positions[steps[is_real]] = n_rows + np.flatnonzero(is_real)
            output = rnn(flat[to_device(steps)], hx)[0].flatten(0, 1)
        else:
            order = steps[is_real]
            positions[order] = np.arange(len(order))
            output = rnn(PackedSequence(flat[to_device(order)], th.as_tensor(is_real.sum(axis=1))), hx)[0].data
        outputs.append(output)
        n_rows += len(output)
    return th.cat(outputs)[th.as_tensor(positions, device=features.device)].view(*episode_starts.shape, -1)
