"""The learning rate of each parameter group: groups of the critic, and groups that the policy made."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor


def critic_only_parameters(policy: ActorCriticPolicy) -> list[th.nn.Parameter]:
    """Find the trainable parameters on which the value prediction depends, but not the action distribution.

    Autograd tells which these are. Names would not, for custom policies and shared extractors.

    :param policy: the policy; it is not changed
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
    actor_gradients = th.autograd.grad(log_prob, parameters, allow_unused=True)
    critic_gradients = th.autograd.grad(value, parameters, allow_unused=True)
    return [
        parameter
        for parameter, from_actor, from_critic in zip(parameters, actor_gradients, critic_gradients, strict=True)
        if from_actor is None and from_critic is not None
    ]


class _GroupRate(NamedTuple):
    """How a group follows a schedule.

    :param is_critic: whether it follows the critic's schedule
    :param factor: the group's learning rate divided by the schedule's; None: the group's rate is not changed
    """

    is_critic: bool
    factor: float | None


class LearningRateGroups:
    """Sets the learning rate of each parameter group of an optimiser.

    Groups that the policy made keep their ratio to the schedule's initial value. SB3's ``update_learning_rate`` would
    give all groups one value. Groups that are added later are not changed.

    :param optimizer: the policy's optimiser
    :param initial_learning_rate: value of the learning rate's schedule at progress_remaining = 1
    :param latest: values of the learning rate's and the critic's schedule at the last update. If a group has one of
        them, the policy is a copy of one in training, and the groups' ratios are those to these values
    """

    def __init__(
        self, optimizer: th.optim.Optimizer, initial_learning_rate: float, latest: tuple[float, ...] = ()
    ) -> None:
        self.optimizer = optimizer
        self.knows_critic = False
        self._saved_order = _parameters_of(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        reference = latest[0] if any(rate in latest for rate in rates) else initial_learning_rate
        self._rates = [
            _GroupRate(is_critic=False, factor=1.0 if rate in latest else _relative_rate(rate, reference))
            for rate in rates
        ]
        if len(self._rates) == 1:
            # A single group follows the schedule, as in SB3
            self._rates = [_GroupRate(is_critic=False, factor=1.0)]

    @property
    def factors(self) -> list[float | None]:
        """Each group's learning rate divided by its schedule's; None: the group's rate is not changed."""
        return [rate.factor for rate in self._rates]

    @factors.setter
    def factors(self, factors: list[float | None]) -> None:
        self._rates = [rate._replace(factor=factor) for rate, factor in zip(self._rates, factors, strict=True)]

    def split_off_critic(self, optimizer: th.optim.Optimizer, critic_parameters: list[th.nn.Parameter]) -> None:
        """Give the critic's parameters their own groups, which follow the critic's schedule from now on.

        :param optimizer: the policy's optimiser; groups that mix critic and other parameters are split in place
        :param critic_parameters: what :func:`critic_only_parameters` returns
        """
        critic_ids = {id(parameter) for parameter in critic_parameters}
        added_later = optimizer.param_groups[len(self._rates) :]
        self._rates.extend(_GroupRate(is_critic=False, factor=None) for _ in added_later)
        self._saved_order.extend(list(group["params"]) for group in added_later)
        for index, (group, rate) in enumerate(zip(list(optimizer.param_groups), list(self._rates), strict=True)):
            critic_part = [parameter for parameter in group["params"] if id(parameter) in critic_ids]
            other_part = [parameter for parameter in group["params"] if id(parameter) not in critic_ids]
            if critic_part and other_part:
                group["params"] = other_part
                optimizer.add_param_group({**group, "params": critic_part})
                self._rates.append(rate._replace(is_critic=True))
            elif critic_part:
                self._rates[index] = rate._replace(is_critic=True)
        self.knows_critic = True

    def update(self, optimizer: th.optim.Optimizer, learning_rate: float, critic_learning_rate: float) -> None:
        """Set the learning rate of every group, except groups that were added later.

        :param optimizer: the policy's optimiser
        :param learning_rate: the schedule's value now
        :param critic_learning_rate: the value of the critic's schedule now
        """
        # zip stops at the groups that were added later
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            if rate.factor is not None:
                group["lr"] = (critic_learning_rate if rate.is_critic else learning_rate) * rate.factor

    def state_dict(self, optimizer: th.optim.Optimizer) -> dict[str, Any]:
        """Return the optimiser's state with the groups that it had before the split, in SB3's order.

        :param optimizer: the policy's optimiser
        """
        state_dict = optimizer.state_dict()
        if len(self._rates) == len(self._saved_order) or len(optimizer.param_groups) != len(self._rates):
            return state_dict
        return _regrouped(state_dict, _parameters_of(optimizer), self._saved_order)

    def split_state_dict(self, optimizer: th.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with the groups that the optimiser has now.

        :param optimizer: the policy's optimiser
        :param state_dict: what :meth:`state_dict` returned
        """
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
    """Put the parameters of a state dict into other groups. A new group gets the settings of its first parameter."""
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
