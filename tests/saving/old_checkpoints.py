"""Training runs whose checkpoints must stay resumable; any version's code can write them.

``tests/data/checkpoints_0_1.tar.gz`` holds what version 0.1, commit 2860725, has written, in format 1. It was made
in a checkout of that commit, with NumPy 1.26.4, the oldest that it allows::

    git worktree add /tmp/version_0_1 2860725
    cd /tmp && PYTHONPATH=/tmp/version_0_1 python REPOSITORY/tests/saving/old_checkpoints.py checkpoints
    python -m tarfile -c REPOSITORY/tests/data/checkpoints_0_1.tar.gz checkpoints

``test_old_checkpoints.py`` resumes them with the present code. They stand for the files of users: do not make them
again. A later format gets an archive of its own.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from old_file_cases import (
    INTERRUPTED_AFTER,
    N_ENVS,
    N_STEPS,
    SMALL,
    TOTAL_TIMESTEPS,
    Interrupt,
    Interrupted,
    make_evaluation,
    make_run_env,
    points,
)
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint

CHECKPOINT = f"checkpoint_{INTERRUPTED_AFTER:06d}_{INTERRUPTED_AFTER * N_STEPS * N_ENVS}_steps"


class RaisesCoefficient(BaseCallback):
    """Has a state of its own, on which training depends."""

    n_changes = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.n_changes += 1
        self.model.ent_coef = 0.01 * self.n_changes

    def get_state(self) -> dict[str, Any]:
        return {"n_changes": self.n_changes}

    def set_state(self, state: dict[str, Any]) -> None:
        self.n_changes = state["n_changes"]


def cartpole() -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=0, wrapper_class=ResumableEnv)


def callbacks() -> list[BaseCallback]:
    return [make_evaluation(), EveryNTimesteps(24, RaisesCoefficient()), RaisesCoefficient()]


@dataclass
class Run:
    """A training run.

    :param make_env: its environments
    :param policy: name
    :param settings: further arguments of the constructor
    :param make_callbacks: the callbacks of its ``learn``
    """

    make_env: Callable[[], VecEnv] = points
    policy: str = "MlpPolicy"
    settings: dict[str, Any] = field(default_factory=dict)
    make_callbacks: Callable[[], list[BaseCallback]] = list

    def make_model(self) -> PPOPlus:
        defaults = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
        return PPOPlus(self.policy, self.make_env(), **{**defaults, "policy_kwargs": SMALL, **self.settings})


LSTM = {"lstm_hidden_size": 4, "memory_kwargs": {"sequence_length": 8}}
RUNS = {
    "mlp": Run(),
    "cartpole": Run(cartpole, settings={"learning_rate": "lin_3e-3", "target_kl": 0.05}),
    "lstm": Run(policy="MlpLstmPolicy", settings={"policy_kwargs": SMALL | LSTM}),
    "vec_normalize_and_callbacks": Run(make_run_env, make_callbacks=callbacks),
}


def write(folder: Path) -> None:
    """Write a checkpoint of each run, and the parameters at its end."""
    for name, run in RUNS.items():
        try:
            checkpoint = TrainingCheckpoint(1, folder / name, keep_last=1)
            run.make_model().learn(TOTAL_TIMESTEPS, [*run.make_callbacks(), checkpoint, Interrupt()])
        except Interrupted:
            model = run.make_model()
            model.learn(TOTAL_TIMESTEPS, run.make_callbacks())
            np.savez_compressed(folder / f"{name}.npz", **parameters_of(model))
    packages = ("gymnasium", "numpy", "sb3-contrib", "stable-baselines3", "torch")
    made_with = {"python": sys.version, **{package: version(package) for package in packages}}
    (folder / "made_with.json").write_text(json.dumps(made_with, indent=1))


def parameters_of(model: PPOPlus) -> dict[str, np.ndarray]:
    """Give the parameters of a model's policy by name."""
    return {name: parameter.detach().numpy() for name, parameter in model.policy.named_parameters()}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
