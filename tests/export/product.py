"""Exports every action distribution with every network, and compares 1,000 actions of each with ``predict``.

    python tests/export/product.py [--only REGEX] [--steps 250]

It takes about half an hour. tests/export/test_exported_actions.py tries some of these cases in the same way.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from export_cases import ALL_CASES, differences, make_model

from sb3_ppo_plus import export_policy
from sb3_ppo_plus.export import load_exported


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names hold this regular expression")
    parser.add_argument("--steps", type=int, default=250, help="steps of each of the four environments")
    args = parser.parse_args()
    worst = {}
    # In a random order, a part of them tells something too
    for case in random.Random(0).sample(ALL_CASES, len(ALL_CASES)):
        if not re.search(args.only, str(case)):
            continue
        begin = time.perf_counter()
        model, seen, raw, normalize = make_model(case)
        with tempfile.TemporaryDirectory() as folder:
            exports = {
                suffix: load_exported(export_policy(model, Path(folder) / f"policy.{suffix}", normalize))
                for suffix in ("onnx", "pt2")
            }
        for suffix, found in differences(case, model, seen, raw, exports, args.steps).items():
            counts = (
                f"other={found.n_other} close={found.n_close} rounded={found.n_rounded} distinct={found.n_distinct}"
            )
            seconds = time.perf_counter() - begin
            print(f"{case!s:48} {suffix:5} n={found.n} error={found.error:.1e} {counts} {seconds:.1f}s", flush=True)
            before = worst.get(suffix, (0, 0.0, 0))
            worst[suffix] = (before[0] + 1, max(before[1], found.error), before[2] + found.n_other)
    for suffix, (n, error, n_other) in worst.items():
        print(f"{suffix}: {n} cases, largest error {error:.1e} of the action range, {n_other} other discrete actions")


if __name__ == "__main__":
    main()
