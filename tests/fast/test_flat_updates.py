"""The pure updates give what torch.optim's own steps give, over several steps."""

from typing import Any

import pytest
import torch as th
from torch.optim import SGD, Adam, AdamW, RMSprop

from sb3_ppo_plus.fast.flat_updates import UPDATES

CASES: list[tuple[type[th.optim.Optimizer], dict[str, Any]]] = [
    (Adam, {}),
    (Adam, {"eps": 1e-5, "betas": (0.8, 0.99)}),
    (Adam, {"weight_decay": 0.1}),
    (Adam, {"amsgrad": True, "maximize": True}),
    (AdamW, {"weight_decay": 0.1}),
    (AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    (SGD, {}),
    (SGD, {"weight_decay": 0.1, "maximize": True}),
    (SGD, {"momentum": 0.9, "dampening": 0.3}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (RMSprop, {}),
    (RMSprop, {"centered": True, "weight_decay": 0.1}),
    (RMSprop, {"momentum": 0.9, "alpha": 0.9, "maximize": True}),
]


@pytest.mark.parametrize(("optimizer_class", "settings"), CASES)
def test_ten_updates_equal_ten_steps_of_torch_optim(
    optimizer_class: type[th.optim.Optimizer], settings: dict[str, Any]
) -> None:
    generator = th.Generator().manual_seed(0)
    expected = th.randn(20, generator=generator)
    optimizer = optimizer_class([expected], lr=1e-2, **settings)
    # The first step creates torch.optim's state, from which the updates continue
    expected.grad = th.randn(20, generator=generator)
    optimizer.step()
    actual = expected.clone()
    state = {k: v.clone() for k, v in optimizer.state[expected].items() if isinstance(v, th.Tensor)}
    group = optimizer.param_groups[0]
    for step in range(10):
        group["lr"] = 1e-2 / (step + 1)
        expected.grad = th.randn(20, generator=generator)
        before = actual.clone()
        actual, state = UPDATES[optimizer_class](group, actual, expected.grad, state, th.tensor(group["lr"]))
        assert not th.equal(before, actual)
        optimizer.step()
    th.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    for name, value in state.items():
        th.testing.assert_close(value, optimizer.state[expected][name], rtol=1e-5, atol=1e-7)


def test_an_update_changes_none_of_its_arguments() -> None:
    parameters, gradient = th.ones(3), th.full((3,), 2.0)
    state = {"step": th.tensor(1.0), "exp_avg": th.zeros(3), "exp_avg_sq": th.ones(3)}
    settings = Adam([th.zeros(1)], weight_decay=0.1).param_groups[0]
    UPDATES[Adam](settings, parameters, gradient, state, th.tensor(0.1))
    assert parameters.tolist() == [1.0] * 3
    assert gradient.tolist() == [2.0] * 3
    assert [state["step"].item(), state["exp_avg"].sum().item(), state["exp_avg_sq"].sum().item()] == [1.0, 0.0, 3.0]
