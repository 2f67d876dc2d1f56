"""A process of several fails at a collective, and the others must end.

``PYTHONPATH=examples/benchmarks:tests python tests/distributed/faults.py`` tries every kind of fault, in every rank,
before every collective, and prints how many hang, and what is wrong with others. The suite tries some.
"""

import argparse
import itertools
import os
import signal
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  # one thread
from parted_cases import CASES, N_ENVS, N_STEPS
from rank_runs import in_ranks, results_of

from sb3_ppo_plus import TrainingCheckpoint
from sb3_ppo_plus.distributed.process_group import ProcessRanks

UPDATE = N_ENVS * N_STEPS


def train(n_ranks, distributed, folder):
    arguments = {"distributed": distributed, "n_epochs": 1, "batch_size": 8 * n_ranks}
    model = CASES["vec_normalize"].make_model(N_ENVS // n_ranks, **arguments)
    # Each update has the collectives of the first
    model.learn(UPDATE, TrainingCheckpoint(1, folder))


def counted(n_ranks, distributed, folder):
    """Train, and return how many collectives it takes."""
    together, count = ProcessRanks._together, 0

    def counting(self, *arguments, **kwargs):
        nonlocal count
        count += 1
        together(self, *arguments, **kwargs)

    ProcessRanks._together = counting
    train(n_ranks, distributed, folder)
    return count


def raise_error():
    raise ValueError("broken on purpose")


def interrupt():
    raise KeyboardInterrupt


def leave():
    raise SystemExit(3)


FAULTS = {
    "error": (raise_error, 1),
    "interrupt": (interrupt, 1),
    "exit": (leave, 3),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    "terminated": (lambda: os.kill(os.getpid(), signal.SIGABRT), -signal.SIGABRT),
}


def train_with_fault(n_ranks, distributed, folder, at, fault):
    """Train; before a collective, this process fails."""
    together, count = ProcessRanks._together, 0

    def failing(self, *arguments, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            fault()
        together(self, *arguments, **kwargs)

    ProcessRanks._together = failing
    train(n_ranks, distributed, folder)


def outcome_of(name, n_ranks, distributed, folder, at, faulty):
    """Train with a fault; return what is wrong with how it ended, or None, and the seconds until all had ended."""
    fault, status = FAULTS[name]

    def run(rank):
        if rank == faulty:
            train_with_fault(n_ranks, distributed, folder, at, fault)
        else:
            train(n_ranks, distributed, folder)

    outcomes = in_ranks(n_ranks, run, seconds=60)
    seconds = max(outcome.seconds for outcome in outcomes)
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != faulty]
    wrong = None
    if any(outcome.status == -signal.SIGKILL for outcome in others):
        wrong = "hangs"
    elif outcomes[faulty].status != status:
        wrong = f"the faulty rank ends with {outcomes[faulty].status}: {outcomes[faulty].output}"
    elif any(outcome.status != 1 or "RankFailedError" not in outcome.output for outcome in others):
        wrong = f"another rank ends with {[outcome.status for outcome in others]}: {others[0].output}"
    elif name == "error" and not any(
        f"rank {faulty}:" in outcome.output and "broken on purpose" in outcome.output for outcome in others
    ):
        wrong = f"no other rank knows the reason: {others[0].output}"
    return wrong, seconds


def cases_of(n_ranks, distributed, folder, step):
    """List the faults: (collective, rank), every ``step``-th of them."""
    n_collectives = results_of(n_ranks, lambda rank: counted(n_ranks, distributed, folder))[0]
    assert n_collectives > 20
    return list(itertools.product(range(1, n_collectives + 1), range(n_ranks)))[::step]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=1, help="try every n-th only")
    step = parser.parse_args().step
    for (distributed, n_ranks), name in itertools.product([(True, 2), ("exact", 2), (True, 3)], FAULTS):
        folder = Path(tempfile.mkdtemp())
        started, slowest, wrong = time.monotonic(), 0.0, []
        cases = cases_of(n_ranks, distributed, folder / "whole", step)
        for at, faulty in cases:
            text, seconds = outcome_of(name, n_ranks, distributed, folder / f"{at}_{faulty}", at, faulty)
            slowest = max(slowest, seconds)
            if text is not None:
                wrong.append(f"collective {at}, rank {faulty}: {text}")
        hanging = sum(text.endswith("hangs") for text in wrong)
        print(
            f"distributed={distributed!s:5} {n_ranks} processes, {name:10}: {len(cases)} faults, {hanging} hang, "
            f"{len(wrong)} end wrongly, slowest {slowest:.1f} s, {time.monotonic() - started:.0f} s in all",
            flush=True,
        )
        print("\n".join(wrong), flush=True)


if __name__ == "__main__":
    main()
