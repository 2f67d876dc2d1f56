"""Runs that random SIGKILLs end again and again, and that are resumed each time, until they have come to their end.

    OMP_NUM_THREADS=1 PYTHONPATH=examples/benchmarks:tests python tests/resuming/kill_chain.py --kills 500

The kills are shared among the configurations. For each, one process learns without interruption. Then a chain of
processes goes through the same run: each is killed and the next one resumes, and the last one ends it. Its parameters,
optimiser, observations, episodes, statistics and next random numbers must have the bits of the uninterrupted one.

This process sends the kills. Of each three, two are aimed: they come at a random moment after a write has begun. The
others come at a random moment of training. Processes count what they do in shared memory, so that it is known where a
kill has hit: "inside a write" is from the creation of the hidden directory until old checkpoints are removed.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from forks import start_in_a_fork
from resume_cases import CASES, Case
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import unwrap_vec_normalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.resuming.checkpoint_writer import CheckpointWriter

CONFIGURATIONS = ("mlp", "discrete", "vec_normalize", "lstm", "callbacks")
# A life is killed after at most so many updates, so that no chain ends before its last kill
LONGEST_LIFE = 2
POLL = 0.0001
# Limit of a run in seconds
HOUR = 3600.0


class Counters:
    """Numbers that a process and its forks share: writes begun, writes done, updates done, in this life."""

    WRITES_BEGUN, WRITES_DONE, UPDATES = range(3)

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)

    def __getitem__(self, index: int) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * index)[0])

    def add(self, index: int) -> None:
        struct.pack_into("q", self._memory, 8 * index, self[index] + 1)

    def reset(self) -> None:
        self._memory[:] = bytes(24)


class CountsUpdates(BaseCallback):
    def __init__(self, counters: Counters) -> None:
        super().__init__()
        self.counters = counters

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        self.counters.add(Counters.UPDATES)
        return True


@dataclass
class Chain:
    """What has happened to one configuration."""

    n_kills: int = 0
    n_inside: int = 0
    n_left_unfinished: int = 0
    n_before_first: int = 0
    has_same_bits: bool = False


def result_of(model: PPOPlus) -> dict[str, Any]:
    """Return all that must be equal at the end."""
    normalizer = unwrap_vec_normalize(model.env)
    return {
        "state": state_of(model),
        "observations": model._last_obs,
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "statistics": None if normalizer is None else [vars(normalizer.obs_rms), normalizer.returns],
        "num_timesteps": model.num_timesteps,
        "drawn": (random.random(), np.random.random(), th.rand(1).item()),
    }


def count_writes(counters: Counters) -> None:
    """Count the writes of this process."""
    write = CheckpointWriter._write

    def counted(writer: CheckpointWriter, snapshot: Any) -> Path:
        files = snapshot.files()
        counters.add(Counters.WRITES_BEGUN)
        directory = write(writer, type(snapshot)(snapshot.num_timesteps, snapshot.mean_return, lambda: files))
        counters.add(Counters.WRITES_DONE)
        return directory

    CheckpointWriter._write = counted


def live(case: Case, n_updates: int, folder: Path, counters: Counters) -> None:
    """Begin the run or resume it, and go on to its end: what a killed process does."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
    count_writes(counters)
    callbacks = [
        TrainingCheckpoint(1, folder, keep_last=2, keep_best=1),
        *case.make_callbacks(),
        CountsUpdates(counters),
    ]
    if latest_checkpoint(folder):
        model = PPOPlus.resume(folder, case.make_env(), device="cpu")
        model.continue_learning(callbacks)
    else:
        model = learn(case, n_updates, callbacks)
    th.save(result_of(model), folder / "result")


def learn(case: Case, n_updates: int, callbacks: list[BaseCallback]) -> PPOPlus:
    model = case.make_model()
    return model.learn(n_updates * model.n_steps * model.n_envs, callbacks, case.log_interval)


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_until(condition: Callable[[], bool], child: int) -> None:
    while not condition() and not has_ended(child):
        time.sleep(POLL)


