"""Kill a worker of Ray Train at random places, and compare the ends with that of a run that was never killed.

``python tests/distributed/ray_kills.py --kills 10`` prints a table. A thread kills one of two workers by SIGKILL, a
random while after its training has begun: while it acts, in a collective, while a checkpoint is written or reported.
Every other run goes on from the folder of checkpoints, the rest from the copy that Ray keeps.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import ray
import ray_runs
import torch as th

from sb3_ppo_plus import PPOPlus


def bits_that_differ(one: object, other: object) -> int:
    """Count the bits that differ in two nested containers of the same form."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return sum(bits_that_differ(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return sum(bits_that_differ(*pair) for pair in zip(one, other, strict=True))
    if not isinstance(one, th.Tensor):
        return int(one != other)
    first, second = (tensor.contiguous().view(-1).view(th.uint8).numpy() for tensor in (one, other))
    return int(sum(bin(byte).count("1") for byte in first ^ second))


def main(n_kills: int, n_updates: int, seed: int) -> int:
    """Print a line for each run.

    :return: in how many the end differs
    """
    folder = Path(tempfile.mkdtemp(prefix="ray_kills_"))
    started = time.monotonic()
    settings = {"distributed": True, "n_updates": n_updates}
    expected = ray_runs.never_killed(**settings)
    ray_runs.start_ray()
    try:
        # It says how long training takes: Ray takes a report in two seconds
        ray_runs.run(folder / "whole", folder / "storage", from_ray=False, **settings)
        seconds = ray_runs.end_of(folder / "whole")["seconds"]
        print(f"never killed: {n_updates} updates in {seconds:.1f} s")
        print("| run | rank killed | after s | at timesteps | went on from | at timesteps | bits that differ |")
        print("|---|---|---|---|---|---|---|")
        n_different = n_killed = 0
        for number in range(n_kills):
            name, from_ray = f"killed_{number}", number % 2 == 1
            kill = ray_runs.random_kill(seed + number, seconds)
            result = ray_runs.run(
                folder / name, folder / "storage", max_failures=3, from_ray=from_ray, **kill, **settings
            )
            end, note = ray_runs.end_of(folder / name), folder / name / "killed"
            n_bits = sum(bits_that_differ(end[key], expected[key]) for key in ("parameters", "statistics"))
            # The model that Ray has at the end
            parameters = PPOPlus.load(Path(result.checkpoint.path, "model.zip"), device="cpu").get_parameters()
            n_bits += bits_that_differ(parameters, expected["parameters"])
            n_different += n_bits > 0
            n_killed += note.exists()
            place = note.read_text() if note.exists() else "not killed"
            source = "Ray's copy" if from_ray else "its folder"
            print(
                f"| {number} | {kill['killed_rank']} | {kill['killed_after']:.2f} | {place} | {source} | "
                f"{end['resumed_at']} | {n_bits} |",
                flush=True,
            )
    finally:
        ray.shutdown()
    print(f"{n_different} of {n_kills} ends differ, {n_killed} killed, seed {seed}, {time.monotonic() - started:.0f} s")
    return n_different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.updates, arguments.seed) > 0)
