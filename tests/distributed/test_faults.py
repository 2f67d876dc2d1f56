"""A process that fails ends all: at every collective, in every rank, by every kind of fault, and none hangs."""

import os
import signal

import pytest
from parted_cases import CASES, N_ENVS, N_STEPS
from rank_runs import in_ranks, results_of

from sb3_ppo_plus import TrainingCheckpoint
from sb3_ppo_plus.distributed.process_group import ProcessRanks

UPDATE = N_ENVS * N_STEPS
#: Longest time until all have ended
SECONDS = 20


def train(n_ranks, distributed, folder):
    arguments = {"distributed": distributed, "n_epochs": 1, "batch_size": 8 * n_ranks}
    model = CASES["vec_normalize"].make_model(N_ENVS // n_ranks, **arguments)
    model.learn(2 * UPDATE, TrainingCheckpoint(1, folder))


def counted(n_ranks, distributed, folder):
    """Train, and return how many collectives it takes."""
    together, count = ProcessRanks._together, 0

    def counting(self, *arguments):
        nonlocal count
        count += 1
        together(self, *arguments)

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

    def failing(self, *arguments):
        nonlocal count
        count += 1
        if count == at:
            fault()
        together(self, *arguments)

    ProcessRanks._together = failing
    train(n_ranks, distributed, folder)


@pytest.mark.heavy
@pytest.mark.parametrize(("distributed", "n_ranks"), [(True, 2), ("exact", 2), (True, 3)])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_collective_ends_all(name, distributed, n_ranks, tmp_path):
    fault, status = FAULTS[name]
    (n_collectives, *_) = results_of(n_ranks, lambda rank: counted(n_ranks, distributed, tmp_path / "whole"))
    assert n_collectives > 20
    step = 1 if n_ranks == 2 and distributed is True else 7
    for at in range(1, n_collectives + 1, step):
        for faulty in range(n_ranks):
            folder = tmp_path / f"{at}_{faulty}"

            def run(rank, at=at, faulty=faulty, folder=folder):
                if rank == faulty:
                    train_with_fault(n_ranks, distributed, folder, at, fault)
                else:
                    train(n_ranks, distributed, folder)

            outcomes = in_ranks(n_ranks, run, seconds=60)
            case = f"collective {at} of {n_collectives}, rank {faulty}"
            assert max(outcome.seconds for outcome in outcomes) < SECONDS, case
            assert outcomes[faulty].status == status, case
            for rank, outcome in enumerate(outcomes):
                if rank != faulty:
                    assert outcome.status == 1 and "RankFailedError" in outcome.output, f"{case}: {outcome.output}"
            if name == "error":
                others = [outcome.output for rank, outcome in enumerate(outcomes) if rank != faulty]
                assert any(f"rank {faulty}:" in output and "broken on purpose" in output for output in others), case
