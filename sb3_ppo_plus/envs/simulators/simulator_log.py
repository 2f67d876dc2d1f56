"""What simulators tell for the log, in SB3's log."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus.envs.simulators.simulator_vec_env import SimulatorVecEnv


class SimulatorLog(BaseCallback):
    """Logs the means over each rollout of what a simulator tells in ``extras["log"]``, as rsl_rl's runner does.

    In Isaac Lab these are the terms of the reward, the reasons why episodes ended, and the levels of a curriculum.
    Names without "/" get "Episode/" in front, as in rsl_rl.

    :param verbose: see SB3's ``BaseCallback``
    :raises ValueError: when training begins, if the environment is no simulator
    """

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self._values: dict[str, list[th.Tensor]] = {}

    def _on_training_start(self) -> None:
        env: Any = self.training_env
        while not isinstance(env, SimulatorVecEnv):
            if not hasattr(env, "venv"):
                raise ValueError(f"SimulatorLog needs an environment of as_vec_env(simulator), got {self.training_env}")
            env = env.venv
        self._env = env

    def _on_step(self) -> bool:
        for name, value in self._env.log.items():
            # Means are computed after the rollout, so that no step waits for a GPU
            tensor = th.as_tensor(value).detach()
            self._values.setdefault(name, []).append(tensor.float().mean())
        return True

    def _on_rollout_end(self) -> None:
        for name, values in self._values.items():
            mean = th.stack([value.to(values[-1].device) for value in values]).mean().item()
            self.logger.record(name if "/" in name else f"Episode/{name}", mean)
        self._values = {}
