"""A GRU over sequences on the CPU, with its derivative written out by hand.

PyTorch has no kernel for a whole sequence of a GRU on the CPU: its own way takes some twenty operations a step of time,
each with a node for its gradient. Here a step takes six and its derivative four, since all that does not depend on the
step before is computed once for all steps.
"""

from __future__ import annotations

from typing import Any

import torch as th

from sb3_ppo_plus.policies.segments import TimeOrder


class GRUScan(th.autograd.Function):
    """One layer of ``nn.GRU`` over sequences that are cut at episode starts.

    ``apply(order, features, hidden, weight_ih, weight_hh, bias_ih, bias_hh)``, all but ``hidden`` with a gradient:
    features, shape (n_sequences, length, features_dim), and states before the first step, shape (n_sequences, size).
    It returns outputs, shape (n_sequences, length, size).
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # PyTorch's
        order: TimeOrder,
        features: th.Tensor,
        hidden: th.Tensor,
        weight_ih: th.Tensor,
        weight_hh: th.Tensor,
        bias_ih: th.Tensor,
        bias_hh: th.Tensor,
    ) -> th.Tensor:
        """Compute the outputs."""
        size, flat = weight_hh.shape[1], features.flatten(0, 1)[order.rows]
        # Two of the three parts are sums, to which both biases may be added first
        of_sums = th.cat((bias_hh[: 2 * size], bias_hh.new_zeros(size)))
        gates = th.addmm(bias_ih + of_sums, flat, weight_ih.t())
        outputs, candidates = gates.new_empty(len(gates), size), gates.new_empty(len(gates), size)
        h = initial = order.initial(hidden)
        recurrent, recurrent_new = weight_hh[: 2 * size].t(), weight_hh[2 * size :].t()
        bias_new = bias_hh[2 * size :]
        tensors = (gates[:, : 2 * size], *th.split(gates, size, 1), outputs, candidates)
        of_times = zip(*(th.split(tensor, order.counts) for tensor in tensors), order.counts, strict=True)
        for r_and_z, r, z, new, output, candidate, n in of_times:
            r_and_z.addmm_(h[:n], recurrent).sigmoid_()
            th.addmm(bias_new, h[:n], recurrent_new, out=candidate)
            new.addcmul_(r, candidate).tanh_()
            h = th.lerp(new, h[:n], z, out=output)
        ctx.order = order
        ctx.save_for_backward(flat, initial, weight_ih, weight_hh, outputs, gates, candidates)
        return order.unsorted(outputs).view(*features.shape[:2], size)

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:  # noqa: ANN401  # PyTorch's
        """Compute the gradients."""
        order: TimeOrder = ctx.order
        flat, initial, weight_ih, weight_hh, outputs, gates, candidates = ctx.saved_tensors
        r, z, new = gates.view(len(gates), 3, -1).unbind(1)
        before = order.previous(outputs, initial)
        by_new = (1 - z) * (1 - new.square())
        # A step's gradient times these is that of the products with the state before
        factors = th.stack((by_new * candidates * r * (1 - r), (before - new) * z * (1 - z), by_new * r), 1)
        of_products = th.empty_like(factors)
        of_outputs = gradient.flatten(0, 1)[order.rows]
        tensors = (of_outputs, factors, z, of_products)
        of_times = list(zip(*(th.split(tensor, order.counts) for tensor in tensors), strict=True))
        later: tuple[th.Tensor, ...] | None = None
        for of_output, factor, kept, of_product in reversed(of_times):
            if later is not None:
                from_later = of_output[: len(later[0])].addcmul_(later[0], later[1])
                from_later.addmm_(later[2].flatten(1), weight_hh)
            th.mul(of_output.unsqueeze(1), factor, out=of_product)
            later = of_output, kept, of_product
        of_gates = of_products.clone()
        th.mul(of_outputs, by_new, out=of_gates[:, 2])
        of_products, of_gates = of_products.flatten(1), of_gates.flatten(1)
        of_features = order.unsorted(of_gates @ weight_ih).view(*gradient.shape[:2], -1)
        of_weights = of_gates.t() @ flat, of_products.t() @ before
        return None, of_features, None, *of_weights, of_gates.sum(0), of_products.sum(0)
