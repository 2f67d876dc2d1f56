"""Where one process can save no checkpoint, no other waits for it: all of them have the error, and may go on."""

import warnings

import pytest
from parted_cases import CASES, N_ENVS, N_STEPS
from rank_runs import results_of
from states import assert_same_bits, state_of

from sb3_ppo_plus import TrainingCheckpoint
from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.resuming import checkpoint, checkpoint_directory
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories

TOTAL = 4 * N_ENVS * N_STEPS
CASE = CASES["vec_normalize"]


class GoesOn(TrainingCheckpoint):
    """Notes errors, and lets training go on."""

    def _on_training_start(self):
        self.errors = []
        try:
            super()._on_training_start()
        except Exception as error:
            self.errors.append(str(error))

    def on_update_end(self):
        try:
            return super().on_update_end()
        except Exception as error:
            self.errors.append(str(error))
            return True

    def on_learn_end(self):
        try:
            super().on_learn_end()
        except Exception as error:
            self.errors.append(str(error))


def refuse(*args, **kwargs):
    raise PlainStateError("odd.attribute is a generator")


def no_space(*args, **kwargs):
    raise OSError(28, "No space left")


# Where it fails: module, process, function; and how
FAULTS = {
    "a state that cannot be saved": (checkpoint, 1, "take_snapshot", refuse),
    "a proof that fails": (checkpoint, 1, "prove_envs", refuse),
    "a full disk": (checkpoint_directory, 0, "_write_file", no_space),
}


@pytest.mark.parametrize("distributed", [True, pytest.param("exact", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", FAULTS)
def test_training_goes_on_in_all_processes_where_one_saves_no_checkpoint(name, distributed, tmp_path, monkeypatch):
    module, failing, function, fault = FAULTS[name]

    def whole(rank):
        return state_of(CASE.make_model(N_ENVS // 2, distributed=distributed).learn(TOTAL))

    def broken(rank):
        if rank == failing:
            monkeypatch.setattr(module, function, fault)
        callback = GoesOn(1, tmp_path)
        model = CASE.make_model(N_ENVS // 2, distributed=distributed).learn(TOTAL, callback)
        return state_of(model), callback.errors

    expected = results_of(2, whole)
    results = results_of(2, broken)
    for rank, (state, errors) in enumerate(results):
        assert_same_bits(state, expected[rank])
        assert errors
        for text in errors[: len(results[1 - failing][1])]:
            assert ("odd.attribute" in text) or ("No space left" in text)
            assert text.startswith(f"in rank {failing}: ") == (rank != failing)
    assert bool(checkpoint_directories(tmp_path)) == (function == "prove_envs")


def test_where_the_environments_of_one_process_must_begin_anew_those_of_all_do(tmp_path, monkeypatch):
    """In the exact mode a reset updates VecNormalize in all processes together."""
    findings = [True, False]

    def run(rank):
        monkeypatch.setattr(checkpoint, "prove_envs", lambda env, *kind: rank == 1 and findings.pop(0))
        begun = []
        begin = checkpoint.begin_new_episodes
        monkeypatch.setattr(checkpoint, "begin_new_episodes", lambda model: begun.append(1) or begin(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = CASE.make_model(N_ENVS // 2, distributed="exact").learn(TOTAL, TrainingCheckpoint(1, tmp_path))
        return len(begun), model.num_timesteps

    assert results_of(2, run) == [(1, TOTAL), (1, TOTAL)]
