"""``distributed=True``: processes that train one model together, each with environments of its own."""

import hashlib
import sys
import time
import warnings

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from environments import make_env, record_logs
from parted_cases import CASES, N_ENVS, N_STEPS, Case, toys
from rank_runs import in_ranks, results_of
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import NonFiniteError, PPOPlus
from sb3_ppo_plus.distributed.process_group import join
from sb3_ppo_plus.errors import RankFailedError

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


def moved(state, initial):
    return max((state[name] - value).abs().max().item() for name, value in initial.items())


@pytest.mark.parametrize("n_ranks", [2, pytest.param(4, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", ["mlp", "cnn", "padded gru", "beta", pytest.param("compile", marks=pytest.mark.heavy)])
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


@pytest.mark.parametrize("distributed", [True, "exact"])
@pytest.mark.parametrize("hook", ["_on_step", "_on_rollout_end", "on_update_end"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_traceback(distributed, hook, rank):
    outcomes = in_ranks(
        2, lambda _: Case().make_model(4, distributed=distributed).learn(10 * UPDATE, Raises(rank, hook))
    )
    assert [outcome.status for outcome in outcomes] == [1, 1]
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


def test_one_process_alone_has_the_bits_of_no_others():
    (state,) = results_of(1, lambda rank: state_of(Case().make_model(distributed=True).learn(UPDATE)))
    assert_same_bits(state, state_of(Case().make_model().learn(UPDATE)))


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
