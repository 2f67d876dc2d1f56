"""What checkpoints cost: HalfCheetah with PPO's defaults and ResumableEnv, with a checkpoint after every second update.

    OMP_NUM_THREADS=1 taskset -c 1 python examples/benchmarks/checkpoints.py --compile --normalize

Updates with and without a checkpoint take turns in one run, so that whatever else the machine does hits both alike. A
cycle is a rollout and an update. "In the callback" is how long training waits for a checkpoint. "In all" is by how much
the cycle that begins with it is longer than one without: it adds what the thread that writes takes from training. That
is given in seconds of the clock and of the processor; on one core they differ by what else the machine does. Figures
are medians; --rounds repeats the run.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint

# The first updates compile, and the first checkpoint imports
N_WARM = 4


class Timed(TrainingCheckpoint):
    """Measures its own work after every second update, and the cycles from one update to the next."""

    def __init__(self, n_steps: int, save_path: str) -> None:
        super().__init__(2 * n_steps, save_path)
        self.seconds: list[float] = []
        self.begun: list[tuple[float, float]] = []

    def on_update_end(self) -> bool:
        started = time.perf_counter()
        self.begun.append((started, time.process_time()))
        goes_on = super().on_update_end()
        self.seconds.append(time.perf_counter() - started)
        return goes_on


class Last(BaseCallback):
    """Ends training after an update, so that the checkpoint of the end, which training waits for, is not measured."""

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.last = num_timesteps

    def _on_step(self) -> bool:
        return True

    def on_update_end(self) -> bool:
        return self.num_timesteps < self.last


def measure(env_id: str, n_envs: int, updates: int, compile: bool, normalize: bool) -> list[float]:
    """Return medians in seconds: a cycle without a checkpoint; a checkpoint in the callback; in all, by both clocks."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        env = make_vec_env(env_id, n_envs=n_envs, seed=0, wrapper_class=ResumableEnv)
        model = PPOPlus("MlpPolicy", VecNormalize(env) if normalize else env, seed=0, device="cpu", compile=compile)
        steps = model.n_steps * n_envs
        checkpoint = Timed(steps, folder)
        model.learn(2 * steps * (updates + N_WARM), [Last(steps * (updates + N_WARM)), checkpoint])
    # A checkpoint follows the updates with odd indices
    in_callback = statistics.median(checkpoint.seconds[N_WARM + 1 : -1 : 2])
    medians = []
    for times in zip(*checkpoint.begun, strict=True):
        cycles = [after - before for before, after in itertools.pairwise(times)]
        without, with_checkpoint = (statistics.median(cycles[begin::2]) for begin in (N_WARM, N_WARM + 1))
        medians.append((without, with_checkpoint - without))
    (cycle, whole), (_, whole_of_processor) = medians
    return [cycle, in_callback, whole, whole_of_processor]


def main(
    env_id: str = "HalfCheetah-v5",
    n_envs: int = 1,
    updates: int = 40,
    rounds: int = 1,
    compile: bool = False,
    normalize: bool = False,
) -> float:
    """Print each round and the median of the rounds, and return the share of the time that training waits."""
    print(f"{env_id}, {n_envs} envs, compile={compile}, VecNormalize={normalize}")
    shares = []
    for _ in range(rounds):
        cycle, callback, whole, whole_of_processor = measure(env_id, n_envs, updates, compile, normalize)
        shares.append([100 * callback / cycle, 100 * whole / cycle, 100 * whole_of_processor / cycle])
        print(
            f"cycle {1000 * cycle:.0f} ms; checkpoint {1000 * callback:.2f} ms in the callback, in all "
            f"{1000 * whole:.1f} ms of the clock, {1000 * whole_of_processor:.1f} ms of the processor"
        )
    callback, whole, whole_of_processor = (statistics.median(column) for column in zip(*shares, strict=True))
    print(
        f"at every update: {callback:.2f}% in the callback, in all {whole:.2f}% of the clock and "
        f"{whole_of_processor:.2f}% of the processor; at every 50,000 steps: "
        f"{callback * 2048 * n_envs / 50_000:.3f}% in the callback"
    )
    return callback / 100


if __name__ == "__main__":
    th.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--n-envs", type=int, default=1)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--normalize", action="store_true", help="with VecNormalize")
    arguments = parser.parse_args()
    main(
        arguments.env,
        arguments.n_envs,
        arguments.updates,
        arguments.rounds,
        arguments.compile,
        arguments.normalize,
    )
