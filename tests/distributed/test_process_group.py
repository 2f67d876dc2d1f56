"""How a process that fails leaves the others."""

import sys
import time

import pytest
import torch as th
import torch.distributed as dist
from parted_cases import N_ENVS, N_STEPS, Case
from rank_runs import in_ranks
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus.distributed.process_group import join
from sb3_ppo_plus.errors import RankFailedError

UPDATE = N_ENVS * N_STEPS


class Raises(BaseCallback):
    """Fails in one rank, at one of its hooks."""

    def __init__(self, rank, hook):
        super().__init__()
        self.rank = rank
        setattr(self, hook, self._fail)

    def _fail(self):
        if dist.get_rank() == self.rank and self.model.num_timesteps >= UPDATE:
            raise ValueError("broken on purpose")
        return True

    def _on_step(self):
        return True


@pytest.mark.parametrize("distributed", [True, "exact"])
@pytest.mark.parametrize("hook", ["_on_step", "_on_rollout_start", "_on_rollout_end", "on_update_end"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_traceback(distributed, hook, rank):
    outcomes = in_ranks(
        2, lambda _: Case().make_model(4, distributed=distributed).learn(10 * UPDATE, Raises(rank, hook))
    )
    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert max(outcome.seconds for outcome in outcomes) < 20
    assert "RankFailedError" not in outcomes[rank].output
    assert "ValueError: broken on purpose" in outcomes[rank].output
    other = outcomes[1 - rank].output
    assert f"RankFailedError: training has ended in another process, rank {rank}:" in other
    assert "ValueError: broken on purpose" in other and "_fail" in other


@pytest.mark.parametrize("rank", [0, 1])
def test_the_process_that_fails_prints_its_traceback_before_the_others_end(rank, tmp_path):
    def train(own_rank):
        ranks = join(th.device("cpu"))
        if own_rank == rank:
            # So slow that another order would be seen
            sys.excepthook = lambda *_: (time.sleep(0.5), (tmp_path / "printed").touch())
            error = ValueError("broken on purpose")
            ranks.fail(error)
            raise error
        with pytest.raises(RankFailedError, match="broken on purpose"):
            ranks.any(True)
        return (tmp_path / "printed").exists()

    outcomes = in_ranks(2, train)
    assert [outcome.status for outcome in outcomes] == [int(rank == 0), int(rank == 1)]
    assert outcomes[1 - rank].result is True
