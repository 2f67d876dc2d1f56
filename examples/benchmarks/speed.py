"""Speed of PPOPlus beside the PPOs of SB3, sb3-contrib, and SBX and rsl_rl if installed: same environments, in turns.

    python examples/benchmarks/speed.py --output logs/speed

Every contender of a case is built, warmed up (compile time is reported apart) and then measured in turns, so that
whatever else the machine does hits all alike. Of each figure the median over the rounds is printed, and its ratio to
that of SB3 (or sb3-contrib). All share --cores, one by default: networks this small gain nothing by more, and JAX would
take them anyhow. --cases picks some; --quick shortens the rounds. Writes speed.json and speed.png to --output.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.envs import TensorVecEnv, as_vec_env
from sb3_ppo_plus.fast.replays import CHECKED_REPLAYS, REPLAY_AFTER

sys.path.append(str(Path(__file__).resolve().parent.parent))
from torch_envs import TorchPendulum


class RandomEnv(gym.Env):
    """Costs next to nothing: one fixed observation, episodes of 200 steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_space.seed(0)
        self.observation = self.observation_space.sample()
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.n_steps = 0
        return self.observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ANN401  # whatever the space
        """Count the step."""
        self.n_steps += 1
        return self.observation, 1.0, False, self.n_steps >= 200, {}


class EdgeMask(gym.Wrapper):
    """CartPole in which a cart that nears an edge may not be pushed towards it."""

    def action_masks(self) -> np.ndarray:
        """Mark the valid actions."""
        x = self.unwrapped.state[0]
        return np.array([x > -1.5, x < 1.5])


PIXELS = spaces.Box(0, 255, (4, 84, 84), np.uint8)
DICT = spaces.Dict({"position": spaces.Box(-1, 1, (8,)), "target": spaces.Box(-1, 1, (3,)), "kind": spaces.Discrete(4)})


@dataclass
class Case:
    """One row of the table."""

    env: str | Callable[[], gym.Env]
    n_envs: int
    policy: str = "MlpPolicy"
    normalize: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    has_vector_code: bool = False
    tensor_env: type[TensorVecEnv] | None = None

    def make_env(self) -> VecEnv:
        """Build the vectorised environment."""
        if self.tensor_env is not None:
            return self.tensor_env(self.n_envs)
        env = make_vec_env(self.env, n_envs=self.n_envs, seed=0)
        return VecNormalize(env) if self.normalize else env

    def make_vector_env(self) -> VecEnv:
        """Build the environment with vector code of its own (gymnasium.vector)."""
        return as_vec_env(gym.make_vec(str(self.env), self.n_envs, "vector_entry_point"))


ZOO_CARTPOLE = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gae_lambda": 0.8, "gamma": 0.98}
CASES: dict[str, Case] = {
    "CartPole, 8 envs": Case("CartPole-v1", 8),
    "Pendulum, 4 envs": Case("Pendulum-v1", 4),
    "HalfCheetah, 1 env": Case("HalfCheetah-v5", 1),
    "HalfCheetah, 8 envs": Case("HalfCheetah-v5", 8, kwargs={"n_steps": 512}),
    "CartPole, zoo": Case("CartPole-v1", 8, kwargs=ZOO_CARTPOLE),
    "pixels 84x84x4": Case(
        lambda: RandomEnv(PIXELS, spaces.Discrete(4)), 8, "CnnPolicy", kwargs={"n_steps": 32, "n_epochs": 4}
    ),
    "pixels 84x84x4, 512 steps": Case(
        lambda: RandomEnv(PIXELS, spaces.Discrete(4)), 8, "CnnPolicy", kwargs={"n_steps": 512, "n_epochs": 1}
    ),
    "Dict": Case(lambda: RandomEnv(DICT, spaces.Discrete(4)), 8, "MultiInputPolicy", kwargs={"n_steps": 256}),
    "256x256 net, batch 4096": Case(
        "HalfCheetah-v5",
        8,
        kwargs={"n_steps": 512, "batch_size": 4096, "policy_kwargs": {"net_arch": [256, 256]}},
    ),
    "CartPole, 1 env": Case("CartPole-v1", 1),
    "CartPole, 64 envs": Case("CartPole-v1", 64, kwargs={"n_steps": 128}),
    "CartPole, 256 envs": Case("CartPole-v1", 256, kwargs={"n_steps": 32}),
    "CartPole, 64 envs, gymnasium.vector": Case("CartPole-v1", 64, kwargs={"n_steps": 128}, has_vector_code=True),
    "CartPole, 1024 envs, gymnasium.vector": Case(
        "CartPole-v1", 1024, kwargs={"n_steps": 32, "batch_size": 1024, "n_epochs": 4}, has_vector_code=True
    ),
    "Pendulum on tensors, 1024 envs": Case(
        "", 1024, kwargs={"n_steps": 24, "batch_size": 6144, "n_epochs": 5}, tensor_env=TorchPendulum
    ),
    "Pendulum on tensors, 4096 envs": Case(
        "", 4096, kwargs={"n_steps": 24, "batch_size": 24576, "n_epochs": 5}, tensor_env=TorchPendulum
    ),
    "CartPole with masks, 8 envs": Case(lambda: EdgeMask(gym.make("CartPole-v1")), 8, masked=True),
    "CartPole with LSTM, 8 envs": Case("CartPole-v1", 8, "MlpLstmPolicy", kwargs={"n_steps": 128, "batch_size": 128}),
    **{
        f"CartPole with {kind.upper()} of {size}, 8 envs": Case(
            "CartPole-v1",
            8,
            kwargs={
                "n_steps": 128,
                "batch_size": 256,
                "policy_kwargs": {"memory": kind, "memory_kwargs": {"hidden_size": size}},
            },
        )
        for kind in ("lstm", "gru")
        for size in (64, 256)
    },
    "HalfCheetah, 1 env, VecNormalize": Case("HalfCheetah-v5", 1, normalize=True),
}


