"""The process group that a launcher has made."""

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch as th
import torch.distributed as dist
from parted_cases import CASES, N_ENVS, N_STEPS
from rank_runs import results_of
from states import assert_same_bits, state_of

from sb3_ppo_plus import RankFailedError
from sb3_ppo_plus.distributed.process_group import ProcessRanks


def test_a_group_that_sends_nothing_of_the_cpu_gets_one_beside_it(tmp_path):
    case = CASES["vec_normalize"]

    def train(rank):
        return state_of(case.make_model(N_ENVS // 2, distributed="exact").learn(2 * N_ENVS * N_STEPS))

    def train_as_for_gpus(rank):
        dist.destroy_process_group()
        # As NCCL: Ray Train makes such a group for GPUs
        dist.init_process_group("cuda:gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        group = dist.group.WORLD
        states = [train(rank) for _ in range(2)]
        assert dist.group.WORLD is group and "cpu" not in str(dist.get_backend_config())
        return states

    for expected, states in zip(results_of(2, train), results_of(2, train_as_for_gpus), strict=True):
        for state in states:
            assert_same_bits(state, expected)


def test_the_others_need_not_wait_for_a_process_that_goes_on_after_an_error():
    """Also where the group was made before PyTorch's differentiable collectives were imported, which then keep it."""

    def train(rank):
        for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
            del sys.modules[name]
        importlib.import_module("torch.distributed.nn.functional")
        ranks = ProcessRanks()
        if rank == 1:
            ranks.fail(ValueError("broken on purpose"))
            # It lives on until the other has ended
            while os.getppid() == parent and not (folder / "ended").exists():
                time.sleep(0.01)
            return None
        with pytest.raises(RankFailedError, match="broken on purpose"):
            ranks.sum(th.ones(3))
        (folder / "ended").touch()
        return None

    parent, folder = os.getpid(), Path(tempfile.mkdtemp())
    assert results_of(2, train) == [None, None]
