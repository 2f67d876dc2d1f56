"""What must be alike in all processes, and is refused or made so before they train."""

import copy
import os
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import MASKED_ACTION_SPACES, ToyEnv, make_env
from models import assert_refused
from parted_cases import CASES, N_ENVS, N_STEPS, Case, masked, toys
from rank_runs import in_ranks, results_of
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.distributed import share_of
from sb3_ppo_plus.distributed.agreement import _text_of
from sb3_ppo_plus.errors import RankFailedError

UPDATE = N_ENVS * N_STEPS


def test_environments_have_the_seeds_of_one_process_with_all():
    def seeds(n_envs, **arguments):
        env = make_vec_env(ToyEnv, n_envs)
        model = PPOPlus("MlpPolicy", env, n_steps=8, batch_size=8, seed=5, device="cpu", **arguments)
        given = list(env._seeds)
        model.learn(8)
        return given

    expected = seeds(4)
    assert expected == [5, 6, 7, 8]
    first, second = results_of(2, lambda rank: seeds(2, distributed=True))
    assert [*first, *second] == expected


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("batch_size", lambda rank: {"batch_size": 16 * (rank + 1)}),
        ("learning_rate", lambda rank: {"learning_rate": 1e-3 * (rank + 1)}),
        ("number of environments", lambda rank: {"n_envs": 2 * (rank + 1)}),
        ("policy_kwargs", lambda rank: {"policy_kwargs": {"net_arch": [8 * (rank + 1)]}}),
    ],
)
def test_processes_that_differ_are_refused_in_all_with_both_sides(name, change):
    def train(rank):
        case = Case(arguments={"distributed": True})
        case.make_model(**{"n_envs": 4, **change(rank)}).learn(UPDATE)

    for outcome in in_ranks(2, train):
        assert outcome.status == 1
        assert f"ValueError: {name} must be the same in all processes, got" in outcome.output
        assert "in rank 0" in outcome.output and "in rank 1" in outcome.output


