"""Calls of a policy with given tensors in place of its parameters and buffers, for tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.func import functional_call

from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.update.gradient_step import Evaluation, Objective
from sb3_ppo_plus.update.tensor_places import tensor_places


class _Call(th.nn.Module):
    """Calls a function of a policy: ``functional_call`` takes only modules."""

    def __init__(self, function: Callable[..., Any], policy: th.nn.Module) -> None:
        super().__init__()
        self.function = function
        self.policy = policy

    def forward(self, *arguments: Any) -> Any:  # noqa: ANN401  # as the function returns
        return self.function(self.policy, *arguments)


def call_with(
    tensors: dict[str, th.Tensor],
    function: Callable[..., Any],
    policy: th.nn.Module,
    *arguments: Any,
) -> Any:  # noqa: ANN401  # as the function returns
    """Call ``function(policy, *arguments)`` with other tensors in place of the policy's own.

    :param tensors: by their names in :func:`sb3_ppo_plus.update.tensor_places.tensor_places`
    :param function: computes something with the policy
    :param policy: the policy, which has its own tensors again afterwards
    :param arguments: the function's other arguments
    :return: what the function returns
    """
    renamed = {f"policy.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Call(function, policy), renamed, arguments, tie_weights=False)


def evaluate_minibatch(policy: ActorCriticPolicy, objective: Objective, batch: RolloutBatch) -> Evaluation:
    """Evaluate a minibatch for a trace, see :meth:`Objective.evaluate`.

    :param policy: the policy
    :param objective: the objective of the update
    :param batch: the minibatch
    :raises RuntimeError: if the policy replaces its parameters, which a graph cannot follow
    """
    before = tensor_places(policy)
    evaluation = objective.evaluate(policy, batch)
    replaced = [name for name, tensor in tensor_places(policy).items() if tensor is not before.get(name)]
    if replaced:
        raise RuntimeError(f"the policy puts a new tensor in place of its {', '.join(replaced)} in each call")
    return evaluation
