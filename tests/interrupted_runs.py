"""Small runs that write checkpoints and stop before their end."""

import json

from environments import ToyEnv
from models import build
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from states import state_of

from sb3_ppo_plus import ResumableEnv, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories, read_checkpoint, write_checkpoint


def make_model(env=None, **kwargs):
    return build(env or make_envs(), **{"n_steps": 8, "batch_size": 8} | kwargs)


def make_envs(n_envs=2, wrapper_class=ResumableEnv, **kwargs):
    return make_vec_env(lambda: ToyEnv(**kwargs), n_envs=n_envs, seed=0, wrapper_class=wrapper_class)


def steps_of(save_path):
    return sorted(int(directory.name.split("_")[2]) for directory in checkpoint_directories(save_path))


def learned(total=96, **kwargs):
    model = make_model(**kwargs)
    model.learn(total)
    return state_of(model)


class StopAfter(BaseCallback):
    """Stops training at the end of an update. SB3's callbacks stop it in the middle of a rollout."""

    def __init__(self, num_timesteps):
        super().__init__()
        self.n_last = num_timesteps

    def _on_step(self):
        return True

    def on_update_end(self):
        return self.model.num_timesteps < self.n_last


def interrupted(save_path, after=48, total=96, **kwargs):
    model = make_model(**kwargs)
    model.learn(total, [TrainingCheckpoint(1, save_path), StopAfter(after)])
    assert model.num_timesteps == after
    return model


def rewritten(save_path, change):
    """Write a forged checkpoint with right hashes: the newest one after a change of its files and its state."""
    files = dict(read_checkpoint(latest_checkpoint(save_path)).files)
    state = json.loads(files["training_state.json"])
    change(files, state)
    if "training_state.json" in files:
        files["training_state.json"] = json.dumps(state).encode()
    return write_checkpoint(save_path / "rewritten", files, 48)
