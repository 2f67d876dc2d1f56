"""Speed of several processes beside one: weak and strong scaling, one thread each, on one machine.

    python examples/benchmarks/scaling.py --output logs/scaling

Weak: each process has the case's environments, and the minibatch grows with the number of processes. Strong: all
processes together have the case's environments and its minibatch. Every group of processes is built and warmed up, then
measured for --seconds, from the fourth update of a learn() on. Groups take turns over --rounds, so that whatever else
the machine does hits all alike. Of each figure the median is printed. "waiting" is the share of time that the first
process spends in collectives, also waiting for slower processes; "bytes" is what it gives into them in an update. A
group of one process trains without distributed, and for the overhead once more with it. Processes with
distributed=False train beside one another without a message: what the machine could give at most. Writes scaling.json
and scaling.png to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
import torch.distributed as dist
from gymnasium import spaces
from speed import PIXELS, RandomEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.distributed.process_group import ProcessRanks


class Simulator(RandomEnv):
    """A :class:`RandomEnv` whose step takes 2 ms, in which the process computes nothing."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ANN401  # whatever the space
        """Let the time of a simulator pass."""
        time.sleep(0.002)
        return super().step(action)


@dataclass
class Case:
    """A training task.

    :param make_env: makes one environment, or is its id
    :param n_envs: number of environments
    :param kwargs: arguments of PPOPlus
    :param policy: the policy's name
    :param normalize: whether to normalise observations and rewards
    """

    make_env: Any
    n_envs: int
    kwargs: dict[str, Any]
    policy: str = "MlpPolicy"
    normalize: bool = False


def simulator() -> gym.Env[Any, Any]:
    """Make an environment whose step takes 2 ms."""
    return Simulator(spaces.Box(-1, 1, (17,)), spaces.Box(-1, 1, (6,)))


def pixels() -> gym.Env[Any, Any]:
    """Make an environment with four frames of 84 x 84 pixels."""
    return RandomEnv(PIXELS, spaces.Discrete(6))


def vectors() -> gym.Env[Any, Any]:
    """Make an environment with 60 numbers."""
    return RandomEnv(spaces.Box(-1, 1, (60,)), spaces.Box(-1, 1, (8,)))


# In the first two updates of each learn(), steps are traced or compiled
UPDATES_BEFORE = 3
SMALL = {"n_steps": 256, "batch_size": 256, "n_epochs": 10}
CASES = {
    "environment of 2 ms, 4 environments": Case(simulator, 4, {"n_steps": 64, "batch_size": 64, "n_epochs": 4}),
    # RL Zoo's numbers for Atari
    "pixels, 8 environments": Case(pixels, 8, {"n_steps": 128, "batch_size": 256, "n_epochs": 4}, policy="CnnPolicy"),
    "256x256 net, batch 4096": Case(
        vectors, 16, {"n_steps": 256, "batch_size": 4096, "n_epochs": 10, "policy_kwargs": {"net_arch": [256, 256]}}
    ),
    "HalfCheetah, 8 environments": Case("HalfCheetah-v5", 8, SMALL, normalize=True),
    "HalfCheetah, 8 environments, compiled": Case("HalfCheetah-v5", 8, SMALL | {"compile": True}, normalize=True),
    "CartPole, 8 environments": Case("CartPole-v1", 8, SMALL),
    "CartPole, 8 environments, compiled": Case("CartPole-v1", 8, SMALL | {"compile": True}),
}


@dataclass
class Collectives:
    """What the collectives of this process have taken.

    :param seconds: the time, with waiting for others
    :param n_bytes: what was given into each
    """

    seconds: float = 0.0
    n_bytes: list[int] = field(default_factory=list)
    _together: Any = field(default=ProcessRanks._together, repr=False)

    def watch(self) -> None:
        """Count from now on."""

        def counting(ranks: ProcessRanks, collective: Callable[..., object], *arguments: Any, **keywords: Any) -> None:
            started = time.perf_counter()
            self._together(ranks, collective, *arguments, **keywords)
            self.seconds += time.perf_counter() - started
            self.n_bytes.append(arguments[-1].numel() * arguments[-1].element_size())

        ProcessRanks._together = counting  # type: ignore[method-assign, assignment]  # to be timed


class Watch(BaseCallback):
    """Notes when the updates begin that count.

    :param collectives: counts from then on
    """

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.started, self._collectives, self._n_updates = 0.0, collectives, 0

    def _on_rollout_start(self) -> None:
        if self._n_updates == UPDATES_BEFORE:
            self._collectives.watch()
            self.started = time.perf_counter()
        self._n_updates += 1

    def _on_step(self) -> bool:
        return True


def make_model(case: Case, size: int, scaling: str, distributed: bool | str) -> PPOPlus:
    """Make a model of one of ``size`` processes."""
    n_envs = case.n_envs if scaling == "weak" else case.n_envs // size
    batch_size = case.kwargs["batch_size"] * (size if scaling == "weak" and distributed else 1)
    env = make_vec_env(case.make_env, n_envs)
    given = {**case.kwargs, "batch_size": batch_size, "device": "cpu", "seed": 0, "distributed": distributed}
    return PPOPlus(case.policy, VecNormalize(env) if case.normalize else env, **given)


