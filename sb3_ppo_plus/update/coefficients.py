"""The coefficients of an update. Each is a number, a schedule, or a schedule's string form such as "lin_3e-4"."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.schedules import make_schedule, schedule_value
from sb3_ppo_plus.update.learning_rates import LearningRateGroups, critic_only_parameters
from sb3_ppo_plus.update.losses import LossCoefficients

Coefficient = float | str | Schedule
"""A number, a schedule or any callable of progress_remaining, or a schedule's string form such as "lin_3e-4"."""


OPTIONAL_TERMS = ("caps_temporal", "caps_spatial")
"""Coefficients of terms of the loss that are not computed where the coefficient is the number 0."""


def terms_in_use(model: PlusModel) -> list[str]:
    """Return the coefficients of the optional terms of a model's loss.

    :param model: the model
    """
    given = {name: getattr(model, name) for name in OPTIONAL_TERMS}
    return [name for name, value in given.items() if not (isinstance(value, Real) and value == 0)]


class Coefficients:
    """Values of a model's coefficients at this point of training, including its learning rates.

    Users may assign coefficients to the model's attributes. A new value is parsed when an update first sees it, so an
    assignment has effect from the next update on.
    """

    def __init__(self) -> None:
        self._parsed: dict[str, tuple[object, Schedule]] = {}
        self._learning_rate: object = None
        """What SB3's ``lr_schedule`` was made from."""
        self._groups: LearningRateGroups | None = None
        self._latest: tuple[float, ...] = ()

    def setup(self, model: PlusModel) -> None:
        """Validate the coefficients of the loss, and turn clip ranges into the schedules that SB3's PPO keeps.

        :param model: the model
        :raises ValueError: for a value that is not allowed
        :raises TypeError: for a value of the wrong type
        """
        for name in ("ent_coef", "vf_coef", *OPTIONAL_TERMS):
            self._schedule(name, getattr(model, name))
        model.clip_range = _float_schedule(model.clip_range, "clip_range")
        # SB3's own check refuses numbers that are not positive
        given = model.clip_range_vf
        if given is not None and not (isinstance(given, float | int) and not given > 0):
            model.clip_range_vf = _float_schedule(given, "clip_range_vf")

    def setup_learning_rate(self, model: PlusModel) -> None:
        """Validate the learning rates, and make SB3's ``lr_schedule``.

        :param model: the model
        :raises ValueError: for a value that is not allowed
        :raises TypeError: for a value of the wrong type
        """
        model.lr_schedule = _float_schedule(model.learning_rate, "learning_rate")
        self._learning_rate = model.learning_rate
        if model.critic_learning_rate is not None:
            self._schedule("critic_learning_rate", model.critic_learning_rate)

    def of_loss(self, model: PlusModel) -> LossCoefficients:
        """Return the coefficients of the loss.

        :param model: the model
        :raises ValueError: for a schedule's value that is not allowed
        """
        return LossCoefficients(
            clip_range=self._value(model, "clip_range"),
            clip_range_vf=None if model.clip_range_vf is None else self._value(model, "clip_range_vf"),
            ent_coef=self._value(model, "ent_coef"),
            vf_coef=self._value(model, "vf_coef"),
            **{name: self._value(model, name) for name in terms_in_use(model)},
        )

    def update_learning_rates(
        self, model: PlusModel, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer
    ) -> None:
        """Set and log the learning rate of every parameter group that follows a schedule.

        :param model: the model
        :param optimizers: the policy's optimiser
        :raises ValueError: for a schedule's value that is not allowed
        """
        if not _is_same(self._learning_rate, model.learning_rate):
            # The model's method, which a subclass may override
            model._setup_lr_schedule()
            self._learning_rate = model.learning_rate
        groups = self.groups(model)
        actor = critic = schedule_value(model.lr_schedule, model._current_progress_remaining, "learning_rate")
        if model.critic_learning_rate is not None:
            critic = self._value(model, "critic_learning_rate")
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            groups.update(optimizer, actor, critic)
        self._latest = actor, critic
        model.logger.record("train/learning_rate", actor)
        model.logger.record("train/critic_learning_rate", critic)

    def groups(self, model: PlusModel) -> LearningRateGroups:
        """Return how the parameter groups of the policy's present optimiser follow the schedules.

        :param model: the model; if it has a ``critic_learning_rate``, the critic's parameters get their own groups
        """
        optimizer = model.policy.optimizer
        if self._groups is None or self._groups.optimizer is not optimizer:
            self._groups = LearningRateGroups(optimizer, model.lr_schedule(1), self._latest)
        if model.critic_learning_rate is not None and not self._groups.knows_critic:
            self._groups.split_off_critic(optimizer, critic_only_parameters(model.policy))
        return self._groups

    def to_saved_groups(self, model: PlusModel, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return state dicts in which the optimiser has the groups that the policy made, in SB3's order.

        :param model: the model
        :param parameters: state dicts that SB3's ``get_parameters`` returned
        """
        if "policy.optimizer" not in parameters:
            return parameters
        groups = self.groups(model)
        return {**parameters, "policy.optimizer": groups.state_dict(model.policy.optimizer)}

    def to_present_groups(self, model: PlusModel, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return state dicts in which the optimiser has the groups that the policy's optimiser has now.

        :param model: the model
        :param parameters: state dicts that :meth:`to_saved_groups` returned; the optimiser's may be missing
        """
        if "policy.optimizer" not in parameters:
            return parameters
        groups, optimizer = self.groups(model), model.policy.optimizer
        return {**parameters, "policy.optimizer": groups.split_state_dict(optimizer, parameters["policy.optimizer"])}

    def _value(self, model: PlusModel, name: str) -> float:
        return schedule_value(self._schedule(name, getattr(model, name)), model._current_progress_remaining, name)

    def _schedule(self, name: str, given: object) -> Schedule:
        if name not in self._parsed or not _is_same(self._parsed[name][0], given):
            self._parsed[name] = given, make_schedule(given, name)
        return self._parsed[name][1]


def _is_same(before: object, given: object) -> bool:
    """Whether a coefficient is as before: an equal number or string, or the very schedule."""
    return before is given or (type(before) is type(given) and isinstance(given, int | float | str) and before == given)


def _float_schedule(given: object, name: str) -> FloatSchedule:
    schedule = make_schedule(given, name)
    return FloatSchedule(given if isinstance(given, float | int) else schedule)
