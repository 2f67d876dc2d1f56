"""The process group that a launcher has made."""

import torch.distributed as dist
from parted_cases import CASES, N_ENVS, N_STEPS
from rank_runs import results_of
from states import assert_same_bits, state_of


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
