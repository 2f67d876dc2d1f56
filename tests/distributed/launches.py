"""Launches real runs of two ranks, in each of which one rank fails at a random step, and prints how they end.

    OMP_NUM_THREADS=1 PYTHONPATH=examples/benchmarks:tests python tests/distributed/launches.py --launches 10

Each fault is launched so often with torchrun, in turns on each rank, with `distributed=True` and `"exact"`. A launch
hangs if it has not ended after 60 seconds. The seconds are from the fault to the end of both ranks. After a SIGKILL
torchrun starts both ranks again, up to twice: what they end with must have the bits of a run that was never killed.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from launched_run import IN_TRAINING, STEPS, Launch, launch
from states import assert_same_bits

LIMIT = 60.0
MODES = ("True", "exact")
#: Exit codes of torchrun: a stop and a SIGTERM end training in order
EXPECTED_STATUS = {"stop": 0, "nan": 1, "exception": 1, "sigterm": 0, "sigkill": 0}


def has_same_bits(launched: Launch, whole: Launch) -> bool:
    """Whether both ranks have come to the end of a run that was never killed."""
    try:
        assert_same_bits(launched.results, whole.results)
    except AssertionError as error:
        print(error)
        return False
    return True


def campaign(n_launches: int, seed: int, kinds: tuple[str, ...] = IN_TRAINING, steps: int = STEPS) -> bool:
    """Print a line for each launch, and a table; return whether all have ended as they should."""
    draw = random.Random(seed)
    whole: dict[str, Launch] = {}
    rows, is_right = [], True
    for kind in kinds:
        counts: Counter[str] = Counter()
        seconds: list[float] = []
        for number in range(n_launches):
            mode, rank, step = MODES[number % 2], number // 2 % 2, draw.randint(1, steps - 1)
            if kind == "sigkill" and mode not in whole:
                whole[mode] = launch(new_folder(), mode, limit=LIMIT)
            restarts = 2 if kind == "sigkill" else 0
            # Two attempts, each of which takes the time of a start
            launched = launch(new_folder(), mode, (kind, rank, step), restarts, LIMIT * (1 + bool(restarts)))
            assert launched.seconds is not None, f"there was no fault: {launched.output}"
            seconds.append(launched.seconds)
            counts["hangs"] += launched.status is None or launched.seconds > LIMIT
            counts["as expected"] += launched.status == EXPECTED_STATUS[kind]
            if kind == "sigkill":
                counts["same bits"] += launched.n_attempts == 2 and has_same_bits(launched, whole[mode])
            print(f"{kind}, {mode}, rank {rank}, step {step}: {launched.status}, {launched.seconds:.1f} s", flush=True)
        same = f"{counts['same bits']} of {n_launches}" if kind == "sigkill" else ""
        as_expected = f"{counts['as expected']} of {n_launches}"
        rows.append(f"| {kind} | {n_launches} | {counts['hangs']} | {max(seconds):.1f} | {as_expected} | {same} |")
        is_right &= counts["hangs"] == 0 and max(seconds) <= 20 and counts["as expected"] == n_launches
        is_right &= kind != "sigkill" or counts["same bits"] == n_launches
    print("| fault | launches | hangs | longest, s | exit code as expected | bits of the run never killed |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows), flush=True)
    return is_right


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="launch_"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=IN_TRAINING, default=IN_TRAINING)
    arguments = parser.parse_args()
    started = time.perf_counter()
    has_passed = campaign(arguments.launches, arguments.seed, tuple(arguments.faults))
    print(f"seed {arguments.seed}, {time.perf_counter() - started:.0f} s")
    sys.exit(0 if has_passed else 1)