def contenders(case: Case) -> dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]]:
    """Name the algorithms that are installed; the others are compared with the first."""
    if case.masked:
        return {
            "MaskablePPO": (MaskablePPO, {}),
            "PPOPlus": (PPOPlus, {}),
            "PPOPlus, no masks": (PPOPlus, {"action_masking": False}),
            "PPOPlus compiled": (PPOPlus, {"compile": True}),
            "PPOPlus compiled, no masks": (PPOPlus, {"compile": True, "action_masking": False}),
        }
    if case.policy == "MlpLstmPolicy":
        short = {"memory_kwargs": {"sequence_length": 16}}
        return {
            "RecurrentPPO": (RecurrentPPO, {}),
            "PPOPlus": (PPOPlus, {}),
            "PPOPlus compiled": (PPOPlus, {"compile": True}),
            "PPOPlus, sequences of 16": (PPOPlus, {"policy_kwargs": short}),
            "PPOPlus compiled, sequences of 16": (PPOPlus, {"compile": True, "policy_kwargs": short}),
        }
    if "memory" in case.kwargs.get("policy_kwargs", {}):
        return {"PPOPlus": (PPOPlus, {}), "PPOPlus compiled": (PPOPlus, {"compile": True})}
    found: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
        "SB3": (PPO, {}),
        "PPOPlus": (PPOPlus, {}),
        "PPOPlus compiled": (PPOPlus, {"compile": True}),
    }
    if case.has_vector_code:
        vector = {"make_env": case.make_vector_env}
        found["PPOPlus, gymnasium.vector"] = PPOPlus, vector
        found["PPOPlus compiled, gymnasium.vector"] = PPOPlus, {"compile": True, **vector}
        return found
    if case.tensor_env is not None:
        return found
    try:
        from sbx import PPO as SBX_PPO
    except ImportError:
        return found
    if case.policy == "MultiInputPolicy":
        # SBX has none
        return found
    return {**found, "SBX": (SBX_PPO, {})}


