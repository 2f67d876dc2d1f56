"""``distributed=True``: processes that train one model together, each with environments of its own."""

import copy
import hashlib
import warnings

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from environments import ToyEnv, make_env, record_logs
from models import assert_refused
from parted_cases import CASES, N_ENVS, N_STEPS, Case, toys
from rank_runs import in_ranks, results_of
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import NonFiniteError, PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.distributed import share_of

UPDATE = N_ENVS * N_STEPS


class HashesOfUpdates(BaseCallback):
    """Notes the parameters after each update."""

    def __init__(self):
        super().__init__()
        self.hashes = []

    def _on_step(self):
        return True

    def on_update_end(self):
        content = b"".join(value.numpy().tobytes() for value in self.model.policy.state_dict().values())
        self.hashes.append(hashlib.sha256(content).hexdigest())
        return True


class StopAt(BaseCallback):
    """Ends training after some steps of one rank."""

    def __init__(self, rank, n_calls, rank_here=None):
        super().__init__()
        self.rank, self.n_last, self.rank_here = rank, n_calls, rank_here

    def _on_step(self):
        rank = dist.get_rank() if self.rank_here is None else self.rank_here
        return rank != self.rank or self.n_calls < self.n_last


def moved(state, initial):
    return max((state[name] - value).abs().max().item() for name, value in initial.items())


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("name", ["mlp", "cnn", "padded gru", "beta", "compile"])
def test_processes_train_as_one_does_with_the_same_minibatches(name, n_ranks):
    case = CASES[name]
    whole = case.make_model(micro_batches=n_ranks)
    initial = {key: value.clone() for key, value in whole.policy.state_dict().items()}
    whole.learn(3 * UPDATE)
    states = results_of(
        n_ranks,
        lambda rank: case.make_model(N_ENVS // n_ranks, distributed=True).learn(3 * UPDATE).policy.state_dict(),
    )
    expected = whole.policy.state_dict()
    distance = moved(expected, initial)
    assert distance > 1e-3, "the case proves nothing"
    assert moved(states[0], expected) <= 1e-4 * distance
    for state in states[1:]:
        assert_same_bits(state, states[0])


@pytest.mark.parametrize("name", ["mlp", "vec_normalize", "target_kl", "masks", "vec_normalize of a dict"])
def test_processes_are_equal_after_each_update_and_tell_of_all_episodes(name):
    case = CASES[name]

    def train(rank):
        hashes = HashesOfUpdates()
        model = case.make_model(N_ENVS // 2, distributed=True)
        recorder = record_logs(model)
        model.learn(4 * UPDATE, hashes)
        logs = [{k: v for k, v in log.items() if not k.startswith("time/")} for log in recorder.dumps]
        episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer]
        normalizer = model.get_vec_normalize_env()
        statistics = [] if normalizer is None else [normalizer.ret_rms.mean, normalizer.ret_rms.var]
        return hashes.hashes, logs, episodes, statistics, model.num_timesteps, model.rollout_buffer.rewards

    first, second = results_of(2, train)
    assert_same_bits(list(first[:-1]), list(second[:-1]))
    hashes, logs, episodes, _, num_timesteps, rewards = first
    assert len(set(hashes)) == 4 and num_timesteps == 4 * UPDATE
    assert len(episodes) > 30 and logs[0]["rollout/ep_rew_mean"]
    assert not np.array_equal(rewards, second[-1]), "the environments of both do the same"


def test_statistics_of_all_processes_are_merged_and_history_counts_once():
    history = RunningMeanStd(shape=(3,))
    history.update(np.random.default_rng(0).normal(5.0, 2.0, (1000, 3)))

    def train(rank):
        env = VecNormalize(toys(4))
        env.obs_rms = history.copy()
        model = Case().make_model(4, distributed=True)
        model.set_env(env)
        seen = []
        update = RunningMeanStd.update
        RunningMeanStd.update = lambda self, arr: (seen.append(arr) if arr.ndim == 2 else None, update(self, arr))[1]
        model.learn(3 * UPDATE)
        # Each batch is given to the statistics, and to what is merged
        return seen[::2], env.obs_rms.mean, env.obs_rms.var, env.obs_rms.count, type(env.obs_rms) is RunningMeanStd

    first, second = results_of(2, train)
    assert_same_bits(list(first[1:]), list(second[1:]))
    batches = [*first[0], *second[0]]
    expected = history.copy()
    expected.update(np.concatenate(batches))
    assert expected.count == pytest.approx(1000 + 3 * UPDATE + 2 * 4, abs=1e-3)
    assert first[3] == pytest.approx(expected.count)
    # VecNormalize averages each batch in float32
    np.testing.assert_allclose(first[1], expected.mean, rtol=1e-7)
    np.testing.assert_allclose(first[2], expected.var, rtol=1e-7)
    assert first[4]


@pytest.mark.parametrize("distributed", [True, "exact"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_in_one_process_ends_all(distributed, rank):
    def train(_):
        model = Case().make_model(4, distributed=distributed)
        model.learn(10 * UPDATE, StopAt(rank, N_STEPS + 3))
        episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer]
        return model.num_timesteps, model._n_updates, state_of(model), episodes

    outcomes = in_ranks(2, train)
    assert [outcome.status for outcome in outcomes] == [0, 0]
    assert_same_bits(list(outcomes[0].result), list(outcomes[1].result))
    num_timesteps, n_updates, _, episodes = outcomes[0].result
    if distributed == "exact":
        one = Case().make_model(8, micro_batches=2).learn(10 * UPDATE, StopAt(0, N_STEPS + 3, rank_here=0))
        assert episodes == [(episode["r"], episode["l"]) for episode in one.ep_info_buffer]
    assert n_updates == 2
    # The exact mode stops after the very step. Otherwise, the other process finishes its rollout
    assert num_timesteps == (UPDATE + 3 * N_ENVS if distributed == "exact" else 2 * UPDATE)


def test_only_the_first_process_evaluates_and_writes(tmp_path):
    def train(rank):
        evaluation = EvalCallback(make_env(), eval_freq=N_STEPS, best_model_save_path=str(tmp_path), verbose=0)
        saving = CheckpointCallback(N_STEPS, str(tmp_path / "saved"))
        model = Case().make_model(4, distributed=True, verbose=1, tensorboard_log=str(tmp_path / "log"))
        model.learn(3 * UPDATE, [evaluation, saving])
        model.save(tmp_path / f"model_{rank}.zip")
        return len(evaluation.evaluations_timesteps), evaluation.best_mean_reward, model.verbose

    outcomes = in_ranks(2, train)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[0].result[1] > -np.inf and outcomes[1].result[1] == -np.inf
    assert "total_timesteps" in outcomes[0].output and "total_timesteps" not in outcomes[1].output
    assert sorted(path.name for path in tmp_path.glob("*.zip")) == ["best_model.zip", "model_0.zip"]
    # Steps of all processes
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        f"rl_model_{n * UPDATE}_steps.zip" for n in (1, 2, 3)
    }
    assert len(list((tmp_path / "log").iterdir())) == 1
    # A plain process loads it, and predicts
    for trusted in (True, False):
        model = PPOPlus.load(tmp_path / "model_0.zip", env=make_env(4), trusted=trusted, device="cpu")
        assert model.distributed is True
        model.predict(np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="distributed must be False in a process without a launcher"):
            model.learn(10)
    assert PPOPlus.load(tmp_path / "model_0.zip", env=make_env(4), distributed=False).learn(10).num_timesteps


def test_a_stop_of_an_evaluation_reaches_all(tmp_path):
    def train(rank):
        stop = EvalCallback(make_env(), eval_freq=5, callback_on_new_best=StopTrainingOnMaxEpisodes(1), verbose=0)
        stop.callback_on_new_best.on_step = lambda: False
        model = Case().make_model(4, distributed=True)
        model.learn(10 * UPDATE, stop)
        return model._n_updates

    assert results_of(2, train) == [0, 0]


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


def test_one_process_alone_has_the_bits_of_no_others():
    (state,) = results_of(1, lambda rank: state_of(Case().make_model(distributed=True).learn(UPDATE)))
    assert_same_bits(state, state_of(Case().make_model().learn(UPDATE)))


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


def test_processes_with_and_without_a_compiler_train_together(monkeypatch):
    case = Case(arguments={"compile": True, "distributed": True})

    def train(rank):
        if rank == 1:

            def refuses(*_):
                raise RuntimeError("no compiler")

            monkeypatch.setattr("sb3_ppo_plus.fast.graphs.compile_graph", refuses)
        model = case.make_model(4)
        model.learn(3 * UPDATE)
        return model.policy.state_dict(), model._execution.gradient_step.n_compilations

    first, second = results_of(2, train)
    assert (first[1], second[1]) == (2, 0)
    assert_same_bits(first[0], second[0])


class WithBatchNorm(BaseFeaturesExtractor):
    """Keeps statistics of what it has seen in updates."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.norm = th.nn.BatchNorm1d(3)

    def forward(self, observations):
        return self.norm(observations)


def test_statistics_of_layers_are_those_of_the_first_process():
    case = Case(policy_kwargs={"features_extractor_class": WithBatchNorm}, arguments={"distributed": True})
    first, second = results_of(2, lambda rank: case.make_model(4).learn(3 * UPDATE).policy.state_dict())
    assert first["features_extractor.norm.running_mean"].abs().max() > 0.01, "the case proves nothing"
    assert_same_bits(first, second)


def test_a_policy_that_was_changed_in_one_process_is_that_of_the_first_again():
    class Changes(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if dist.get_rank() == 1:
                with th.no_grad():
                    self.model.policy.action_net.bias += 1

    def train(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = Case().make_model(4, distributed=True).learn(3 * UPDATE, Changes())
        return model.policy.state_dict(), [str(warning.message) for warning in caught]

    first, second = results_of(2, train)
    assert_same_bits(first[0], second[0])
    assert len([text for text in first[1] if "the parameters of the processes differ" in text]) == 1


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


@pytest.mark.parametrize("on_non_finite", ["raise", "skip"])
def test_a_number_that_is_not_finite_in_one_process_is_one_of_all(on_non_finite):
    class Spoils(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if dist.get_rank() == 1:
                self.model.rollout_buffer.returns[0, 0] = np.nan

    def train(rank):
        model = Case().make_model(4, distributed=True, on_non_finite=on_non_finite, n_epochs=1, max_skipped=3)
        if on_non_finite == "raise":
            with pytest.raises(NonFiniteError, match="value loss"):
                model.learn(2 * UPDATE, Spoils())
        else:
            model.learn(2 * UPDATE, Spoils())
        return model._skipped_steps, model.policy.state_dict()

    first, second = results_of(2, train)
    assert_same_bits(list(first), list(second))
    assert first[0] == (2 if on_non_finite == "skip" else 0)


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
