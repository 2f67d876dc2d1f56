"""Steps in which an environment only began an episode: rows of the rollout buffer that are no transitions."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.envs.batched_vec_env import resetting_env_in


class ResetRows:
    """Keeps track of the rows of a rollout that are no transitions, see ``BatchedVecEnv.was_reset``.

    :param env: the training environment
    :param rollout_buffer: the rollout buffer
    :param is_whole: whether one process acts and learns with all environments at once
    :raises ValueError: if the environment has such steps, and the buffer or several parts cannot take them
    """

    def __init__(self, env: VecEnv, rollout_buffer: RolloutBuffer, *, is_whole: bool) -> None:
        self._n_envs = env.num_envs
        self._env = resetting_env_in(env)
        if self._env is None:
            return
        in_the_way = "" if is_whole else "micro_batches=1 and distributed=False"
        if not isinstance(rollout_buffer, PPOPlusRolloutBuffer):
            in_the_way = f"PPOPlus's own rollout_buffer_class, got {type(rollout_buffer).__name__}"
        if in_the_way:
            raise ValueError(
                f"{self._env.env} takes a step to begin an episode (AutoresetMode.NEXT_STEP). This needs {in_the_way}; "
                "or choose autoreset_mode=AutoresetMode.SAME_STEP, where the environment has it"
            )
        self._rows: list[np.ndarray] = []

    def count_transitions(self) -> int:
        """Return how many environments have made a transition in the step that was just done."""
        if self._env is None:
            return self._n_envs
        was_reset = self._env.was_reset
        self._rows.append(was_reset)
        return self._n_envs - int(np.count_nonzero(was_reset))

    def finish(self, rollout_buffer: RolloutBuffer) -> None:
        """Mark the rows in the full buffer.

        :param rollout_buffer: the buffer
        """
        if self._env is not None:
            assert isinstance(rollout_buffer, PPOPlusRolloutBuffer)
            rollout_buffer.set_valid(~np.stack(self._rows))
