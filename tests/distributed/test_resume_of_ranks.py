"""Checkpoints of several processes: one directory holds all, and with as many processes the run goes on to the bit."""

import copy
import itertools
import os
import signal
import warnings

import numpy as np
import pytest
import torch.distributed as dist
from parted_cases import CASES, N_ENVS, N_STEPS, Case, toys
from rank_runs import in_ranks, results_of
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories, read_checkpoint

UPDATE = N_ENVS * N_STEPS
TOTAL = 5 * UPDATE


class KillAt(BaseCallback):
    """Kills one rank in a rollout."""

    def __init__(self, rank, num_timesteps):
        super().__init__()
        self.rank, self.n_last = rank, num_timesteps

    def _on_step(self):
        if dist.get_rank() == self.rank and self.num_timesteps >= self.n_last:
            self.model._current_run.wait_for_checkpoints()
            os.kill(os.getpid(), signal.SIGKILL)
        return True


def result_of(model):
    normalizer = model.get_vec_normalize_env()
    return {
        "state": state_of(model),
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "observations": model._last_obs,
        "returns": None if normalizer is None else normalizer.returns,
        "mean": None if normalizer is None else normalizer.ret_rms.mean,
    }


HEAVY = ["mlp", "padded gru", "gsde", "dropout", "vec_normalize of a dict", "masks", "compile"]
NAMES = ["vec_normalize", "symmetry", *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY)]
NUMBERS = [
    pytest.param(*numbers, marks=() if numbers in ((1, 2), (4, 2), (2, 1)) else pytest.mark.heavy)
    for numbers in itertools.product((1, 2, 4), repeat=2)
]


@pytest.mark.parametrize("distributed", [True, "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_which_a_process_was_killed_goes_on_with_its_bits(name, distributed, tmp_path):
    case = CASES[name]

    def whole(rank):
        return result_of(case.make_model(N_ENVS // 2, distributed=distributed).learn(TOTAL))

    def killed(rank):
        callbacks = [TrainingCheckpoint(1, tmp_path), KillAt(1, 3 * UPDATE + 9)]
        case.make_model(N_ENVS // 2, distributed=distributed).learn(TOTAL, callbacks)

    def resumed(rank):
        model = PPOPlus.resume(tmp_path, case.make_env(N_ENVS // 2), device="cpu")
        assert model.num_timesteps == 3 * UPDATE
        return result_of(model.continue_learning(TrainingCheckpoint(1, tmp_path)))

    expected = results_of(2, whole)
    outcomes = in_ranks(2, killed)
    assert outcomes[1].status == -signal.SIGKILL
    assert outcomes[0].status == 1 and "RankFailedError" in outcomes[0].output
    for result, one in zip(results_of(2, resumed), expected, strict=True):
        assert_same_bits(result, one)
    # Of all processes in one directory
    files = read_checkpoint(checkpoint_directories(tmp_path)[0]).files
    assert set(files) - {"vecnormalize.json"} == {
        *("model.zip", "training_state.json", "training_state.bin"),
        *("rank_1_training_state.json", "rank_1_training_state.bin"),
    }


def stacked(n_envs):
    return VecNormalize(VecFrameStack(VecMonitor(toys(n_envs)), 2))


@pytest.mark.parametrize(("n_before", "n_now"), NUMBERS)
@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
def test_another_number_of_processes_goes_on_with_the_same_environments(n_before, n_now, tmp_path):
    case = Case(stacked, "MlpPolicy", {"memory": "gru", "memory_kwargs": {"hidden_size": 8, "sequence_length": 8}})

    def before(rank):
        model = case.make_model(N_ENVS // n_before, distributed="exact")
        model.learn(2 * UPDATE, TrainingCheckpoint(1, tmp_path))
        return observed(model)

    def now(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PPOPlus.resume(tmp_path, case.make_env(N_ENVS // n_now), device="cpu")
        seen = observed(model)
        model.learn(UPDATE, reset_num_timesteps=False)
        return seen, model.num_timesteps, [str(warning.message) for warning in caught]

    def observed(model):
        normalizer = model.env
        stack = normalizer.venv
        per_env = {
            "obs": model._last_obs,
            "starts": model._last_episode_starts,
            "memory": model._last_states.pi[0].numpy().swapaxes(0, 1),
            "returns": normalizer.returns,
            "stack": stack.stacked_obs.stacked_obs,
            "lengths": stack.venv.episode_lengths,
            "next": np.array([env.unwrapped.np_random.random() for env in model.env.unwrapped.envs]),
        }
        return copy.deepcopy((per_env, {"mean": normalizer.obs_rms.mean, "state": state_of(model)}))

    saved = results_of(n_before, before)
    outcomes = in_ranks(n_now, now)
    for outcome in outcomes:
        assert outcome.status == 0, outcome.output
        assert any("were shared out anew" in text for text in outcome.result[2]) == (n_before != n_now)
    for name in saved[0][0]:
        expected = np.concatenate([per_env[name] for per_env, _ in saved])
        found = np.concatenate([outcome.result[0][0][name] for outcome in outcomes])
        np.testing.assert_array_equal(found, expected, name)
    for outcome in outcomes:
        assert_same_bits(outcome.result[0][1], saved[0][1])
        assert outcome.result[1] == 3 * UPDATE


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(tmp_path):
    class SendSignal(BaseCallback):
        def _on_step(self):
            if dist.get_rank() == 1 and self.num_timesteps == UPDATE + 5 * N_ENVS:
                os.kill(os.getpid(), signal.SIGTERM)
            return True

    def train(rank):
        checkpoint = TrainingCheckpoint(10 * UPDATE, tmp_path)
        model = Case().make_model(N_ENVS // 2, distributed=True)
        model.learn(TOTAL, [checkpoint, SendSignal()])
        return model.num_timesteps, model._n_updates, model.last_checkpoint, checkpoint.received_signal

    first, second = results_of(2, train)
    assert first[:3] == second[:3] == (2 * UPDATE, 4, str(checkpoint_directories(tmp_path)[0]))
    assert (first[3], second[3]) == (None, signal.SIGTERM)


def test_another_number_of_environments_is_refused_by_all(tmp_path):
    def train(rank):
        Case().make_model(4, distributed=True).learn(UPDATE, TrainingCheckpoint(1, tmp_path))

    results_of(2, train)
    for outcome in in_ranks(4, lambda rank: PPOPlus.resume(tmp_path, toys(4), device="cpu")):
        assert outcome.status == 1
        assert "8 environments of 2 processes, now there are 4 in each of 4" in outcome.output
