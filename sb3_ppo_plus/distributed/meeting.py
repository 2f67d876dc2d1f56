"""What processes decide and learn together during their rollouts: whether to stop, episodes, statistics."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.distributed.agreement import digest, on_cpu, refuse_differences, settings_of
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.distributed.shared_statistics import SharedStatistics
from sb3_ppo_plus.envs.replaced_statistics import statistics_of


class _Message(NamedTuple):
    """What a process tells the others at the end of its rollout.

    :param stops: whether a callback has ended training
    :param num_timesteps: timesteps done in all processes, as far as this one knows
    :param episodes: step, and info of each episode that has ended
    :param statistics: what its steps bring to the statistics of normalisers
    :param settings: those of its model, see :func:`settings_of`
    """

    stops: bool
    num_timesteps: int
    episodes: list[tuple[int, dict[str, Any] | None, Any]]
    statistics: list[tuple[Any, ...]]
    settings: dict[str, str]


class Meeting:
    """Meetings of the processes that train a model.

    :param ranks: the processes
    :param at_each_step: meet after each step too, so that all stop after the same one
    """

    def __init__(self, ranks: Ranks, *, at_each_step: bool) -> None:
        self._ranks = ranks
        self._at_each_step = at_each_step
        self._is_alone = ranks.size == 1
        self._n_steps = 0
        self._has_warned = False
        self._episodes: list[tuple[int, dict[str, Any] | None, Any]] = []

    def note_episodes(self, model: PlusModel, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        """Note the episodes that a step has ended. Those of several processes wait for :meth:`end_rollout`.

        :param model: the model
        :param infos: the infos of the step
        :param dones: which episodes ended with it, shape (n_envs,)
        """
        if self._is_alone:
            model._update_info_buffer(infos, dones)
            return
        self._n_steps += 1
        for index, info in enumerate(infos):
            episode, success = info.get("episode"), info.get("is_success")
            # As in SB3's _update_info_buffer
            success = success if dones[index] else None
            if episode is not None or success is not None:
                self._episodes.append((self._n_steps, episode, success))

    def goes_on(self, model: PlusModel, wants_to: bool) -> bool:
        """Return whether the rollout goes on after a step.

        :param model: the model
        :param wants_to: what the callbacks of this process say
        """
        if self._is_alone:
            return wants_to
        if self._at_each_step:
            wants_to = not self._ranks.any(not wants_to)
        return wants_to or self._meet(model, stops=True)

    def end_rollout(self, model: PlusModel) -> bool:
        """Meet after the last step of a rollout. The model then knows the episodes of all processes.

        :param model: the model
        :return: whether training goes on
        """
        return self._is_alone or self._meet(model, stops=False)

    def end_update(self, model: PlusModel, wants_to: bool) -> bool:
        """Meet after an update. If the policies have come to differ, all go on with that of the first process.

        Layers such as BatchNorm keep statistics of what each process sees. A callback may have changed one policy.

        :param model: the model
        :param wants_to: whether the callbacks of this process want to go on
        :return: whether training goes on
        """
        if self._is_alone:
            return wants_to
        policy = model.policy
        parameters = dict(policy.named_parameters())
        digests = digest(parameters), digest(dict(policy.named_buffers()))
        answers = self._ranks.gather_objects((wants_to, *digests), "the end of an update")
        if len({answer[1:] for answer in answers}) > 1:
            if len({answer[1] for answer in answers}) > 1 and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    "the parameters of the processes differ, since something has changed them in some only: all go on "
                    "with those of the first process",
                    stacklevel=3,
                )
            state = on_cpu(policy.state_dict()) if self._ranks.rank == 0 else None
            policy.load_state_dict(self._ranks.gather_objects(state, "the policy")[0])
        return all(answer[0] for answer in answers)

    def _meet(self, model: PlusModel, *, stops: bool) -> bool:
        shared = _shared_statistics(model.env)
        own_parts = [] if self._at_each_step else [statistics.own_part() for statistics in shared]
        messages: list[_Message] = self._ranks.gather_objects(
            _Message(stops, model.num_timesteps, self._episodes, own_parts, settings_of(model)), "the end of a rollout"
        )
        refuse_differences([message.settings for message in messages])
        # The order of one process that has all environments
        episodes = [episode for message in messages for episode in message.episodes]
        for _, info, success in sorted(episodes, key=lambda episode: episode[0]):
            # As a step's infos: users may override the method
            found = {"episode": info} if info is not None else {}
            found |= {"is_success": success} if success is not None else {}
            model._update_info_buffer([found], np.ones(1, dtype=bool))
        self._n_steps, self._episodes = 0, []
        if not self._at_each_step:
            for statistics, *parts in zip(shared, *(message.statistics for message in messages), strict=True):
                statistics.merge(parts)
        # A process that has stopped early has counted fewer
        model.num_timesteps = max(message.num_timesteps for message in messages)
        return not any(message.stops for message in messages)


def _shared_statistics(env: VecEnv | None) -> list[SharedStatistics]:
    return [statistics for statistics in statistics_of(env) if isinstance(statistics, SharedStatistics)]
