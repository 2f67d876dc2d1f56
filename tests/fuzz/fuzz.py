"""Fuzzes a reader of foreign bytes, guided by coverage: ``python tests/fuzz/fuzz.py TARGET --seconds 3600``.

It needs atheris (``pip install atheris``; Linux or macOS). Inputs that find new code are kept in ``--corpus`` between
runs. A find is a file in ``tests/fuzz/finds/TARGET``, which ``tests/fuzz/test_targets.py`` reads from then on: an error
that is not documented, more than 10 seconds, or more than 512 MB beside what the process had at the start.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
from pathlib import Path
from typing import Any

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
READERS = ("untrusted", "saving", "resuming", "env_states", "export")

with atheris.instrument_imports(include=[f"sb3_ppo_plus.{name}" for name in READERS]):
    import sb3_ppo_plus.export
    import sb3_ppo_plus.resuming.resume
    import sb3_ppo_plus.saving.untrusted_model
with atheris.instrument_imports(include=["sb3_ppo_plus.zoo", "yaml", "pickletools", "zipfile"]):
    import pickletools  # noqa: F401  # instrumented
    import zipfile  # noqa: F401  # instrumented

    import yaml  # noqa: F401  # instrumented

    import sb3_ppo_plus.zoo.enjoy  # noqa: F401  # instrumented

from targets import TARGETS, run

MEMORY = 512 * 2**20
SECONDS = 10
JUNK = [None, True, 0, -1, 1, 2**31, 2**53, 2**62, 10**17, 0.5, -0.0, 1e300, "", "x", "inf", "../x", "$", [], [0], {}]
JUNK += [{"$": "class", "name": "os.system"}, {"$": "tuple", "items": []}, {"$array": {"type": "<f4"}}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path]
    for key, item in items:
        found += places(item, (*path, key))
    return found


def change_json(content: bytes, chance: random.Random) -> bytes:
    """Replace, remove, double or move a value of JSON."""
    value = json.loads(content)
    for _ in range(chance.randint(1, 3)):
        paths = [path for path in places(value) if path]
        if not paths:
            break
        *way, last = chance.choice(paths)
        owner = value
        for key in way:
            owner = owner[key]
        kind = chance.randrange(4)
        if kind == 0:
            owner[last] = chance.choice(JUNK)
        elif kind == 1:
            del owner[last]
        elif kind == 2 and isinstance(owner, list):
            owner.append(owner[last])
        elif isinstance(owner[last], int | float) and not isinstance(owner[last], bool):
            owner[last] = owner[last] * chance.choice([-1, 2, 1000, 0.5]) + chance.choice([0, 1])
        else:
            source = value
            for key in chance.choice(paths):
                source = source[key]
            owner[last] = json.loads(json.dumps(source))
    return json.dumps(value).encode()


def mutate(content: bytes, max_size: int, seed: int) -> bytes:
    """Change values of JSON, or else bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.7:
        try:
            return change_json(content, chance)[:max_size]
        except (ValueError, RecursionError, TypeError, KeyError, IndexError):
            pass
    return bytes(atheris.Mutate(content, max_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz_corpus"), help="folder of inputs kept between runs")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    corpus, finds = arguments.corpus / arguments.target, HERE / "finds" / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    finds.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds()):
        assert run(target, seed), "a seed is refused"
        (corpus / f"seed_{index}").write_bytes(seed)
    # Of this process at the start, in MB
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    options = [
        f"-max_total_time={arguments.seconds}",
        f"-timeout={SECONDS}",
        f"-rss_limit_mb={used + MEMORY // 2**20}",
        f"-artifact_prefix={finds}/",
        f"-max_len={max(map(len, target.seeds())) * 2 + 1000}",
        "-print_final_stats=1",
        "-len_control=20",
        str(corpus),
    ]
    mutator = {"custom_mutator": mutate} if target.is_json else {}
    atheris.Setup([sys.argv[0], *options], lambda content: run(target, content) and None, **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
