"""PPO whose coefficients and learning rates follow schedules."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from sb3_ppo_plus.saving.untrusted_model import read_parameters
from sb3_ppo_plus.schedules import make_schedule, schedule_value
from sb3_ppo_plus.update.learning_rates import LearningRateGroups, critic_only_parameters
from sb3_ppo_plus.update.losses import LossCoefficients

Coefficient = float | str | Schedule
"""A number, a schedule or any callable of progress_remaining, or a schedule's string form such as "lin_3e-4"."""


class ScheduledPPO(PPO):
    """The part of :class:`PPOPlus` that follows schedules: loss coefficients, and the learning rates."""

    critic_learning_rate: Coefficient | None
    _critic_lr_schedule: FloatSchedule | None
    _learning_rate_groups: LearningRateGroups
    _scheduled_learning_rates: tuple[object, object]

    def _setup_coefficients(self) -> None:
        for name in ("ent_coef", "vf_coef"):
            make_schedule(getattr(self, name), name)
        self.clip_range = _float_schedule(self.clip_range, "clip_range")
        # SB3's own check refuses numbers that are not positive
        given_vf = self.clip_range_vf
        if given_vf is not None and not (isinstance(given_vf, float | int) and not given_vf > 0):
            self.clip_range_vf = _float_schedule(self.clip_range_vf, "clip_range_vf")

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = _float_schedule(self.learning_rate, "learning_rate")
        self._critic_lr_schedule = (
            None
            if self.critic_learning_rate is None
            else _float_schedule(self.critic_learning_rate, "critic_learning_rate")
        )
        self._scheduled_learning_rates = (self.learning_rate, self.critic_learning_rate)

    def _separate_critic(self) -> None:
        if self._learning_rate_groups.optimizer is not self.policy.optimizer:
            self._learning_rate_groups = LearningRateGroups(self.policy.optimizer, self.lr_schedule(1))
        if self.critic_learning_rate is not None and not self._learning_rate_groups.knows_critic:
            critic_parameters = critic_only_parameters(self.policy)
            self._learning_rate_groups.split_off_critic(self.policy.optimizer, critic_parameters)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout overshoots total_timesteps, and SB3's schedules go below 0 with it
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        if self._scheduled_learning_rates != (self.learning_rate, self.critic_learning_rate):
            self._setup_lr_schedule()
        self._separate_critic()
        progress = self._current_progress_remaining
        learning_rate = schedule_value(self.lr_schedule, progress, "learning_rate")
        critic_learning_rate = learning_rate
        if self._critic_lr_schedule is not None:
            critic_learning_rate = schedule_value(self._critic_lr_schedule, progress, "critic_learning_rate")
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            self._learning_rate_groups.update(optimizer, learning_rate, critic_learning_rate)
        self.logger.record("train/learning_rate", learning_rate)
        self.logger.record("train/critic_learning_rate", critic_learning_rate)

    def _current_coefficients(self) -> LossCoefficients:
        # Read from the attributes at each update, so that an assignment between updates counts
        def current(name: str) -> float:
            return schedule_value(make_schedule(getattr(self, name), name), self._current_progress_remaining, name)

        return LossCoefficients(
            clip_range=current("clip_range"),
            clip_range_vf=None if self.clip_range_vf is None else current("clip_range_vf"),
            ent_coef=current("ent_coef"),
            vf_coef=current("vf_coef"),
        )

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return the state dicts of policy and optimiser, the latter in SB3's order whatever its groups are."""
        self._separate_critic()
        parameters = super().get_parameters()
        parameters["policy.optimizer"] = self._learning_rate_groups.state_dict(self.policy.optimizer)
        return parameters

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Load state dicts as :meth:`get_parameters` returns them, or from a file of PPOPlus or SB3's PPO.

        A file need not be trusted: nothing in it is unpickled, and nothing unpacked.

        :param load_path_or_dict: path of a saved model, or the state dicts
        :param exact_match: require every parameter of every module
        :param device: device on which to load
        :raises UntrustedFileError: a ValueError, for a file that is damaged or hostile
        """
        if isinstance(load_path_or_dict, dict):
            parameters = load_path_or_dict
        else:
            parameters = read_parameters(load_path_or_dict, device)
        if "policy.optimizer" in parameters:
            self._separate_critic()
            split = self._learning_rate_groups.split_state_dict(self.policy.optimizer, parameters["policy.optimizer"])
            parameters = {**parameters, "policy.optimizer": split}
        super().set_parameters(parameters, exact_match, device)


def _float_schedule(value: object, name: str) -> FloatSchedule:
    """Validate a coefficient and give it the form that SB3's PPO gives its schedules."""
    schedule = make_schedule(value, name)
    return FloatSchedule(value if isinstance(value, float | int) else schedule)
