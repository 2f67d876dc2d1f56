"""Trains one model in several processes, each with a share of the environments, and goes on from its last checkpoint.

    torchrun --nproc-per-node 2 examples/torchrun.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/torchrun.py

Started again, or restarted by torchrun after a process was killed, it goes on to the same end. Without torchrun, one
process has all environments.
"""

import argparse
import os
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.distributed import share_of

N_ENVS = 8  # of all processes


def make_env() -> VecEnv:
    """Make this process's share of the environments. Each has the seed that it would have in one process."""
    n_envs, first = share_of(N_ENVS)
    return VecNormalize(make_vec_env("Pendulum-v1", n_envs, seed=first, wrapper_class=ResumableEnv))


def main(timesteps: int = 200_000, folder: Path = Path("logs/torchrun")) -> PPOPlus:
    """Begin training, or go on with it if there is a checkpoint. Steps are counted over all processes."""
    # torchrun sets RANK. Without it there is nothing to join
    is_launched = "RANK" in os.environ
    checkpoint = TrainingCheckpoint(save_freq=20_000, save_path=folder)
    if latest_checkpoint(folder):
        model = PPOPlus.resume(folder, make_env(), device="auto", distributed=is_launched)
        model.continue_learning(checkpoint)
    else:
        model = PPOPlus(
            "MlpPolicy",
            make_env(),
            n_steps=256,
            batch_size=256,
            gamma=0.9,
            learning_rate="lin_1e-3",
            seed=0,
            verbose=1,
            distributed=is_launched,
        )
        model.learn(timesteps, checkpoint)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, default=Path("logs/torchrun"), help="checkpoints; all processes see it")
    arguments = parser.parse_args()
    trained = main(arguments.timesteps, arguments.folder)
    if int(os.environ.get("RANK", "0")) == 0:
        trained.save(arguments.folder / "model.zip")
        is_done = trained.num_timesteps >= arguments.timesteps
        print(f"{trained.num_timesteps} steps are done" + ("" if is_done else ": start again to go on"))