class Contender:
    """One algorithm on one case, and its timings."""

    def __init__(self, case: Case, algorithm: type[BaseAlgorithm], kwargs: dict[str, Any]) -> None:
        started = time.perf_counter()
        arguments = {**case.kwargs, **kwargs}
        env = arguments.pop("make_env", case.make_env)()
        self.model: Any = algorithm(case.policy, env, seed=0, device="cpu", **arguments)
        rollout = self.model.n_steps * case.n_envs
        self.minibatches = self.model.n_epochs * -(-rollout // self.model.batch_size)
        # PPOPlus compares its first replays of so many minibatches and steps with eager results
        n_calls = REPLAY_AFTER + CHECKED_REPLAYS + 1 if isinstance(self.model, PPOPlus) else 0
        warm_up = max(2, *(-(-n_calls // per_rollout) for per_rollout in (self.minibatches, self.model.n_steps)))
        self.model.learn(warm_up * rollout)
        self.warm_up_seconds = time.perf_counter() - started
        _, self.callback = self.model._setup_learn(10**9, None, reset_num_timesteps=False)
        self.callback.on_training_start({}, {})
        self.rollout: list[float] = []
        self.update: list[float] = []

    def measure(self) -> None:
        """Collect one rollout and train on it."""
        model = self.model
        started = time.perf_counter()
        model.collect_rollouts(model.env, self.callback, model.rollout_buffer, model.n_steps)
        collected = time.perf_counter()
        model.train()
        self.rollout.append((collected - started) / model.n_steps)
        self.update.append((time.perf_counter() - collected) / self.minibatches)

    def figures(self) -> dict[str, float]:
        """Medians, in microseconds and steps per second."""
        rollout, update = statistics.median(self.rollout), statistics.median(self.update)
        seconds = rollout * self.model.n_steps + update * self.minibatches
        execution = getattr(self.model, "_execution", None)
        return {
            "rollout_us_per_step": rollout * 1e6,
            "update_us_per_minibatch": update * 1e6,
            "steps_per_second": self.model.n_steps * self.model.n_envs / seconds,
            "warm_up_seconds": self.warm_up_seconds,
            "compile_seconds": 0.0 if execution is None else execution.reporter.seconds,
        }


def env_only(case: Case, n_steps: int = 512) -> float:
    """Seconds of one VecEnv.step with random actions: the bound of a rollout step."""
    env = case.make_env()
    env.reset()
    actions = [np.array([env.action_space.sample() for _ in range(case.n_envs)]) for _ in range(n_steps)]
    started = time.perf_counter()
    for action in actions:
        env.step(action)
    return (time.perf_counter() - started) / n_steps


def use_cores(n_cores: int) -> None:
    """Keep this process, its threads and those that it starts to so many cores."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-n_cores:])
    th.set_num_threads(n_cores)


def run_case(name: str, rounds: int) -> dict[str, Any]:
    """Measure all contenders of a case in turns."""
    case = CASES[name]
    running: dict[str, Any] = {label: Contender(case, *given) for label, given in contenders(case).items()}
    if case.tensor_env is not None and importlib.util.find_spec("rsl_rl"):
        from rsl_rl_contender import RslRlContender

        running["rsl_rl"] = RslRlContender(case.tensor_env(case.n_envs), running["SB3"].model)
    bounds = []
    for _ in range(rounds):
        bounds.append(env_only(case))
        for contender in running.values():
            contender.measure()
    return {
        "case": name,
        "env_only_us_per_step": statistics.median(bounds) * 1e6,
        "contenders": {label: contender.figures() for label, contender in running.items()},
    }


def peak_memory(name: str, label: str) -> float:
    """Peak resident memory in MiB of a process that trains one contender alone."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_train_alone, (name, label, th.get_num_threads()))


def _train_alone(name: str, label: str, n_threads: int) -> float:
    th.set_num_threads(n_threads)
    algorithm, kwargs = contenders(CASES[name])[label]
    Contender(CASES[name], algorithm, kwargs).measure()
    # Not getrusage's maximum, which a child process inherits
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown."""
    lines = [
        "| case | | rollout us/step | update us/minibatch | steps/s | rollout x | update x | end to end x | compile s "
        "| peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        base = next(iter(result["contenders"].values()))
        for label, figures in result["contenders"].items():
            lines.append(
                f"| {result['case']} | {label} | {figures['rollout_us_per_step']:.0f} "
                f"| {figures['update_us_per_minibatch']:.0f} | {figures['steps_per_second']:.0f} "
                f"| {base['rollout_us_per_step'] / figures['rollout_us_per_step']:.2f} "
                f"| {base['update_us_per_minibatch'] / figures['update_us_per_minibatch']:.2f} "
                f"| {figures['steps_per_second'] / base['steps_per_second']:.2f} "
                f"| {figures['compile_seconds'] or '':.3} | {figures.get('peak_memory_mib', ''):.5} |"
            )
        lines.append(f"| {result['case']} | env only | {result['env_only_us_per_step']:.0f} | | | | | | | |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw end-to-end speed relative to each case's first contender."""
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(label for result in results for label in result["contenders"]))
    colors = dict(zip(labels, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(figsize=(10, 2 + 0.6 * len(results)), layout="constrained")
    for row, result in enumerate(results):
        speeds = {label: figures["steps_per_second"] for label, figures in result["contenders"].items()}
        height = 0.8 / len(speeds)
        for index, (label, speed) in enumerate(speeds.items()):
            ratio = speed / next(iter(speeds.values()))
            axes.barh(row - 0.4 + (index + 0.5) * height, ratio, height, color=colors[label], label=label)
    axes.set_yticks(range(len(results)), [result["case"] for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("steps per second, relative to PPO of SB3 or sb3-contrib")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the arguments, measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--cores", type=int, default=1, help="cores to run on, for PyTorch and JAX alike")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each contender in a process of its own")
    parser.add_argument("--output", type=Path, default=Path("logs/speed"))
    args = parser.parse_args()
    use_cores(args.cores)
    results = []
    for name in args.cases:
        result = run_case(name, 3 if args.quick else args.rounds)
        if args.memory:
            for label in contenders(CASES[name]):
                result["contenders"][label]["peak_memory_mib"] = peak_memory(name, label)
        results.append(result)
        print(table([result]), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.json").write_text(json.dumps(results, indent=2))
    plot(results, args.output / "speed.png")
    print(table(results))


if __name__ == "__main__":
    main()