def test_bad_input_is_refused_before_the_first_step(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert_refused(ValueError, "distributed", "torchrun", "RANK", distributed=True)
    assert_refused(ValueError, "distributed", "True or", "'yes'", distributed="yes")
    assert share_of(8) == (8, 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert share_of(8) == (4, 4)
    with pytest.raises(ValueError, match="n_envs=7"):
        share_of(7)
    outcomes = in_ranks(2, lambda rank: Case().make_model(4, distributed=True, batch_size=33))
    assert all("batch_size=33" in outcome.output and outcome.status == 1 for outcome in outcomes)


def test_batch_sizes_are_compared_with_the_environments_of_all_processes():
    def messages(batch_size):
        def train(rank):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                Case().make_model(4, distributed=True, batch_size=batch_size)
            return [str(warning.message) for warning in caught if "atch" in str(warning.message)]

        return results_of(2, train)

    # Larger than the rollout of one process
    assert messages(UPDATE) == [[], []]
    first, second = messages(UPDATE - 2)
    assert len(first) == 1 and "only 2 transitions" in first[0] and second == []


def test_all_begin_with_the_parameters_of_the_first_process():
    def train(rank):
        th.manual_seed(rank)
        model = Case().make_model(4, distributed=True, seed=None)
        before = copy.deepcopy(state_of(model))
        model.learn(UPDATE)
        return before, state_of(model)

    first, second = results_of(2, train)
    name = "policy.action_net.weight"
    assert not th.equal(first[0][name], second[0][name]), "the case proves nothing"
    assert_same_bits(first[1], second[1])


@pytest.mark.parametrize(
    "make_callback",
    [
        lambda rank, folder: TrainingCheckpoint(1, folder) if rank == 0 else None,
        lambda rank, folder: TrainingCheckpoint(1 + rank * UPDATE, folder),
    ],
)
def test_callbacks_that_act_together_must_be_those_of_all(make_callback, tmp_path):
    def train(rank):
        Case().make_model(4, distributed=True).learn(UPDATE, make_callback(rank, tmp_path))

    for outcome in in_ranks(2, train):
        assert outcome.status == 1
        assert "ValueError: callbacks that act together must be the same in all processes" in outcome.output


@pytest.mark.parametrize("setting", ["training", "norm_reward", "gamma"])
def test_normalisers_that_differ_are_refused(setting):
    def train(rank):
        model = CASES["vec_normalize"].make_model(4, distributed="exact")
        if rank == 1:
            setattr(model.env, setting, {"gamma": 0.5}.get(setting, False))
        model.learn(UPDATE)

    for outcome in in_ranks(2, train):
        assert outcome.status == 1
        assert "ValueError: VecEnv wrapper 1 must be the same in all processes" in outcome.output


def test_an_error_of_all_processes_leaves_them_able_to_go_on():
    def train(rank):
        model = Case().make_model(4, distributed=True)
        with pytest.raises(ValueError, match="total_timesteps must be the same"):
            model.learn(UPDATE * (1 + rank))
        return model.learn(UPDATE).num_timesteps

    assert results_of(2, train) == [UPDATE, UPDATE]


def test_a_loaded_model_has_other_seeds_in_each_process(tmp_path):
    Case().make_model(4).learn(UPDATE).save(tmp_path / "model.zip")

    def seeds(rank):
        env = make_env(4)
        model = PPOPlus.load(tmp_path / "model.zip", env, distributed=True, device="cpu")
        seen = []
        reset = env.reset
        env.reset = lambda: (seen.extend(env._seeds), reset())[1]
        model.learn(8)
        return seen

    first, second = results_of(2, seeds)
    assert len(first) == 4 and not set(first) & set(second)


def test_environments_of_scripts_that_seed_all_alike_are_seeded_apart():
    def seeds(rank):
        env = make_env(2)
        env.seed(7)
        model = PPOPlus("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu", distributed=True)
        seen = []
        reset = env.reset
        env.reset = lambda: (seen.extend(env._seeds), reset())[1]
        model.learn(8)
        return seen

    assert results_of(2, seeds) == [[7, 8], [9, 10]]


class ChangedByOne(BaseCallback):
    """Changes the model of the second process in the middle of a rollout.

    :param change: gets the model
    """

    def __init__(self, change):
        super().__init__()
        self.change = change

    def _on_step(self):
        if self.n_calls == 3 and self.model._parts.ranks.rank == 1:
            self.change(self.model)
        return True


@pytest.mark.parametrize("distributed", [True, "exact"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("target_kl", lambda model: setattr(model, "target_kl", 1e-9)),
        ("n_epochs", lambda model: setattr(model, "n_epochs", 1)),
        ("batch_size", lambda model: setattr(model, "batch_size", 64)),
        ("clip_range", lambda model: setattr(model, "clip_range", 0.01)),
        ("trainable parameters", lambda model: model.policy.value_net.requires_grad_(False)),
    ],
)
def test_what_a_callback_changes_in_one_process_only_is_an_error_before_the_update(name, change, distributed):
    def train(rank):
        model = Case().make_model(4, distributed=distributed)
        with pytest.raises(ValueError, match=f"{name} must be the same in all processes, got") as refused:
            model.learn(UPDATE, ChangedByOne(change))
        return str(refused.value), model._n_updates

    first, second = results_of(2, train)
    assert first == second and "in rank 0" in first[0] and "in rank 1" in first[0] and first[1] == 0


def test_masks_of_the_environments_of_one_process_only_are_refused():
    def train(rank):
        env = masked(4) if rank == 1 else toys(4, action_space=MASKED_ACTION_SPACES["multi_discrete"])
        model = PPOPlus("MlpPolicy", env, n_steps=16, batch_size=32, device="cpu", distributed=True)
        with pytest.raises(ValueError, match=r"whether masks are used must be .* False in rank 0, True in rank 1"):
            model.learn(UPDATE)

    results_of(2, train)


def test_settings_are_compared_by_their_values():
    assert _text_of({0, 8}) == _text_of(set([8, 0])), "the order in a set depends on how it was made"
    assert _text_of([lambda: 0]) == _text_of([lambda: 0]), "functions are elsewhere in each process"
    assert _text_of(np.random.default_rng(0)) == _text_of(np.random.default_rng(0))
    high = np.ones(2000, np.float32)
    spaces_that_differ = [gym.spaces.Box(-1, np.where(np.arange(2000) == 1000, value, high)) for value in (1, 2)]
    assert _text_of(spaces_that_differ[0]) != _text_of(spaces_that_differ[1])


def test_a_launcher_that_cannot_bring_processes_together_again_is_named_after_a_failure():
    def train(rank):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
            os.environ[name] = str(value)
        model = Case().make_model(4, distributed=True)
        if rank == 1:
            model.env.step_wait = lambda: 1 / 0
        with pytest.raises((ZeroDivisionError, RankFailedError)):
            model.learn(UPDATE)
        with pytest.raises(RuntimeError, match="start the script anew"):
            Case().make_model(4, distributed=True)

    results_of(2, train)