def kill_at_random(child: int, counters: Counters, draw: random.Random, is_aimed: bool, durations: list[float]) -> None:
    """Wait for a random moment of a life, and kill it.

    :param durations: seconds from the beginning of a write to its end, of earlier lives; gets one more
    """
    counted = Counters.WRITES_BEGUN if is_aimed else Counters.UPDATES
    target = draw.randint(1, LONGEST_LIFE) if is_aimed else draw.randrange(LONGEST_LIFE)
    wait_until(lambda: counters[counted] >= target, child)
    started = time.perf_counter()
    longest = 1.2 * statistics.median(durations) if is_aimed and durations else 0.02
    until = started + draw.uniform(0.0, longest)
    while time.perf_counter() < until:
        time.sleep(POLL)
    if is_aimed and not durations:
        wait_until(lambda: counters[Counters.WRITES_DONE] >= target, child)
        durations.append(time.perf_counter() - started)
    os.kill(child, signal.SIGKILL)


def run_chain(name: str, n_kills: int, folder: Path, seed: int) -> Chain:
    """Go through one run with kills, and compare its end with that of the uninterrupted run."""
    case, chain, counters, draw = CASES[name], Chain(), Counters(), random.Random(seed)
    n_updates = LONGEST_LIFE * n_kills + LONGEST_LIFE
    whole, killed = folder / f"{name}.whole", folder / name
    child = start_in_a_fork(lambda: th.save(result_of(learn(case, n_updates, case.make_callbacks())), whole), HOUR)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"{name}: the uninterrupted run has failed"
    durations: list[float] = []
    for number in range(n_kills):
        counters.reset()
        child = start_in_a_fork(lambda: live(case, n_updates, killed, counters), HOUR)
        kill_at_random(child, counters, draw, number % 3 < 2, durations)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert exit_code == -signal.SIGKILL, f"{name}: life {number} has ended with {exit_code}"
        chain.n_kills += 1
        is_inside = counters[Counters.WRITES_BEGUN] > counters[Counters.WRITES_DONE]
        chain.n_inside += is_inside
        chain.n_left_unfinished += is_inside and any(killed.glob(".checkpoint_*"))
        chain.n_before_first += counters[Counters.WRITES_BEGUN] == 0
    child = start_in_a_fork(lambda: live(case, n_updates, killed, counters), HOUR)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"{name}: the last life has failed"
    results = [th.load(path, weights_only=False) for path in (whole, killed / "result")]
    try:
        assert_same_bits(results[1], results[0])
        chain.has_same_bits = True
    except AssertionError as error:
        print(f"{name}: {error}")
    return chain


def main(n_kills: int, seed: int = 0, names: tuple[str, ...] = CONFIGURATIONS) -> list[Chain]:
    """Print a line for each configuration and one for all."""
    started = time.perf_counter()
    # PyTorch imports much when the first optimiser is made: here once, rather than in each fork
    CASES["mlp"].make_model()
    chains = []
    for index, name in enumerate(names):
        folder = Path(tempfile.mkdtemp(prefix="kill_chain_"))
        share = n_kills // len(names) + (index < n_kills % len(names))
        chain = run_chain(name, share, folder, seed + index)
        chains.append(chain)
        print(f"{name}: {describe([chain])}", flush=True)
        if chain.has_same_bits:
            shutil.rmtree(folder)
        else:
            print(f"{name}: files are in {folder}")
    print(f"all: {describe(chains)}, seed {seed}, {time.perf_counter() - started:.0f} s")
    return chains


def describe(chains: list[Chain]) -> str:
    kills, inside, unfinished, early = (
        sum(getattr(chain, name) for chain in chains)
        for name in ("n_kills", "n_inside", "n_left_unfinished", "n_before_first")
    )
    n_equal = sum(chain.has_same_bits for chain in chains)
    return (
        f"{kills} kills, {inside} inside a write ({unfinished} of them left a hidden directory), {early} before the "
        f"first write of a life; {n_equal} of {len(chains)} ends have the bits of the uninterrupted run"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ends = main(arguments.kills, arguments.seed)
    sys.exit(0 if all(chain.has_same_bits for chain in ends) else 1)
