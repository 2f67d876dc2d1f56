"""Operations in forms that TorchInductor fuses into the code around them, equal to PyTorch's to float32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

# Multiplications up to which a loop of the fused code beats a call of BLAS
SMALL_PRODUCT = 2**15

# Odd and even coefficients, highest power first, of the rational function that Eigen, and so XLA, has for tanh
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
    """Draw a sample as PyTorch does, from the same random numbers: the first of competing exponential clocks.

    :param weights: shape (batch, categories)
    :param n_samples: 1, else PyTorch's own way is taken
    :param replacement: of no meaning for one sample
    :return: int64, shape (batch, 1)
    """
    if n_samples != 1:
        return NotImplemented  # type: ignore[no-any-return]  # the protocol of decompositions: PyTorch's own is kept
    clocks: th.Tensor = th.ops.aten.exponential.default(th.empty_like(weights))
    return (weights / clocks).argmax(-1, keepdim=True)


def tanh(x: th.Tensor) -> th.Tensor:
    """Compute tanh as a rational function, to a relative error of 4e-7; float32 only."""
    if x.dtype != th.float32 or x.device.type != "cpu":
        return NotImplemented  # type: ignore[no-any-return]  # the same
    x = x.clamp(-_TANH_LIMIT, _TANH_LIMIT)
    return x * _polynomial(x * x, _TANH_NUMERATOR) / _polynomial(x * x, _TANH_DENOMINATOR)


def _polynomial(x: th.Tensor, coefficients: tuple[float, ...]) -> th.Tensor:
    value: th.Tensor = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = x * value + coefficient
    return value


def addmm(bias: th.Tensor, x: th.Tensor, weight: th.Tensor, *, beta: float = 1, alpha: float = 1) -> th.Tensor:
    """Apply a linear layer to few rows, as one loop; on the CPU, where a call of BLAS costs more than its arithmetic.

    :param bias: shape (outputs,)
    :param x: shape (batch, inputs)
    :param weight: shape (inputs, outputs)
    """
    if x.device.type != "cpu" or x.shape[0] * weight.numel() > SMALL_PRODUCT or (beta, alpha) != (1, 1):
        return NotImplemented  # type: ignore[no-any-return]  # the same
    return (x.unsqueeze(1) * weight.t().unsqueeze(0)).sum(-1) + bias


FUSED_OPERATIONS: dict[Any, Callable[..., th.Tensor]] = {
    th.ops.aten.multinomial.default: multinomial,
    th.ops.aten.tanh.default: tanh,
    th.ops.aten.addmm.default: addmm,
}
