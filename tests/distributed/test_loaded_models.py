"""A model that was loaded joins the other processes when it trains, and differs from theirs only where it must."""

import numpy as np
import pytest
from parted_cases import CASES, N_ENVS, N_STEPS, toys
from rank_runs import results_of

from sb3_ppo_plus import PPOPlus

CASE = CASES["mlp"]


@pytest.mark.parametrize("own_seeds", [False, True])
def test_its_environments_have_other_seeds_in_each_process_unless_the_user_has_seeded_them(own_seeds, tmp_path):
    path = tmp_path / "model.zip"
    CASE.make_model(N_ENVS // 2).save(path)

    def run(rank):
        env = toys(N_ENVS // 2)
        if own_seeds:
            model = PPOPlus.load(path, device="cpu", distributed=True)
            env.seed(100 + 10 * rank)
            model.set_env(env)
        else:
            model = PPOPlus.load(path, env=env, device="cpu", distributed=True)
        seeds, reset = [], env.reset
        env.reset = lambda: seeds.append(env._seeds[0]) or reset()
        model.learn(N_ENVS * N_STEPS)
        return seeds[0]

    assert results_of(2, run) == ([100, 110] if own_seeds else [3, 7])


def test_its_environments_differ_where_they_are_reset_before_it_learns(tmp_path):
    path = tmp_path / "model.zip"
    CASE.make_model(N_ENVS // 2).save(path)
    expected = PPOPlus.load(path, env=toys(N_ENVS), device="cpu").get_env().reset()

    def run(rank):
        return PPOPlus.load(path, env=toys(N_ENVS // 2), device="cpu", distributed="exact").get_env().reset()

    assert np.concatenate(results_of(2, run)).tolist() == expected.tolist()
