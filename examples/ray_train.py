"""Ray Train starts two workers, which train one model. One is killed in the middle; the run goes on to the same end.

With --folder it trains there; started again, it goes on. Without, it compares a run without interruption with one of
which a worker was killed by SIGKILL.
"""

import argparse
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch as th
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.distributed import RayTrainReport, share_of

N_ENVS = 8  # of all workers
ARGUMENTS = {"n_steps": 128, "batch_size": 256, "learning_rate": "lin_1e-3", "seed": 0, "device": "cpu"}


def train(config: dict[str, Any]) -> None:
    """Begin training, or go on with it where Ray has replaced a worker. Each worker runs this."""
    n_envs, _ = share_of(N_ENVS)
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs, seed=0, wrapper_class=ResumableEnv))
    folder = Path(config["folder"])
    callbacks = [TrainingCheckpoint(config["save_freq"], folder), RayTrainReport()]
    if config["kill_at"]:
        callbacks.append(KillOnce(config["kill_at"], folder / "was_killed"))
    if latest_checkpoint(folder):
        model = PPOPlus.resume(folder, env, device="cpu")
        print(f"going on from {model.num_timesteps} steps")
        model.continue_learning(callbacks)
    else:
        model = PPOPlus("MlpPolicy", env, distributed=True, **ARGUMENTS)
        model.learn(config["timesteps"], callbacks)


class KillOnce(BaseCallback):
    """Kills the second worker, which cannot notice it, as when a host fails."""

    def __init__(self, timesteps: int, was_killed: Path) -> None:
        super().__init__()
        self.timesteps, self.was_killed = timesteps, was_killed

    def _on_step(self) -> bool:
        is_second = ray.train.get_context().get_world_rank() == 1
        if is_second and self.num_timesteps >= self.timesteps and not self.was_killed.exists():
            self.was_killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return True


def run(folder: Path, timesteps: int, save_freq: int, kill_at: int | None = None) -> Result:
    """Train on two workers, or go on with the run of this folder, which the hosts of all workers must see."""
    folder = folder.absolute()  # Ray gives each worker a working directory of its own
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "folder": str(folder / "training"),
            "timesteps": timesteps,
            "save_freq": save_freq,
            "kill_at": kill_at,
        },
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    return trainer.fit()


def main(timesteps: int = 20_000) -> bool:
    """Compare a run without interruption with one of which a worker was killed."""
    with tempfile.TemporaryDirectory() as folder:
        whole = run(Path(folder, "whole"), timesteps, timesteps // 4)
        killed = run(Path(folder, "killed"), timesteps, timesteps // 4, kill_at=timesteps * 5 // 8)
        models = [PPOPlus.load(Path(result.checkpoint.path, "model.zip")) for result in (whole, killed)]
    print(f"mean return {killed.metrics['rollout/ep_rew_mean']:.0f}")
    pairs = zip(*(model.policy.parameters() for model in models), strict=True)
    same = all(th.equal(one, other) for one, other in pairs)
    print(f"the same parameters: {same}")
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="train with checkpoints there")
    arguments = parser.parse_args()
    # On a cluster, ray.init() alone. Each worker takes a CPU, and so does what watches over them
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    if arguments.folder:
        run(arguments.folder, arguments.timesteps, arguments.timesteps // 10)
    else:
        main(arguments.timesteps)
