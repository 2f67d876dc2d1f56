"""Memories over time: LSTM and GRU, with exact resets at episode starts inside a sequence; GTrXL is in ``gtrxl.py``.

A memory turns features into outputs and carries a state from step to step. The state is a tuple of tensors whose second
dimension is that of the environments, as in ``nn.LSTM``. ``step`` and ``sequence`` compute the same function.
"""

from __future__ import annotations

from typing import Protocol

import torch as th
from torch import nn

from sb3_ppo_plus.policies.recurrences import Recurrence, State, recur, recur_in_graph, reset
from sb3_ppo_plus.policies.rounding import ROUNDING
from sb3_ppo_plus.torch_private import forward_hooks

__all__ = ["GRUMemory", "LSTMMemory", "Memory", "State", "reset"]


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
            features, c = th.lstm_cell(features, (hidden[layer], cell[layer]), *_weights(self, layer))
            new_hidden.append(features)
            new_cell.append(c)
        return features, (th.stack(new_hidden), th.stack(new_cell))

    def sequence(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
        """Take all steps of sequences at once; parameters as in :meth:`Memory.sequence`."""
        return _sequence(self, features, state, episode_starts)


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
            features = th.gru_cell(features, hidden[layer], *_weights(self, layer))
            new_hidden.append(features)
        return features, (th.stack(new_hidden),)

    def sequence(self, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
        """Take all steps of sequences at once; parameters as in :meth:`Memory.sequence`."""
        return _sequence(self, features, state, episode_starts)


def _zeros(rnn: nn.RNNBase, n_envs: int) -> th.Tensor:
    return next(rnn.parameters()).new_zeros(rnn.num_layers, n_envs, rnn.hidden_size)


def _weights(rnn: nn.RNNBase, layer: int) -> list[th.Tensor]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if rnn.bias else 2]
    return [getattr(rnn, f"{name}_l{layer}") for name in names]


def _sequence(rnn: nn.RNNBase, features: th.Tensor, state: State, episode_starts: th.Tensor) -> th.Tensor:
    kind = Recurrence(rnn.mode, rnn.num_layers, rnn.bias, rnn.dropout, rnn.training)
    weights = [weight for layer in range(rnn.num_layers) for weight in _weights(rnn, layer)]
    if ROUNDING.is_allowed:
        return recur_in_graph(kind, features, state, episode_starts, weights)
    hooks = forward_hooks([rnn])
    return recur(kind, features, state, episode_starts, weights, rnn if hooks is None or any(hooks) else None)
