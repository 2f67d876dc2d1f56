"""Operations that TorchInductor fuses are equal to PyTorch's own, to rounding."""

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_ppo_plus.fast.decompositions import SMALL_PRODUCT, addmm, multinomial, tanh
from sb3_ppo_plus.fast.graphs import compile_graph


def test_tanh_has_a_relative_error_of_4e7_everywhere_and_no_nan():
    positive = th.cat([th.linspace(0, 12, 400_001), th.logspace(-30, 4, 9999)])
    x = th.cat([positive, -positive])
    expected = x.double().tanh()
    error = (tanh(x).double() - expected).abs()
    assert (error <= 4e-7 * expected.abs()).all()
    limits = tanh(th.tensor([-th.inf, th.inf]))
    assert th.allclose(limits, th.tensor([-1.0, 1.0]))
    assert tanh(th.tensor([th.nan])).isnan().all()


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16])
def test_other_precisions_keep_pytorchs_tanh(dtype):
    assert tanh(th.ones(2, dtype=dtype)) is NotImplemented


def test_multinomial_draws_what_pytorch_draws():
    weights = th.rand(512, 7).softmax(-1)
    th.manual_seed(3)
    expected = th.multinomial(weights, 1, replacement=True)
    th.manual_seed(3)
    assert th.equal(multinomial(weights, 1, True), expected)
    assert multinomial(weights, 2, True) is NotImplemented


def test_small_layers_are_linear_and_large_ones_are_left_to_blas():
    layer, x = nn.Linear(9, 5), th.randn(4, 9)
    th.testing.assert_close(addmm(layer.bias, x, layer.weight.t()), layer(x))
    rows = SMALL_PRODUCT // 45 + 1
    assert addmm(layer.bias, x.repeat(rows, 1)[:rows], layer.weight.t()) is NotImplemented


def test_a_compiled_graph_equals_eager_code_and_draws_its_numbers():
    torso, head = nn.Linear(3, 8), nn.Linear(8, 4)
    inputs = [parameter.detach() for parameter in (torso.weight, torso.bias, head.weight, head.bias)]

    def function(x, *parameters):
        logits = F.linear(th.tanh(F.linear(x, *parameters[:2])), *parameters[2:])
        return (logits, th.multinomial(logits.softmax(-1), 1, replacement=True))

    compiled = compile_graph(function, [th.zeros(6, 3), *inputs], nn.Sequential(torso, head))
    for seed in range(3):
        x = th.randn(6, 3)
        th.manual_seed(seed)
        expected = function(x, *inputs)
        th.manual_seed(seed)
        logits, sample = compiled(x, *inputs)
        th.testing.assert_close(logits, expected[0])
        assert th.equal(sample, expected[1])
