"""LSTM and GRU over whole sequences for graphs, with their derivatives written out by hand.

A graph's shapes cannot depend on where episodes start, so sequences are not cut: states are reset on the way. The loop
over time is PyTorch's ``scan``, which is compiled to a loop without Python; its body takes several steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th

from sb3_ppo_plus.torch_private import scan

MOST_STEPS = 4
"""How many steps of time the body of a loop takes: more cost less time, and longer to compile."""


def lstm(
    features: th.Tensor, state: Sequence[th.Tensor], episode_starts: th.Tensor, weights: Sequence[th.Tensor]
) -> th.Tensor:
    """Run one layer of an LSTM over sequences.

    :param features: shape (n_sequences, length, features_dim)
    :param state: hidden and cell state before the first step, shape (n_sequences, hidden_size). They get no gradient
    :param episode_starts: bool, shape (n_sequences, length): True where the state is zero before the step
    :param weights: those of the layer, as in ``nn.LSTM``; without biases there are two
    :return: outputs, shape (n_sequences, length, hidden_size)
    """
    of_input, recurrent, *biases = weights
    products = features.transpose(0, 1) @ of_input.t() + sum(biases)
    outputs: th.Tensor = _LSTMScan.apply(products, *state, _by_time(episode_starts), recurrent)[0]  # type: ignore[no-untyped-call]  # PyTorch's
    return outputs.transpose(0, 1)


def gru(
    features: th.Tensor, state: Sequence[th.Tensor], episode_starts: th.Tensor, weights: Sequence[th.Tensor]
) -> th.Tensor:
    """Run one layer of a GRU over sequences; the parameters are as in :func:`lstm`."""
    of_input, recurrent, *biases = weights
    bias_ih, bias_hh = biases or (of_input.new_zeros(len(of_input)),) * 2
    products = features.transpose(0, 1) @ of_input.t() + bias_ih
    outputs: th.Tensor = _GRUScan.apply(products, *state, _by_time(episode_starts), recurrent, bias_hh)[0]  # type: ignore[no-untyped-call]  # PyTorch's
    return outputs.transpose(0, 1)


def _by_time(episode_starts: th.Tensor) -> th.Tensor:
    return episode_starts.t().unsqueeze(2)


def _n_steps(length: int) -> int:
    """Return the largest number of steps that a body may take and that divides the length."""
    return next(number for number in range(min(MOST_STEPS, length), 0, -1) if length % number == 0)


def _in_chunks(*by_time: th.Tensor) -> tuple[th.Tensor, ...]:
    return tuple(tensor.reshape(-1, _n_steps(len(tensor)), *tensor.shape[1:]) for tensor in by_time)


def _stacked(found: Sequence[tuple[th.Tensor, ...]]) -> list[th.Tensor]:
    return [th.stack(each) for each in zip(*found, strict=True)]


def _before(after: th.Tensor, first: th.Tensor, starts: th.Tensor) -> th.Tensor:
    """Return the values that each step found, from those after each step, the first ones and the episode starts."""
    return th.where(starts, 0.0, th.cat((first.unsqueeze(0), after[:-1])))


class _Loop(th.autograd.Function):
    """PyTorch's ``scan`` without a derivative. In this form it may be called where ``torch.func`` differentiates."""

    @staticmethod
    def forward(steps: Any, n_states: int, n_rows: int, *tensors: th.Tensor) -> tuple[th.Tensor, ...]:  # noqa: ANN401  # a function
        rows = tensors[n_states : n_states + n_rows]
        return tuple(scan(steps, tensors[:n_states], rows, tensors[n_states + n_rows :]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401  # PyTorch's
        ctx.mark_non_differentiable(*output)


def _loop(steps: Any, state: Any, rows: Any, others: Any) -> tuple[th.Tensor, ...]:  # noqa: ANN401  # see scan
    looped: tuple[th.Tensor, ...] = _Loop.apply(steps, len(state), len(rows), *state, *rows, *others)  # type: ignore[no-untyped-call]  # PyTorch's
    return looped


class _Scan(th.autograd.Function):
    """What both scans keep for their derivatives: all but the products with the features, and all results."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401  # PyTorch's
        _, *others = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*others, *output)


class _LSTMScan(_Scan):
    """The recurrent part of an LSTM; everything has time as its first dimension."""

    @staticmethod
    def forward(
        products: th.Tensor, hidden: th.Tensor, cell: th.Tensor, starts: th.Tensor, recurrent: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        weight = recurrent.t().contiguous()

        def steps(
            h: th.Tensor, c: th.Tensor, products: th.Tensor, starts: th.Tensor, weight: th.Tensor
        ) -> list[th.Tensor]:
            found = []
            for product, start in zip(products, starts, strict=True):
                gates = product + th.where(start, 0.0, h) @ weight
                i, f, g, o = gates.chunk(4, 1)
                i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
                c = f * th.where(start, 0.0, c) + i * g
                h = o * c.tanh()
                found.append((h, th.cat((i, f, g, o), 1), c))
            return [h, c, *_stacked(found)]

        _, _, *kept = scan(steps, (hidden, cell), _in_chunks(products, starts), [weight])
        outputs, gates, cells = (each.flatten(0, 1) for each in kept)
        return outputs, gates, cells

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor, *_others: Any) -> tuple[th.Tensor | None, ...]:  # noqa: ANN401  # PyTorch's
        hidden, cell, starts, recurrent, outputs, gates, cells = ctx.saved_tensors

        def steps(of_h: th.Tensor, of_c: th.Tensor, *chunk: th.Tensor) -> list[th.Tensor]:
            *rows, weight = chunk
            found = []
            for of_output, gate, c, before, start in zip(*rows, strict=True):
                i, f, g, o = gate.chunk(4, 1)
                tanh = c.tanh()
                of_output = of_output + of_h
                of_c = of_c + of_output * o * (1 - tanh * tanh)
                parts = (
                    of_c * g * i * (1 - i),
                    of_c * before * f * (1 - f),
                    of_c * i * (1 - g * g),
                    of_output * tanh * o * (1 - o),
                )
                of_gates = th.cat(parts, 1)
                of_h, of_c = th.where(start, 0.0, of_gates @ weight), th.where(start, 0.0, of_c * f)
                found.append((of_gates,))
            return [of_h, of_c, *_stacked(found)]

        # Under torch.func, derivatives would be wanted of derivatives
        with th.no_grad():
            by_time = gradient, gates, cells, _before(cells, cell, starts), starts
            chunks = _in_chunks(*(tensor.flip(0) for tensor in by_time))
            zeros = th.zeros_like(hidden), th.zeros_like(cell)
            *_, kept = _loop(steps, zeros, chunks, [recurrent])
            of_gates = kept.flatten(0, 1).flip(0)
            before = _before(outputs, hidden, starts)
            of_recurrent = of_gates.flatten(0, 1).t() @ before.flatten(0, 1)
        return of_gates, None, None, None, of_recurrent


class _GRUScan(_Scan):
    """The recurrent part of a GRU; everything has time as its first dimension."""

    @staticmethod
    def forward(
        products: th.Tensor, hidden: th.Tensor, starts: th.Tensor, recurrent: th.Tensor, bias: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        weight = recurrent.t().contiguous()

        def steps(h: th.Tensor, *chunk: th.Tensor) -> list[th.Tensor]:
            products, starts, weight, bias = chunk
            found = []
            for product, start in zip(products, starts, strict=True):
                h = th.where(start, 0.0, h)
                r_x, z_x, new_x = product.chunk(3, 1)
                r_h, z_h, candidate = (h @ weight + bias).chunk(3, 1)
                r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
                new = (new_x + r * candidate).tanh()
                h = new + z * (h - new)
                found.append((h, th.cat((r, z, new), 1), candidate.clone()))
            return [h, *_stacked(found)]

        _, *kept = scan(steps, [hidden], _in_chunks(products, starts), [weight, bias])
        outputs, gates, candidates = (each.flatten(0, 1) for each in kept)
        return outputs, gates, candidates

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor, *_others: Any) -> tuple[th.Tensor | None, ...]:  # noqa: ANN401  # PyTorch's
        hidden, starts, recurrent, _bias, outputs, gates, candidates = ctx.saved_tensors

        def steps(of_h: th.Tensor, *chunk: th.Tensor) -> list[th.Tensor]:
            *rows, weight = chunk
            found = []
            for of_output, gate, candidate, before, start in zip(*rows, strict=True):
                r, z, new = gate.chunk(3, 1)
                of_output = of_output + of_h
                of_new = of_output * (1 - z) * (1 - new * new)
                of_r, of_z = of_new * candidate * r * (1 - r), of_output * (before - new) * z * (1 - z)
                of_products = th.cat((of_r, of_z, of_new * r), 1)
                of_h = th.where(start, 0.0, of_output * z + of_products @ weight)
                found.append((of_products, of_new))
            return [of_h, *_stacked(found)]

        # Under torch.func, derivatives would be wanted of derivatives
        with th.no_grad():
            before = _before(outputs, hidden, starts)
            chunks = _in_chunks(*(tensor.flip(0) for tensor in (gradient, gates, candidates, before, starts)))
            _, *kept = _loop(steps, [th.zeros_like(hidden)], chunks, [recurrent])
            of_products, of_new = (each.flatten(0, 1).flip(0) for each in kept)
            of_recurrent = of_products.flatten(0, 1).t() @ before.flatten(0, 1)
            size = hidden.shape[1]
            of_inputs = th.cat((of_products[..., : 2 * size], of_new), -1)
        return of_inputs, None, None, of_recurrent, of_products.flatten(0, 1).sum(0)
