"""Operations written so that TorchInductor fuses them with others; equal to PyTorch's to float32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

# With more multiplications than this, a call of BLAS is faster than a loop in the fused code
SMALL_PRODUCT = 2**15

# Eigen and XLA compute tanh as this rational function. Odd and even coefficients, highest power first
_TANH_LIMIT = 7.90531110763549805
_TANH_NUMERATOR = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_DENOMINATOR = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def multinomial(weights: th.Tensor, n_samples: int, replacement: bool = False) -> th.Tensor:
    """Draw a sample from the random numbers that PyTorch's ``multinomial`` uses.

    Each category draws an exponential number whose rate is its weight. The smallest number wins.

    :param weights: shape (batch, categories)
    :param n_samples: for more than 1, PyTorch's own operation is kept
    :param replacement: without effect on one sample
    :return: int64, shape (batch, 1)
    """
    if n_samples != 1:
        return NotImplemented  # type: ignore[no-any-return]  # tells make_fx to keep PyTorch's own operation
    clocks: th.Tensor = th.ops.aten.exponential.default(th.empty_like(weights))
    return (weights / clocks).argmax(-1, keepdim=True)


def tanh(x: th.Tensor) -> th.Tensor:
    """Compute tanh as a rational function, with a relative error of at most 4e-7.

    :param x: any shape; only float32 on the CPU, for others PyTorch's own operation is kept
    """
    if x.dtype != th.float32 or x.device.type != "cpu":
        return NotImplemented  # type: ignore[no-any-return]  # tells make_fx to keep PyTorch's own operation
    x = x.clamp(-_TANH_LIMIT, _TANH_LIMIT)
    return x * _polynomial(x * x, _TANH_NUMERATOR) / _polynomial(x * x, _TANH_DENOMINATOR)


def _polynomial(x: th.Tensor, coefficients: tuple[float, ...]) -> th.Tensor:
    value: th.Tensor = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = x * value + coefficient
    return value


def addmm(bias: th.Tensor, x: th.Tensor, weight: th.Tensor, *, beta: float = 1, alpha: float = 1) -> th.Tensor:
    """Apply a small linear layer as one loop, because on the CPU a call of BLAS costs more than its arithmetic.

    :param bias: shape (outputs,)
    :param x: shape (batch, inputs)
    :param weight: shape (inputs, outputs)
    :param beta: factor of the bias; for other values than 1, PyTorch's own operation is kept
    :param alpha: factor of the product; for other values than 1, PyTorch's own operation is kept
    :return: shape (batch, outputs)
    """
    if x.device.type != "cpu" or x.shape[0] * weight.numel() > SMALL_PRODUCT or (beta, alpha) != (1, 1):
        return NotImplemented  # type: ignore[no-any-return]  # tells make_fx to keep PyTorch's own operation
    return (x.unsqueeze(1) * weight.t().unsqueeze(0)).sum(-1) + bias


FUSED_OPERATIONS: dict[Any, Callable[..., th.Tensor]] = {
    th.ops.aten.multinomial.default: multinomial,
    th.ops.aten.tanh.default: tanh,
    th.ops.aten.addmm.default: addmm,
}
