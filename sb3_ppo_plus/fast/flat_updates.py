"""Updates of torch.optim's Adam, AdamW, SGD and RMSprop as pure functions of flat tensors, for compiled graphs.

torch.optim's own functions change their arguments in place and read the step on the host. A graph can do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

Settings = Mapping[str, Any]
OptimizerState = dict[str, th.Tensor]
Update = Callable[[Settings, th.Tensor, th.Tensor, OptimizerState, th.Tensor], tuple[th.Tensor, OptimizerState]]


def adam(
    settings: Settings, parameters: th.Tensor, gradient: th.Tensor, state: OptimizerState, learning_rate: th.Tensor
) -> tuple[th.Tensor, OptimizerState]:
    """Adam and AdamW (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019); ``torch.optim.adam.adam``.

    :param settings: the parameter group's settings, by torch.optim's names
    :param parameters: flat parameters
    :param gradient: flat gradient
    :param state: optimiser state of ``parameters``, by torch.optim's names
    :param learning_rate: 0-dim tensor
    :return: parameters and state after the step
    """
    beta1, beta2 = settings["betas"]
    weight_decay = settings["weight_decay"]
    step = state["step"] + 1
    gradient = -gradient if settings["maximize"] else gradient
    if weight_decay != 0 and settings["decoupled_weight_decay"]:
        parameters = parameters * (1 - learning_rate * weight_decay)
    elif weight_decay != 0:
        gradient = gradient + weight_decay * parameters
    exp_avg = th.lerp(state["exp_avg"], gradient, 1 - beta1)
    exp_avg_sq = state["exp_avg_sq"] * beta2 + (1 - beta2) * gradient * gradient
    new_state = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if settings["amsgrad"]:
        exp_avg_sq = new_state["max_exp_avg_sq"] = th.maximum(state["max_exp_avg_sq"], exp_avg_sq)
    # In float32, 1 - 0.999 ** step would have only four digits in the first steps
    exact_step = step.double()
    step_size = (learning_rate.double() / (1 - beta1**exact_step)).float()
    correction = (1 - beta2**exact_step).sqrt().float()
    return parameters - step_size * (exp_avg / (exp_avg_sq.sqrt() / correction + settings["eps"])), new_state


def sgd(
    settings: Settings, parameters: th.Tensor, gradient: th.Tensor, state: OptimizerState, learning_rate: th.Tensor
) -> tuple[th.Tensor, OptimizerState]:
    """Stochastic gradient descent; ``torch.optim.sgd.sgd``. Parameters and result as in :func:`adam`."""
    momentum, weight_decay = settings["momentum"], settings["weight_decay"]
    gradient = -gradient if settings["maximize"] else gradient
    if weight_decay != 0:
        gradient = gradient + weight_decay * parameters
    if momentum == 0:
        return parameters - learning_rate * gradient, {}
    buffer = state["momentum_buffer"] * momentum + (1 - settings["dampening"]) * gradient
    direction = gradient + momentum * buffer if settings["nesterov"] else buffer
    return parameters - learning_rate * direction, {"momentum_buffer": buffer}


def rmsprop(
    settings: Settings, parameters: th.Tensor, gradient: th.Tensor, state: OptimizerState, learning_rate: th.Tensor
) -> tuple[th.Tensor, OptimizerState]:
    """RMSprop (Tieleman and Hinton 2012); ``torch.optim.rmsprop.rmsprop``. Parameters and result as in :func:`adam`."""
    alpha, weight_decay = settings["alpha"], settings["weight_decay"]
    gradient = -gradient if settings["maximize"] else gradient
    if weight_decay != 0:
        gradient = gradient + weight_decay * parameters
    square_avg = state["square_avg"] * alpha + (1 - alpha) * gradient * gradient
    new_state = {"step": state["step"] + 1, "square_avg": square_avg}
    variance = square_avg
    if settings["centered"]:
        grad_avg = new_state["grad_avg"] = th.lerp(state["grad_avg"], gradient, 1 - alpha)
        variance = square_avg - grad_avg * grad_avg
    direction = gradient / (variance.sqrt() + settings["eps"])
    if settings["momentum"] > 0:
        direction = new_state["momentum_buffer"] = state["momentum_buffer"] * settings["momentum"] + direction
    return parameters - learning_rate * direction, new_state


UPDATES: dict[type[Optimizer], Update] = {Adam: adam, AdamW: adam, SGD: sgd, RMSprop: rmsprop}
