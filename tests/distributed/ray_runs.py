"""Training under Ray Train, for tests and for ray_kills.py: the function of a worker, and what a run has come to."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import ray.train
import torch as th
from rank_runs import results_of
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.distributed import RayTrainReport, share_of

N_ENVS, N_STEPS = 4, 16
UPDATE = N_ENVS * N_STEPS


class Killed(BaseCallback):
    """Kills one worker once: at a step, or a while after training has begun, wherever it is then.

    :param config: ``killed_rank``, and ``killed_at`` (timesteps) or ``killed_after`` (seconds)
    :param folder: holds a file from then on
    """

    def __init__(self, config, folder):
        super().__init__()
        self.config = config
        self.note = Path(folder, "killed")

    def _on_training_start(self):
        if self._is_due() and "killed_after" in self.config:
            threading.Thread(target=self._kill_after, args=(self.config["killed_after"],), daemon=True).start()

    def _on_step(self):
        if self._is_due() and self.num_timesteps >= self.config.get("killed_at", float("inf")):
            self._kill()
        return True

    def _is_due(self):
        return ray.train.get_context().get_world_rank() == self.config.get("killed_rank") and not self.note.exists()

    def _kill_after(self, seconds):
        time.sleep(seconds)
        self._kill()

    def _kill(self):
        self.note.write_text(f"{self.num_timesteps}")
        os.kill(os.getpid(), signal.SIGKILL)


def make_env():
    return VecNormalize(make_vec_env("CartPole-v1", share_of(N_ENVS)[0], seed=0, wrapper_class=ResumableEnv))


def make_model(env, distributed):
    arguments = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 1, "device": "cpu"}
    return PPOPlus("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, distributed=distributed, **arguments)


def never_killed(distributed, n_updates):
    """Train in two processes that Ray has not started, and return what :func:`end_of` does."""

    def train_rank(rank):
        return what_is_left(make_model(make_env(), distributed).learn(n_updates * UPDATE))

    begun = time.monotonic()
    end = results_of(2, train_rank)[0]
    return {**end, "seconds": time.monotonic() - begun}


def what_is_left(model):
    normalizer = model.get_vec_normalize_env()
    statistics = [normalizer.obs_rms.mean, normalizer.obs_rms.var, normalizer.ret_rms.var, normalizer.returns]
    return {"parameters": model.get_parameters(), "statistics": [th.as_tensor(each) for each in statistics]}


def train(config):
    """What each worker does. ``config["from_ray"]``: it goes on from the checkpoint that Ray has copied."""
    folder, env = Path(config["folder"]), make_env()
    callbacks = [RayTrainReport(), TrainingCheckpoint(1, folder), Killed(config, folder)]
    begun = time.monotonic()
    if config["from_ray"] and ray.train.get_checkpoint() is not None:
        with ray.train.get_checkpoint().as_directory() as directory:
            model = PPOPlus.resume(directory, env, device="cpu")
    elif not config["from_ray"] and latest_checkpoint(folder):
        model = PPOPlus.resume(folder, env, device="cpu")
    else:
        model = make_model(env, config["distributed"])
    resumed_at = model.num_timesteps
    if resumed_at:
        model.continue_learning(callbacks)
    else:
        model.learn(config["n_updates"] * UPDATE, callbacks)
    if ray.train.get_context().get_world_rank() == 0:
        how = {"resumed_at": resumed_at, "seconds": time.monotonic() - begun}
        th.save({**what_is_left(model), **how}, folder / "end.pt")


def run(folder: Path, storage: Path, max_failures: int = 1, **config) -> Result:
    """Train on two workers. Ray makes the process group; its copies of checkpoints are in ``storage``."""
    return TorchTrainer(
        train,
        train_loop_config={"folder": str(folder), **config},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=folder.name, storage_path=str(storage), failure_config=FailureConfig(max_failures=max_failures)
        ),
    ).fit()


def end_of(folder: Path) -> dict:
    """Parameters, optimiser and statistics at the end; ``resumed_at`` (timesteps) and ``seconds`` of learning."""
    return th.load(folder / "end.pt", weights_only=False)


def start_ray() -> None:
    """Start Ray on this machine."""
    # Otherwise its workers have the niceness 15, and hardly move where other tests run
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # its name
    # Workers do not find the folders of tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def random_kill(seed: int, seconds: float) -> dict:
    """Choose which worker is killed, and when.

    :param seconds: how long training takes; another run may be faster
    """
    draw = random.Random(seed)
    return {"killed_rank": draw.randrange(2), "killed_after": draw.uniform(0.0, 0.7 * seconds)}
