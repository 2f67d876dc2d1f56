"""Learning rates per parameter group of the policy's optimiser: the critic's own, and those that the policy made."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor


def critic_only_parameters(policy: ActorCriticPolicy) -> list[th.nn.Parameter]:
    """Trainable parameters that the value prediction depends on and the action distribution does not.

    Asked of autograd rather than of names, so that custom policies and shared extractors are told apart as well.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    zeros: Any = create_empty_array(policy.observation_space, n=1, fn=np.zeros)
    observation = obs_as_tensor(zeros, policy.device)
    was_training = policy.training
    policy.set_training_mode(False)
    distribution = policy.get_distribution(observation)
    log_prob = distribution.log_prob(distribution.get_actions(deterministic=True)).sum()
    value = policy.predict_values(observation).sum()
    policy.set_training_mode(was_training)
    of_actor = th.autograd.grad(log_prob, parameters, allow_unused=True)
    of_critic = th.autograd.grad(value, parameters, allow_unused=True)
    return [
        parameter
        for parameter, actor_gradient, critic_gradient in zip(parameters, of_actor, of_critic, strict=True)
        if actor_gradient is None and critic_gradient is not None
    ]


class _GroupRate(NamedTuple):
    """Which schedule a group follows, and by what factor (None: its learning rate is left as it is)."""

    of_critic: bool
    factor: float | None


class LearningRateGroups:
    """How the learning rate of each of an optimiser's parameter groups follows the schedules.

    Groups that the policy itself made keep their ratio to the schedule's initial value, where SB3's
    ``update_learning_rate`` writes one value to all. Groups that are added later are left alone.

    :param optimizer: the policy's optimiser
    :param initial_learning_rate: value of the learning rate's schedule at progress_remaining = 1
    """

    def __init__(self, optimizer: th.optim.Optimizer, initial_learning_rate: float) -> None:
        self.optimizer = optimizer
        self.knows_critic = False
        self._saved_order = _parameters_of(optimizer)
        self._rates = [
            _GroupRate(of_critic=False, factor=_relative_rate(group["lr"], initial_learning_rate))
            for group in optimizer.param_groups
        ]
        if len(self._rates) == 1:
            # A single group follows the schedule, as in SB3
            self._rates = [_GroupRate(of_critic=False, factor=1.0)]

    @property
    def factors(self) -> list[float | None]:
        """By what factor each group follows its schedule; None: it does not."""
        return [rate.factor for rate in self._rates]

    @factors.setter
    def factors(self, factors: list[float | None]) -> None:
        self._rates = [rate._replace(factor=factor) for rate, factor in zip(self._rates, factors, strict=True)]

    def split_off_critic(self, optimizer: th.optim.Optimizer, critic_parameters: list[th.nn.Parameter]) -> None:
        """Give the critic's parameters groups of their own, which follow the critic's schedule from now on.

        :param optimizer: the policy's optimiser; groups with both kinds of parameters are split in place
        :param critic_parameters: see :func:`critic_only_parameters`
        """
        critic_ids = {id(parameter) for parameter in critic_parameters}
        added_later = optimizer.param_groups[len(self._rates) :]
        self._rates.extend(_GroupRate(of_critic=False, factor=None) for _ in added_later)
        self._saved_order.extend(list(group["params"]) for group in added_later)
        for index, (group, rate) in enumerate(zip(list(optimizer.param_groups), list(self._rates), strict=True)):
            of_critic = [parameter for parameter in group["params"] if id(parameter) in critic_ids]
            of_actor = [parameter for parameter in group["params"] if id(parameter) not in critic_ids]
            if of_critic and of_actor:
                group["params"] = of_actor
                optimizer.add_param_group({**group, "params": of_critic})
                self._rates.append(rate._replace(of_critic=True))
            elif of_critic:
                self._rates[index] = rate._replace(of_critic=True)
        self.knows_critic = True

    def update(self, optimizer: th.optim.Optimizer, learning_rate: float, critic_learning_rate: float) -> None:
        """Set the learning rate of every group that was there from the start."""
        # zip stops at the groups that were added later
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            if rate.factor is not None:
                group["lr"] = (critic_learning_rate if rate.of_critic else learning_rate) * rate.factor

    def state_dict(self, optimizer: th.optim.Optimizer) -> dict[str, Any]:
        """Return the optimiser's state with its groups as they were before the split, in SB3's order."""
        state_dict = optimizer.state_dict()
        if len(self._rates) == len(self._saved_order) or len(optimizer.param_groups) != len(self._rates):
            return state_dict
        return _regrouped(state_dict, _parameters_of(optimizer), self._saved_order)

    def split_state_dict(self, optimizer: th.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return ``state_dict``, grouped as :meth:`state_dict` returns it, with the groups of ``optimizer``."""
        is_split = len(self._rates) != len(self._saved_order)
        if not is_split or len(state_dict["param_groups"]) != len(self._saved_order):
            return state_dict
        return _regrouped(state_dict, self._saved_order, _parameters_of(optimizer))


def _relative_rate(learning_rate: float, initial: float) -> float | None:
    if learning_rate == initial:
        return 1.0
    return learning_rate / initial if initial > 0 else None


def _parameters_of(optimizer: th.optim.Optimizer) -> list[list[th.nn.Parameter]]:
    return [list(group["params"]) for group in optimizer.param_groups]


def _regrouped(
    state_dict: dict[str, Any], old_groups: list[list[th.nn.Parameter]], new_groups: list[list[th.nn.Parameter]]
) -> dict[str, Any]:
    """Renumber a state dict for other groups of its parameters; a new group takes its first parameter's settings."""
    old_index, settings = {}, {}
    for group, saved in zip(old_groups, state_dict["param_groups"], strict=True):
        for parameter, index in zip(group, saved["params"], strict=True):
            old_index[id(parameter)] = index
            settings[id(parameter)] = saved
    state: dict[int, Any] = {}
    param_groups = []
    n_seen = 0
    for new_group in new_groups:
        indices = list(range(n_seen, n_seen + len(new_group)))
        n_seen += len(new_group)
        param_groups.append({**settings[id(new_group[0])], "params": indices})
        for parameter, index in zip(new_group, indices, strict=True):
            if old_index[id(parameter)] in state_dict["state"]:
                state[index] = state_dict["state"][old_index[id(parameter)]]
    return {"state": state, "param_groups": param_groups}