def measure(
    name: str, size: int, rank: int, scaling: str, distributed: bool | str, seconds: float, folder: str
) -> None:
    """Train as one process of a group; the first one writes its figures."""
    th.set_num_threads(1)
    if distributed:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    collectives = Collectives()
    model = make_model(CASES[name], size, scaling, distributed)
    n_alike = 1 if distributed else size
    update = model.n_steps * model.n_envs * size // n_alike
    started = time.perf_counter()
    model.learn(UPDATES_BEFORE * update)
    n_updates = max(2, round(seconds / (time.perf_counter() - started) * UPDATES_BEFORE))
    if distributed:
        n_updates = int(model._parts.ranks.gather(th.tensor(n_updates)).max())
    wait_for_all(size, rank, Path(folder))
    watch = Watch(collectives)
    model.learn((UPDATES_BEFORE + n_updates) * update, watch, reset_num_timesteps=False)
    taken = time.perf_counter() - watch.started
    if rank == 0:
        figures = {
            "steps_per_second": n_alike * n_updates * update / taken,
            "waiting": collectives.seconds / taken,
            "seconds_per_update": taken / n_updates,
            "messages_per_update": len(collectives.n_bytes) / n_updates,
            "minibatches_per_update": model.n_epochs * update / model.batch_size,
            "bytes_of_a_minibatch": max(collectives.n_bytes, default=0),
            "bytes_per_update": sum(collectives.n_bytes) / n_updates,
        }
        Path(folder, "figures.json").write_text(json.dumps(figures))
    if distributed:
        dist.destroy_process_group()


def wait_for_all(size: int, rank: int, folder: Path) -> None:
    """Wait until all processes of a group are here, also of one that sends no messages."""
    (folder / f"{rank}.here").touch()
    while len(list(folder.glob("*.here"))) < size:
        time.sleep(0.001)


def run_group(name: str, size: int, scaling: str, distributed: bool | str, seconds: float) -> dict[str, float]:
    """Measure a group of processes; return the figures of the first."""
    return figures_of(size, lambda rank, folder: (name, size, rank, scaling, distributed, seconds, folder), measure)


def figures_of(
    size: int, arguments: Callable[[int, str], tuple[Any, ...]], measure: Callable[..., None]
) -> dict[str, float]:
    """Run a function in new processes; return what the first one has written into figures.json of their folder."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        processes = [context.Process(target=measure, args=arguments(rank, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        figures: dict[str, float] = json.loads(Path(folder, "figures.json").read_text())
    return figures


def groups_of(sizes: list[int], scalings: list[str]) -> list[tuple[int, str, bool | str]]:
    """List the groups to compare: number of processes, scaling, PPOPlus's argument ``distributed``."""
    groups: list[tuple[int, str, bool | str]] = [(1, "weak", False), (1, "weak", True)]
    groups += [(size, "weak", False) for size in sizes if size > 1]
    return groups + [(size, scaling, True) for scaling in scalings for size in sizes if size > 1]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up of each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.5 * len(results) + 1))
    rows = [row for row in results if row["processes"] > 1 and row["distributed"]]
    labels = [f"{row['case']}, {row['scaling']}, {row['processes']}" for row in rows]
    axes.barh(labels, [row["speedup"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("steps per second, in those of one process")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--scalings", nargs="+", choices=("weak", "strong"), default=["weak", "strong"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each group is measured")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = []
    for name in arguments.cases:
        groups = groups_of(arguments.sizes, arguments.scalings)
        figures: dict[tuple[int, str, bool | str], list[dict[str, float]]] = {group: [] for group in groups}
        for _ in range(arguments.rounds):
            for group in groups:
                figures[group].append(run_group(name, *group, arguments.seconds))
        alone = figures[groups[0]]
        for group, rounds in figures.items():
            size, scaling, distributed = group
            ratios = [
                one["steps_per_second"] / base["steps_per_second"] for one, base in zip(rounds, alone, strict=True)
            ]
            row = {"case": name, "processes": size, "scaling": scaling, "distributed": distributed}
            row |= {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            row |= {"speedup": statistics.median(ratios), "speedups": ratios}
            results.append(row)
            print(
                f"{name:40} {size} {scaling:6} distributed={distributed!s:5} {row['steps_per_second']:9.0f} steps/s "
                f"{row['speedup']:.2f}x (of {', '.join(f'{ratio:.2f}' for ratio in ratios)}), waiting "
                f"{100 * row['waiting']:.0f}%, {row['bytes_per_update'] / 1e6:.2f} MB an update",
                flush=True,
            )
        (arguments.output / "scaling.json").write_text(json.dumps(results, indent=1))
    plot(results, arguments.output / "scaling.png")


if __name__ == "__main__":
    main()
