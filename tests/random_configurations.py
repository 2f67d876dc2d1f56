"""Random configurations of training: PPOPlus against SB3's PPO to the bit, or compiled against eager to rounding.

    python tests/random_configurations.py --first 0 --count 2000
    python tests/random_configurations.py --first 0 --count 200 --compiled
    python tests/random_configurations.py --run "{'seed': 3, 'n_envs': 2}"

Each configuration is drawn from one number (:func:`differential.sampling.sample`). One that fails is made small and
printed, as an argument for ``--run``.
"""

import argparse
import ast
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch as th
from differential.comparing import ProvesNothingError, difference_from_sb3, difference_of_compiled, shrunk
from differential.sampling import sample
from differential.training import Configuration

Difference = Callable[[Configuration], str | None]


def check(configuration: Configuration, difference: Difference, shrinks: bool) -> str:
    """Train with a configuration, print how the two differ, and return the outcome."""
    try:
        found = difference(configuration)
    except ProvesNothingError as error:
        print(f"{configuration}\nproves nothing: {error}\n", flush=True)
        return "prove nothing"
    if found is None:
        return "agree"
    if shrinks:
        configuration = shrunk(configuration, lambda smaller: _fails(smaller, difference))
        found = difference(configuration)
    print(f"{configuration}\n{found}\n", flush=True)
    return "differ"


def _fails(configuration: Configuration, difference: Difference) -> bool:
    try:
        return difference(configuration) is not None
    except ProvesNothingError:
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first number that a configuration is drawn from")
    parser.add_argument("--count", type=int, default=100, help="how many configurations")
    parser.add_argument("--compiled", action="store_true", help="compare compiled training with eager training")
    parser.add_argument("--run", type=ast.literal_eval, help="train with this configuration instead")
    parser.add_argument("--as-drawn", action="store_true", help="print what fails as it is, not made small")
    given: Any = parser.parse_args(arguments)
    th.set_num_threads(1)
    difference = difference_of_compiled if given.compiled else difference_from_sb3
    if given.run is not None:
        outcome = check(given.run, difference, shrinks=False)
        print(outcome)
        return int(outcome == "differ")
    started = time.monotonic()
    outcomes: Counter[str] = Counter()
    for seed in range(given.first, given.first + given.count):
        outcomes[check(sample(seed, compiled=given.compiled), difference, shrinks=not given.as_drawn)] += 1
        if sum(outcomes.values()) % 100 == 0:
            print(f"{seed + 1}: {dict(outcomes)}, {time.monotonic() - started:.0f} s", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return int(outcomes["differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
