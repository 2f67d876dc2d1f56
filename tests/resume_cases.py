"""Training runs that SIGKILL interrupts and that another process resumes. Each case runs in its own processes.

``python resume_cases.py interrupt|resume FOLDER`` leaves the results in FOLDER. test_kills.py compares them.
"""

import importlib
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # one thread
import gymnasium as gym
import numpy as np
import torch as th
from environments import ASYMMETRIC, DICT, IMAGE, MASKED_ACTION_SPACES, MaskedEnv, ToyEnv, record_logs
from forks import in_a_fork
from gymnasium import spaces
from interrupted_runs import make_envs
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    unwrap_vec_normalize,
)
from states import state_of

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint
from sb3_ppo_plus.env_states.resumable_env_for import resumable_env_for

N_UPDATES, INTERRUPTED_AFTER = 6, 3
N_STEPS = 32
NOT_TIMINGS = ("time/iterations", "time/total_timesteps")


class OwnMethods(gym.Env):
    """Has its own methods that save its state. TimeLimit and Monitor around it have none."""

    observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._position = self.np_random.normal(size=2)
        return self._position.astype(np.float32), {}

    def step(self, action):
        self._position = 0.9 * self._position + (action - 0.5) + 0.1 * self.np_random.normal(size=2)
        return self._position.astype(np.float32), -float(np.abs(self._position).sum()), False, False, {}

    def get_resume_state(self):
        return {"position": self._position, "generator": self.np_random.bit_generator.state}

    def set_resume_state(self, state):
        self._position = state["position"]
        self.np_random.bit_generator.state = state["generator"]


class ChangesCoefficient(BaseCallback):
    """Saves a state on which training depends."""

    def __init__(self):
        super().__init__()
        self.n_changes = 0

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.n_changes += 1
        self.model.ent_coef = 0.01 * self.n_changes

    def get_state(self):
        return {"n_changes": self.n_changes}

    def set_state(self, state):
        self.n_changes = state["n_changes"]


def gym_envs(env_id: str, **kwargs: Any) -> VecEnv:
    kwargs.setdefault("env_kwargs", {"max_episode_steps": 45})
    return make_vec_env(env_id, n_envs=2, seed=0, wrapper_class=ResumableEnv, **kwargs)


def replayed_envs(make: Callable[[], gym.Env], **kwargs: Any) -> VecEnv:
    """Make environments that cannot be saved, and play their episodes again."""
    by_replay = {"wrapper_class": ResumableEnv, "wrapper_kwargs": {"by": "replay"}}
    return VecNormalize(make_vec_env(make, n_envs=2, seed=0, **by_replay, **kwargs))


def lunar_lander() -> gym.Env:
    return gym.make("LunarLander-v3", max_episode_steps=45)


def bipedal_walker() -> gym.Env:
    return gym.make("BipedalWalker-v3", max_episode_steps=21)


def minigrid() -> gym.Env:
    # Importing it registers its environments
    wrappers = importlib.import_module("minigrid.wrappers")
    return gym.wrappers.FlattenObservation(wrappers.ImgObsWrapper(gym.make("MiniGrid-DoorKey-5x5-v0", max_steps=21)))


def wrapped_envs() -> VecEnv:
    """Make environments with all of SB3's wrappers that have a state, and a Monitor outside ResumableEnv."""

    def make():
        return Monitor(ResumableEnv(gym.wrappers.TimeLimit(ToyEnv(DICT, max_steps=100), 9)))

    extracted = VecExtractDictObs(make_vec_env(make, n_envs=2, seed=0), "vector")
    return VecNormalize(VecCheckNan(VecMonitor(VecFrameStack(extracted, 3))))


def eval_callbacks() -> list[BaseCallback]:
    evaluation = EvalCallback(gym_envs("Pendulum-v1"), n_eval_episodes=1, eval_freq=25, deterministic=False, verbose=0)
    return [evaluation, EveryNTimesteps(50, ChangesCoefficient()), ChangesCoefficient()]


@dataclass
class Case:
    make_env: Callable[[], VecEnv]
    policy: str = "MlpPolicy"
    arguments: dict[str, Any] = field(default_factory=dict)
    make_callbacks: Callable[[], list[BaseCallback]] = list
    log_interval: int = 1

    def make_model(self) -> PPOPlus:
        defaults = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
        defaults["policy_kwargs"] = {"net_arch": [8, 8]}
        return PPOPlus(self.policy, self.make_env(), **{**defaults, **self.arguments})


def pendulum() -> VecEnv:
    return gym_envs("Pendulum-v1")


