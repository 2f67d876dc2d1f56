"""Run it with --folder, stop it with Ctrl-C, run it again: it goes on from its last checkpoint, to the same end.

Without --folder it compares a run without interruption with one that a SIGTERM stopped and that was resumed.
"""

import argparse
import os
import signal
import tempfile
from pathlib import Path

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint, latest_checkpoint


def make_env() -> VecEnv:
    # ResumableEnv outermost, so that it answers for TimeLimit and Monitor too
    return VecNormalize(make_vec_env("Pendulum-v1", n_envs=4, seed=0, wrapper_class=ResumableEnv))


def train(timesteps: int, folder: Path, *others: BaseCallback) -> PPOPlus:
    """Begin training, or go on with it if there is a checkpoint."""
    checkpoint = TrainingCheckpoint(save_freq=10_000, save_path=folder)
    if latest_checkpoint(folder):
        model = PPOPlus.resume(folder, make_env(), device="cpu")
        print(f"going on from {model.num_timesteps} steps")
        model.continue_learning([checkpoint, *others])
    else:
        model = PPOPlus("MlpPolicy", make_env(), n_steps=256, learning_rate="lin_1e-3", seed=0, device="cpu")
        model.learn(timesteps, [checkpoint, *others])
    if checkpoint.received_signal:
        print(f"stopped by {checkpoint.received_signal.name} at {model.num_timesteps} steps")
    return model


class TerminateAt(BaseCallback):
    """Sends this process a SIGTERM, as a cluster does before it takes the machine away."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps == self.timesteps:
            os.kill(os.getpid(), signal.SIGTERM)
        return True


def main(timesteps: int = 20_000) -> bool:
    """Compare a run without interruption with one that was stopped and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        whole = train(timesteps, Path(folder, "whole"))
        train(timesteps, Path(folder, "stopped"), TerminateAt(timesteps // 2))
        resumed = train(timesteps, Path(folder, "stopped"))
    pairs = zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True)
    same = all(th.equal(one, other) for one, other in pairs)
    print(f"the same parameters: {same}")
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="train with checkpoints there")
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments.timesteps, arguments.folder)
    else:
        main(arguments.timesteps)
