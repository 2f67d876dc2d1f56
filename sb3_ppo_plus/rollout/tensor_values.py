"""The values of truncated episodes, and the check of what environments return, where a rollout is in tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_plus.envs.output_check import EnvOutputCheck
from sb3_ppo_plus.envs.tensor_episodes import StepInfos
from sb3_ppo_plus.rollout.actor import RolloutActor, leaves_of
from sb3_ppo_plus.rollout.tensor_buffer import TensorRolloutBuffer
from sb3_ppo_plus.rollout.values import RolloutValues
from sb3_ppo_plus.trees import tree_map

# How many numbers of last observations wait for the end of a rollout: 64 MiB of float32
MOST_WAITING = 2**24


class TensorOutputCheck(EnvOutputCheck):
    """Refuses observations and rewards that are not finite: on the CPU at each step, elsewhere after the last one.

    :param rollout_buffer: the rollout buffer
    :param waits_are_free: whether reading a tensor takes no time
    """

    def __init__(self, rollout_buffer: TensorRolloutBuffer, *, waits_are_free: bool) -> None:
        self._normalize = None
        self._buffer = rollout_buffer
        self._waits_are_free = waits_are_free

    def __call__(self, observations: Any, rewards: Any, step: int) -> None:  # noqa: ANN401  # tensors, arrays, or a dict
        """Check what a step has returned, see :meth:`EnvOutputCheck.__call__`."""
        if self._waits_are_free:
            super().__call__(
                tree_map(np.asarray, observations), None if rewards is None else rewards.cpu().numpy(), step
            )

    def check_rollout(self, last_observations: Any) -> None:  # noqa: ANN401  # tensors, arrays, or a dict
        """Check all steps of a rollout, unless each was checked.

        :param last_observations: those after the last step
        :raises NonFiniteError: see :meth:`EnvOutputCheck.__call__`
        """
        if self._waits_are_free:
            return
        n_steps, tensors = self._buffer.pos, self._buffer.tensors
        self._check_steps("reward", tensors["rewards"][:n_steps], 0)
        stored = tensors["observations"]
        of_keys = stored.items() if isinstance(stored, dict) else [("", stored)]
        for key, tensor in of_keys:
            last = last_observations[key] if key else last_observations
            # What a step returned is stored with the next one
            name = f"observation {key!r}" if key else "observation"
            self._check_steps(name, tensor[:n_steps], -1)
            self._check_steps(name, th.as_tensor(last)[None], n_steps - 1)

    def _check_steps(self, name: str, tensor: th.Tensor, first: int) -> None:
        if tensor.is_floating_point() and not bool(th.isfinite(tensor).all()):
            step = int((~th.isfinite(tensor)).flatten(1).any(dim=1).nonzero()[0])
            self._check(name, tensor[step].cpu().numpy(), None, max(0, step + first))


class TensorRolloutValues(RolloutValues):
    """Bootstraps timeouts: eagerly on the CPU as :class:`RolloutValues`, else in one batch after the rollout.

    Elsewhere, they are computed at each step where the actor says so: with a memory, and if a callback may change the
    policy without being noticed.

    :param actor: the actor of the rollout
    :param check_output: refuses terminal observations that are not finite
    :param waits_are_free: whether reading a tensor takes no time
    """

    def __init__(self, actor: RolloutActor, check_output: EnvOutputCheck, *, waits_are_free: bool) -> None:
        super().__init__(actor, check_output)
        self._waits_are_free = waits_are_free
        self._waiting: list[tuple[int, th.Tensor, Any, float]] = []
        self._n_numbers = 0
        self._found: list[tuple[th.Tensor, th.Tensor, th.Tensor, Any]] = []

    def bootstrap_timeouts(self, rewards: Any, dones: Any, infos: Any, step: int, gamma: float) -> None:  # noqa: ANN401  # tensors, StepInfos
        """Add to rewards the values of truncated episodes, see :meth:`RolloutValues.bootstrap_timeouts`."""
        if self._waits_are_free and not bool(infos.timeouts.any()):
            return
        if (self._actor.batches_timeouts or not self._waits_are_free) and self._actor.defers_timeouts:
            self._keep(infos, step, gamma)
        elif self._waits_are_free or bool(infos.timeouts.any()):
            # On the CPU this is the memory of the tensor
            array = rewards.cpu().numpy()
            super().bootstrap_timeouts(array, infos.dones.cpu().numpy(), infos, step, gamma)
            rewards.copy_(th.from_numpy(array))

    def finish(self, rollout_buffer: RolloutBuffer) -> None:
        """Write what was computed after the rollout, see :meth:`RolloutValues.finish`."""
        self._find()
        super().finish(rollout_buffer)

    def _keep(self, infos: StepInfos, step: int, gamma: float) -> None:
        if infos.final_observations is None:
            return
        observations = tree_map(th.clone, infos.final_observations)
        self._waiting.append((step, infos.timeouts, observations, gamma))
        self._n_numbers += sum(leaf.numel() for leaf in leaves_of(observations))
        if self._waits_are_free or self._n_numbers > MOST_WAITING:
            self._find()

    def _find(self) -> None:
        """Look which episodes ended by a time limit in the steps that wait, and forget all other observations."""
        if not self._waiting:
            return
        steps, timeouts, observations, gammas = zip(*self._waiting, strict=True)
        rows, envs = th.stack(timeouts).nonzero(as_tuple=True)
        if len(rows):
            together = tree_map(lambda *parts: th.stack(parts)[rows, envs], observations[0], *observations[1:])
            of_rows = (th.tensor(steps, device=rows.device)[rows], th.tensor(gammas, device=rows.device)[rows])
            self._found.append((of_rows[0], envs, of_rows[1], together))
        self._waiting, self._n_numbers = [], 0

    def _add_to_rewards(self, rollout_buffer: RolloutBuffer) -> None:
        assert isinstance(rollout_buffer, TensorRolloutBuffer)
        device = rollout_buffer.device
        if self._observations:
            amounts = self._values_of_observations()
            steps, envs = (th.tensor(each, device=device) for each in (self._steps, self._indices))
            rollout_buffer.add_to_rewards(steps, envs, th.from_numpy(amounts).to(device))
        if self._found:
            # In one batch, as the values of observations in arrays
            first, *others = self._found
            steps, envs, gammas, observations = tree_map(lambda *parts: th.cat(parts).to(device), first, *others)
            self._check_found(observations, steps, envs)
            rollout_buffer.add_to_rewards(steps, envs, gammas * self._first_actor.values_of(observations))

    def _check_found(self, observations: Any, steps: th.Tensor, envs: th.Tensor) -> None:  # noqa: ANN401  # tensor or dict
        for tensor in leaves_of(observations):
            is_odd = ~th.isfinite(tensor.reshape(len(tensor), -1)).all(dim=1)
            if bool(is_odd.any()):
                row = int(is_odd.nonzero()[0])
                observation = tree_map(lambda part, row=row: part[row].cpu().numpy(), observations)
                self._check_output.terminal(observation, int(envs[row]), int(steps[row]))