CASES = {
    "mlp": Case(pendulum),
    "discrete": Case(lambda: gym_envs("CartPole-v1")),
    "mujoco": Case(lambda: gym_envs("HalfCheetah-v5", env_kwargs={"max_episode_steps": 45})),
    "cnn": Case(
        lambda: VecFrameStack(make_envs(observation_space=IMAGE), 2),
        "CnnPolicy",
        {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}}},
    ),
    "dict": Case(
        lambda: make_envs(observation_space=DICT, action_space=spaces.MultiDiscrete([3, 2])),
        "MultiInputPolicy",
        {"policy_kwargs": {"features_extractor_kwargs": {"cnn_output_dim": 8}, "net_arch": [8]}},
    ),
    "vec_normalize": Case(lambda: VecNormalize(pendulum())),
    "wrappers": Case(wrapped_envs),
    "own_methods": Case(lambda: make_vec_env(lambda: gym.wrappers.TimeLimit(OwnMethods(), 11), n_envs=2, seed=0)),
    "subproc": Case(lambda: VecNormalize(gym_envs("Pendulum-v1", vec_env_cls=SubprocVecEnv))),
    "lunar_lander": Case(lambda: replayed_envs(lunar_lander)),
    "bipedal_walker": Case(lambda: replayed_envs(bipedal_walker)),
    "minigrid": Case(lambda: replayed_envs(minigrid)),
    "replay_in_workers": Case(lambda: replayed_envs(lunar_lander, vec_env_cls=SubprocVecEnv)),
    "chosen": Case(lambda: make_vec_env(bipedal_walker, n_envs=2, seed=0, wrapper_class=resumable_env_for)),
    "gsde": Case(pendulum, arguments={"use_sde": True, "sde_sample_freq": 5}),
    "schedules": Case(
        pendulum,
        arguments={
            "learning_rate": "warmup_cos_3e-3",
            "critic_learning_rate": "lin_1e-2",
            "clip_range": "lin_0.3",
            "clip_range_vf": "cos_0.3",
            "ent_coef": "lin_0.1",
            "vf_coef": "exp_0.5_0.1",
        },
    ),
    "target_kl": Case(pendulum, arguments={"target_kl": 0.005, "learning_rate": 0.01}),
    "amp": Case(pendulum, arguments={"amp": True, "policy_kwargs": {"net_arch": [8], "action_dist": "beta"}}),
    "optimizer": Case(
        pendulum,
        arguments={
            "policy_kwargs": {"net_arch": [8], "optimizer_class": th.optim.Adagrad},
            "normalize_advantage": False,
        },
    ),
    "masks": Case(
        lambda: make_vec_env(
            lambda: MaskedEnv(MASKED_ACTION_SPACES["multi_discrete"]), n_envs=2, seed=0, wrapper_class=ResumableEnv
        ),
        arguments={"action_masking": True},
    ),
    "lstm": Case(
        pendulum,
        "MlpLstmPolicy",
        {"policy_kwargs": {"net_arch": [8], "lstm_hidden_size": 8, "memory_kwargs": {"sequence_length": 8}}},
    ),
    "gtrxl": Case(
        lambda: gym_envs("CartPole-v1"),
        arguments={"policy_kwargs": {"net_arch": [8], "memory": "gtrxl", "memory_kwargs": {"hidden_size": 8}}},
    ),
    "callbacks": Case(pendulum, make_callbacks=eval_callbacks, log_interval=2),
    "compile": Case(
        lambda: make_envs(action_space=ASYMMETRIC),
        arguments={
            "compile": True,
            "critic_learning_rate": 1e-3,
            "policy_kwargs": {"net_arch": [8], "log_std_init": -1},
        },
    ),
}


class KillInMidRollout(BaseCallback):
    """Kills this process in the rollout that follows a checkpoint, when the checkpoint is written."""

    def _on_step(self) -> bool:
        if self.num_timesteps > (INTERRUPTED_AFTER + 0.5) * N_STEPS * self.training_env.num_envs:
            self.model._current_run.wait_for_checkpoints()
            os.kill(os.getpid(), signal.SIGKILL)
        return True


def result_of(model: PPOPlus, learn: Callable[[], Any]) -> dict[str, Any]:
    """Learn, and return all that must be equal: parameters, optimiser, logs, the next random numbers."""
    recorder = record_logs(model)
    learn()
    logs = [*recorder.dumps, dict(model.logger.name_to_value)]
    normalizer = unwrap_vec_normalize(model.env)
    return {
        "state": state_of(model),
        "logs": [without_timings(log) for log in logs],
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "returns": None if normalizer is None else normalizer.returns,
        "n_envs": model.n_envs,
        "observations": model._last_obs,
        "drawn": (random.random(), np.random.random(), th.rand(1).item()),
    }


def without_timings(log: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in log.items() if not name.startswith("time/") or name in NOT_TIMINGS}


def run_whole(name: str, folder: Path) -> None:
    case = CASES[name]
    model = case.make_model()
    total = N_UPDATES * N_STEPS * model.n_envs - 1
    result = result_of(model, lambda: model.learn(total, case.make_callbacks(), case.log_interval))
    th.save(result, folder / f"{name}.whole")


def run_until_killed(name: str, folder: Path) -> None:
    case = CASES[name]
    model = case.make_model()
    callbacks = [TrainingCheckpoint(1, folder / name), *case.make_callbacks(), KillInMidRollout()]
    model.learn(N_UPDATES * N_STEPS * model.n_envs - 1, callbacks, case.log_interval)


def run_resumed(name: str, folder: Path) -> None:
    case = CASES[name]
    model = PPOPlus.resume(folder / name, case.make_env(), device="cpu")
    assert model.num_timesteps == INTERRUPTED_AFTER * N_STEPS * model.n_envs
    result = result_of(model, lambda: model.continue_learning(case.make_callbacks()))
    th.save(result, folder / f"{name}.resumed")


def main(command: str, folder: Path) -> None:
    # PyTorch imports much when the first optimiser is made: here once, rather than in each fork
    CASES["mlp"].make_model()
    for name in CASES:
        if command == "resume":
            assert in_a_fork(lambda name=name: run_resumed(name, folder)) == 0, name
        else:
            assert in_a_fork(lambda name=name: run_whole(name, folder)) == 0, name
            assert in_a_fork(lambda name=name: run_until_killed(name, folder)) == -signal.SIGKILL, name


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
