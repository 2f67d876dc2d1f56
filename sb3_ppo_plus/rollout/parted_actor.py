"""Acting part by part, each with a random stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.distributed.parts import Parts
from sb3_ppo_plus.distributed.random_streams import RandomStream
from sb3_ppo_plus.rollout.actor import RolloutActor
from sb3_ppo_plus.trees import tree_map


class PartedActor(RolloutActor):
    """Lets each part of the environments act by itself, so that it does the same whatever other parts there are.

    :param actors: the actor of each part of this process; parts may share one
    :param parts: the parts
    :param n_envs: number of environments of this process
    """

    def __init__(self, actors: list[RolloutActor], parts: Parts, n_envs: int) -> None:
        super().__init__(actors[0].policy)
        self._actors = actors
        self._parts = parts
        self._n_envs = n_envs
        self._envs = parts.envs_of(n_envs)

    @property
    def states(self) -> RNNStates | None:  # type: ignore[override]  # an attribute of actors without parts
        """States of the policy's memory in all environments; None: it has no memory."""
        states = [actor.states for actor in self._actors]
        return None if states[0] is None else tree_map(lambda *parts: th.cat(parts, dim=1), *states)

    def begin_rollout(self, rollout_buffer: RolloutBuffer | None = None) -> None:
        """Notice what has changed since the last rollout."""
        for actor in dict.fromkeys(self._actors):
            actor.begin_rollout(rollout_buffer)

    def act(
        self, observations: PyTorchObs, episode_starts: np.ndarray | None, context: dict[str, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Choose actions, see :meth:`RolloutActor.act`."""
        acted = []
        for part, (actor, envs, stream) in enumerate(self._with_streams()):
            starts = None if episode_starts is None else episode_starts[envs]
            self._parts.use_noise(actor.policy, part)
            with stream:
                if len(self._actors) == 1 and not self._parts.is_exact:
                    # Nothing is divided, and no other division has to give the same bits
                    return actor.act(observations, episode_starts, context)
                acted.append(actor.act(_rows(observations, envs), starts, _rows(context, envs)))
        actions, values, log_probs = zip(*acted, strict=True)
        return th.cat(actions), _joined(values), _joined(log_probs)

    def terminal_value(self, observation: Any, index: int) -> th.Tensor | float | None:  # noqa: ANN401  # array or dict
        """Predict the value of a truncated episode, see :meth:`RolloutActor.terminal_value`."""
        part, index_in_part = divmod(index, self._n_envs // len(self._actors))
        with self._parts.streams()[part]:
            return self._actors[part].terminal_value(observation, index_in_part)

    def last_values(self, observations: PyTorchObs, episode_starts: np.ndarray) -> th.Tensor:
        """Predict the values after the last step, see :meth:`RolloutActor.last_values`."""
        values = []
        for actor, envs, stream in self._with_streams():
            with stream:
                values.append(actor.last_values(_rows(observations, envs), episode_starts[envs]))
        return th.cat(values)

    def evaluate_later(self, rollout_buffer: RolloutBuffer) -> tuple[th.Tensor, th.Tensor] | None:
        """Compute what the actors have left out, see :meth:`RolloutActor.evaluate_later`."""
        # Actors that leave something out share one, which evaluates part by part
        return self._actors[0].evaluate_later(rollout_buffer)

    def terminal_values(self, observations: list[Any], indices: list[int]) -> np.ndarray:
        """Predict values of truncated episodes part by part, see :meth:`RolloutActor.terminal_values`."""
        of_parts = np.array(indices) // (self._n_envs // len(self._actors))
        values: np.ndarray = np.empty(len(observations), np.float32)
        for part in np.unique(of_parts).tolist():
            (chosen,) = (of_parts == part).nonzero()
            given = [observations[each] for each in chosen], [indices[each] for each in chosen]
            with self._parts.streams()[part]:
                values[chosen] = self._actors[part].terminal_values(*given)
        return values

    def end_rollout(self) -> None:
        """Release what belongs to the rollout."""
        for actor in dict.fromkeys(self._actors):
            actor.end_rollout()

    def successor(self, policy: ActorCriticPolicy) -> PartedActor:
        """Return the actor for the rest of a rollout, see :meth:`RolloutActor.successor`."""
        return PartedActor([actor.successor(policy) for actor in self._actors], self._parts, self._n_envs)

    def _with_streams(self) -> Iterator[tuple[RolloutActor, slice, RandomStream]]:
        return zip(self._actors, self._envs, self._parts.streams(), strict=True)


def _rows(tensors: Any, envs: slice) -> Any:  # noqa: ANN401  # a tensor, or a dict of tensors
    # In memory of their own: BLAS may round by where a tensor begins
    return tree_map(lambda tensor: tensor[envs].clone(), tensors)


def _joined(tensors: tuple[th.Tensor | None, ...]) -> th.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return th.cat(present) if present else None
