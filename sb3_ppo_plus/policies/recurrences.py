"""LSTM and GRU over sequences that are cut at episode starts, as functions of their weights."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_ppo_plus.policies import scans
from sb3_ppo_plus.policies.gru_scan import GRUScan
from sb3_ppo_plus.policies.segments import Segments, TimeOrder

State = tuple[th.Tensor, ...]
"""What a memory carries from step to step: tensors of shape (n_layers, n_envs, ...)."""


class Recurrence(NamedTuple):
    """What an ``nn.LSTM`` or ``nn.GRU`` is, besides its weights.

    :param mode: "LSTM" or "GRU", PyTorch's names
    :param n_layers: number of layers
    :param has_bias: whether each layer has two biases beside its two weights
    :param dropout: between layers, while it trains
    :param training: whether it trains
    """

    mode: str
    n_layers: int
    has_bias: bool
    dropout: float
    training: bool


def reset(state: State, episode_starts: th.Tensor) -> State:
    """Set the state of some envs to exactly zero, even where it was NaN.

    :param state: the state of all envs
    :param episode_starts: bool, shape (n_envs,): True where the state is reset
    :return: the new state; ``state`` is not changed
    """
    return tuple(
        th.where(episode_starts.view(1, -1, *[1] * (part.dim() - 2)), th.zeros_like(part), part) for part in state
    )


def recur(
    kind: Recurrence,
    features: th.Tensor,
    state: State,
    episode_starts: th.Tensor,
    weights: list[th.Tensor],
    module: nn.RNNBase | None = None,
) -> th.Tensor:
    """Take all steps of sequences at once, without a gradient across an episode start.

    :param kind: what recurs
    :param features: shape (n_sequences, length, features_dim)
    :param state: before the first step, each part of shape (n_layers, n_sequences, hidden_size). It gets no gradient
    :param episode_starts: bool, shape (n_sequences, length): True where the state is reset before the step
    :param weights: those of each layer in order, as in ``nn.LSTM``
    :param module: what has these weights, if it must be called itself; it may have hooks
    :return: outputs, shape (n_sequences, length, hidden_size)
    """
    if kind.mode == "GRU" and features.device.type == "cpu" and module is None:
        return _scan(kind, features, state[0], episode_starts, weights)
    return _run_segments(kind, features, state, episode_starts, weights, module)


def _scan(
    kind: Recurrence, features: th.Tensor, hidden: th.Tensor, episode_starts: th.Tensor, weights: list[th.Tensor]
) -> th.Tensor:
    order, n_weights = TimeOrder.of(episode_starts), len(weights) // kind.n_layers
    for layer in range(kind.n_layers):
        if layer and kind.dropout and kind.training:
            features = F.dropout(features, kind.dropout)
        of_layer = weights[layer * n_weights : (layer + 1) * n_weights]
        biases = of_layer[2:] or [of_layer[0].new_zeros(len(of_layer[0]))] * 2
        features = GRUScan.apply(order, features, hidden[layer], *of_layer[:2], *biases)  # type: ignore[no-untyped-call]  # PyTorch's
    return features


def _run_segments(
    kind: Recurrence,
    features: th.Tensor,
    state: State,
    episode_starts: th.Tensor,
    weights: list[th.Tensor],
    module: nn.RNNBase | None,
) -> th.Tensor:
    """Run all segments between episode starts side by side, by PyTorch's own kernels."""
    segments = Segments.between(episode_starts.cpu().numpy())
    run: Any = th.lstm if kind.mode == "LSTM" else th.gru
    settings = (weights, kind.has_bias, kind.n_layers, kind.dropout, kind.training, False)
    # On the CPU the kernel for whole sequences takes no packed ones
    is_padded = features.device.type == "cpu" or module is not None
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
            padded = flat[to_device(steps)]
            output = (run(padded, hx, *settings, False) if module is None else module(padded, hx))[0].flatten(0, 1)
        else:
            order = steps[is_real]
            positions[order] = np.arange(len(order))
            output = run(flat[to_device(order)], th.as_tensor(is_real.sum(axis=1)), hx, *settings)[0]
        outputs.append(output)
        n_rows += len(output)
    return th.cat(outputs)[th.as_tensor(positions, device=features.device)].view(*episode_starts.shape, -1)


def recur_in_graph(
    kind: Recurrence, features: th.Tensor, state: State, episode_starts: th.Tensor, weights: list[th.Tensor]
) -> th.Tensor:
    """Return :func:`recur` with operations whose shapes do not depend on where episodes start, without dropout.

    The parameters are those of :func:`recur`.

    :raises RuntimeError: for dropout, which would draw other numbers than PyTorch's own kernels
    """
    if kind.dropout and kind.training:
        raise RuntimeError("a graph of an LSTM or GRU has no dropout")
    n_weights = len(weights) // kind.n_layers
    for layer in range(kind.n_layers):
        of_layer = weights[layer * n_weights : (layer + 1) * n_weights]
        states = [part[layer] for part in state]
        if kind.mode == "LSTM":
            features = scans.lstm(features, states, episode_starts, of_layer)
        else:
            features = scans.gru(features, states, episode_starts, of_layer)
    return features
