"""What a checkpoint after every update costs: HalfCheetah with PPO's defaults, each one timed.

Run ``python examples/benchmarks/checkpoint_cost.py [--compile] [--updates 10]``.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint


class Timed(TrainingCheckpoint):
    """Measures its own work."""

    def __init__(self, save_path: str) -> None:
        super().__init__(1, save_path)
        self.seconds: list[float] = []

    def save(self) -> Path:
        started = time.perf_counter()
        directory = super().save()
        self.seconds.append(time.perf_counter() - started)
        return directory


class Clock(BaseCallback):
    """Takes the time at the end of each update."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        self.times.append(time.perf_counter())
        return True


def main(env_id: str = "HalfCheetah-v5", n_envs: int = 1, updates: int = 10, compile: bool = False) -> float:
    """Print medians, and return the share of the time that checkpoints take."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        env = make_vec_env(env_id, n_envs=n_envs, seed=0, wrapper_class=ResumableEnv)
        model = PPOPlus("MlpPolicy", env, seed=0, device="cpu", compile=compile)
        clock, checkpoint = Clock(), Timed(folder)
        model.learn(model.n_steps * n_envs * updates, [clock, checkpoint])
    # The first update compiles, and the first checkpoint imports
    update = float(np.median(np.diff(clock.times)[1:])) - float(np.median(checkpoint.seconds[1:]))
    cost = float(np.median(checkpoint.seconds[1:]))
    print(
        f"{env_id}, {n_envs} envs, compile={compile}: rollout and update {1000 * update:.0f} ms, checkpoint "
        f"{1000 * cost:.1f} ms (slowest {1000 * max(checkpoint.seconds[1:]):.1f}), {100 * cost / update:.2f}% of it"
    )
    return cost / update


if __name__ == "__main__":
    th.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--n-envs", type=int, default=1)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    main(arguments.env, arguments.n_envs, arguments.updates, arguments.compile)
