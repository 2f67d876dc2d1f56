"""Measure how long one action takes: an exported policy against ``model.predict``, PPOPlus's and SB3's.

    python examples/benchmarks/export_latency.py [--calls 2000] [--rounds 5]

One observation of 8 numbers at a time, on one core; a 64x64 MLP and an LSTM of 64 units. Rounds of all are mixed, and
the median of all calls counts. SB3's own policies are PPO's and, with the LSTM, sb3-contrib's RecurrentPPO's.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import onnxruntime
import torch as th
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_plus import PPOPlus, export_policy
from sb3_ppo_plus.export import load_exported


class Still(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(8, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(8, np.float32), 0.0, False, False, {}


State = tuple[np.ndarray, ...] | None


class Predicts(Protocol):
    def predict(
        self, observation: np.ndarray, state: State, episode_start: np.ndarray, deterministic: bool
    ) -> tuple[np.ndarray, State]: ...


def by_predict(model: Predicts) -> Callable[[np.ndarray], np.ndarray]:
    state: State = None
    start = np.zeros(1, bool)

    def act(observation: np.ndarray) -> np.ndarray:
        nonlocal state
        action, state = model.predict(observation, state, start, True)
        return action

    return act


def by_session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Call onnxruntime alone, as examples/exported_policy.py does."""
    contract = json.loads(Path(f"{path}.json").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {
        entry["name"]: np.zeros([1 if size == "batch" else size for size in entry["shape"]], entry["dtype"])
        for entry in contract["inputs"]
    }
    names = [entry["name"] for entry in contract["outputs"]]
    states = [name.removeprefix("next_") for name in names[1:]]

    def act(observation: np.ndarray) -> np.ndarray:
        inputs["observation"] = observation
        action, *after = session.run(names, inputs)
        inputs.update(zip(states, after, strict=True))
        return action

    return act


def median_microseconds(
    ways: dict[str, Callable[[np.ndarray], np.ndarray]], calls: int, rounds: int
) -> dict[str, float]:
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((calls, 1, 8), np.float32)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for act in ways.values():
        for observation in observations[:100]:
            act(observation)
    for _ in range(rounds):
        for name, act in ways.items():
            for observation in observations:
                begin = time.perf_counter()
                act(observation)
                times[name].append(time.perf_counter() - begin)
    return {name: 1e6 * statistics.median(measured) for name, measured in times.items()}


def measure(calls: int = 2000, rounds: int = 5) -> dict[str, dict[str, float]]:
    th.set_num_threads(1)
    lstm = {"memory": "lstm", "memory_kwargs": {"hidden_size": 64}}
    sb3s: dict[str, BaseAlgorithm] = {
        "MLP 64x64": PPO("MlpPolicy", Still(), device="cpu"),
        "LSTM 64": RecurrentPPO("MlpLstmPolicy", Still(), device="cpu", policy_kwargs={"lstm_hidden_size": 64}),
    }
    found = {}
    for name, policy_kwargs in (("MLP 64x64", {}), ("LSTM 64", lstm)):
        model = PPOPlus("MlpPolicy", Still(), device="cpu", policy_kwargs=policy_kwargs)
        with tempfile.TemporaryDirectory() as folder:
            path = export_policy(model, Path(folder) / "policy.onnx")
            session, policy = by_session(path), load_exported(path)
        ways = {
            "onnxruntime": session,
            "load_exported(...).predict": by_predict(policy),
            "PPOPlus.predict": by_predict(model),
            "SB3's predict": by_predict(sb3s[name]),
        }
        found[name] = median_microseconds(ways, calls, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls in a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| policy | way | microseconds | PPOPlus.predict is so many times slower |\n|---|---|---|---|")
    for name, times in measure(args.calls, args.rounds).items():
        for way, microseconds in times.items():
            print(f"| {name} | {way} | {microseconds:.1f} | {times['PPOPlus.predict'] / microseconds:.1f} |")


if __name__ == "__main__":
    main()
