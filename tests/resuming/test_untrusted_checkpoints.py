"""Checkpoints that are resumed without trust, and forged ones."""

import numpy as np
import pytest
from environments import ToyEnv
from hostile import make_special_file
from interrupted_runs import StopAfter, interrupted, learned, make_envs, make_model, rewritten
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor
from states import assert_same_bits, state_of

from sb3_ppo_plus import CheckpointError, PPOPlus, ResumableEnv, TrainingCheckpoint, latest_checkpoint
from sb3_ppo_plus.resuming.checkpoint_directory import read_checkpoint, write_checkpoint


def test_can_be_resumed_without_trust(tmp_path):
    interrupted(tmp_path, learning_rate="lin_1e-3")
    resumed = PPOPlus.resume(tmp_path, make_envs(), device="cpu", trusted=False)
    resumed.continue_learning()
    assert_same_bits(state_of(resumed), learned(learning_rate="lin_1e-3"))


def test_numbers_and_lists_beyond_those_of_a_description_are_resumed_without_trust(tmp_path):
    nested = []
    for _ in range(40):
        nested = [nested]

    class Keeps(ToyEnv):
        def reset(self, **kwargs):
            self.kept = {"integer": -(10**300), "infinity": -np.inf, "nested": nested, "nan": float("nan")}
            return super().reset(**kwargs)

    def envs():
        return make_vec_env(Keeps, 2, seed=0, wrapper_class=ResumableEnv)

    evaluation = EvalCallback(make_envs(), eval_freq=1000)
    make_model(envs()).learn(96, [TrainingCheckpoint(1, tmp_path), evaluation, StopAfter(48)])
    resumed = PPOPlus.resume(tmp_path, envs(), device="cpu", trusted=False)
    (kept, _) = resumed.env.get_attr("kept")
    assert kept["integer"] == -(10**300) and kept["infinity"] == -np.inf and kept["nested"] == nested
    assert np.isnan(kept["nan"])
    resumed.continue_learning(EvalCallback(make_envs(), eval_freq=1000))
    assert_same_bits(state_of(resumed), state_of(make_model(envs()).learn(96)))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"attributes": {}, "attributes": {}}', "a key occurs twice"),
        ("[" * 200 + "]" * 200, "nested more than 128 levels deep"),
        ('{"attributes": 1' + "0" * 4300 + "}", "4301 digits"),
        ('{"attributes": 1e999}', "too large"),
    ],
    ids=["twice", "nested", "digits", "too large"],
)
def test_without_trust_a_training_state_is_read_strictly(tmp_path, text, message):
    interrupted(tmp_path)
    files = dict(read_checkpoint(latest_checkpoint(tmp_path)).files) | {"training_state.json": text.encode()}
    directory = write_checkpoint(tmp_path / "rewritten", files, 48)
    with pytest.raises(CheckpointError, match=rf"training_state\.json .*{message}"):
        PPOPlus.resume(directory, make_envs(), device="cpu", trusted=False)


def array(dtype, shape, **more):
    return {"$array": {"type": dtype, "shape": shape, "offset": 0, **more}}


def innermost(state):
    """The forged state of the innermost layer of the first environment."""
    return state["env"]["envs"][0]["layers"][-1]["$tuple"][1]


def linked(state, first, second):
    """Forge a table, the second entry of which an attribute is."""
    state["env"]["envs"][0]["table"] = [first, second]
    innermost(state).update(made_up=["linked", [1]])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files, state: files.pop("model.zip"), "no training state"),
        (lambda files, state: files.pop("training_state.json"), "no training state"),
        (lambda files, state: files.update(more=b""), "no training state"),
        (lambda files, state: files.update({"training_state.bin": b""}), "buffer is smaller"),
        (lambda files, state: state.clear(), "KeyError: 'attributes'"),
        # The compiler would be this program
        (lambda files, state: state["attributes"].update(compile={"cpp.cxx": ["evil"]}), "must hold .* 'compile'"),
        (lambda files, state: state["attributes"].update(num_timesteps="x"), "num_timesteps must be of type int"),
        *(
            (lambda files, state, name=name, value=value: state["attributes"].update({name: value}), name)
            for name, value in {
                "num_timesteps": -(10**15),
                "_num_timesteps_at_start": 2**60,
                "_total_timesteps": 1e300,
                "_n_updates": True,
                "_n_iterations": -1,
                "_episode_num": None,
                "_current_progress_remaining": 1.5,
                "_log_interval": 0,
                "_last_episode_starts": [True, False],
                "_last_obs": array("|u1", [1, 3]),
                "_last_original_obs": "x",
                "_last_states": [1],
                "ep_info_buffer": {"$deque": [{"r": {"a": 1}}], "maxlen": 100},
                "ep_success_buffer": {"$deque": [], "maxlen": 10**9},
            }.items()
        ),
        (lambda files, state: state.update(seconds="x"), "seconds must be"),
        (lambda files, state: state.update(seconds=-1.0), "seconds must be"),
        (lambda files, state: state["logger"]["name_to_value"].update(a={}), "logger"),
        (lambda files, state: state["attributes"].update(_last_obs=array("|O", [1])), "dtypes without objects"),
        (lambda files, state: state["attributes"].update(_last_obs=array("<f4", [2**40])), "buffer is smaller"),
        (lambda files, state: state["attributes"].update(_last_obs=array("|S0", [2**36])), "no bytes"),
        (
            lambda files, state: state["attributes"].update(_last_obs=array("|u1", [2, 2], strides=[2**36, 1])),
            "with strides",
        ),
        (lambda files, state: state["generators"].update(torch=3), "TypeError"),
        (lambda files, state: state["env"]["attributes"].update(step=[1, 2]), "step is no state"),
        (lambda files, state: state["env"]["wrappers"][0]["$tuple"][1].update(step_wait=["plain", 1]), "is no state"),
        (
            lambda files, state: state["env"]["envs"][0]["layers"][0]["$tuple"][1].update(reset=["plain", 1]),
            "reset is no state",
        ),
    ],
)
def test_a_forged_checkpoint_is_one_clear_error(tmp_path, change, message):
    interrupted(tmp_path, env=VecMonitor(make_envs()))
    directory = rewritten(tmp_path, change)
    with pytest.raises(CheckpointError, match=f"{directory.name} .*{message}"):
        PPOPlus.resume(directory, VecMonitor(make_envs()), device="cpu", trusted=False)


FORGED_OBJECTS = pytest.mark.parametrize(
    "change, message",
    [
        (lambda files, state: innermost(state).update({"ToyEnv.step": ["plain", 1]}), r"ToyEnv\.step is no state"),
        (lambda files, state: innermost(state).update({"Env.spec": ["plain", 1]}), r"Env\.spec is no state"),
        (lambda files, state: innermost(state).update(step=["linked", [0]]), r"ToyEnv\.step is no state"),
        (lambda files, state: linked(state, ["list", [[0]]], ["tuple", [[1]]]), r"made_up\[0\] is part of itself"),
        (
            lambda files, state: linked(state, ["array", array("|u1", [8])], ["view", 0, "<f4", [2**40], [0], 0]),
            "a view of shape",
        ),
        (
            lambda files, state: linked(state, ["array", array("|u1", [8])], ["view", 0, "<f4", [2], [8], 0]),
            "strides is incompatible",
        ),
        (lambda files, state: linked(state, ["list", []], ["function", "print", {}]), "made_up is nothing"),
        (lambda files, state: linked(state, ["list", []], ["object", "Popen", {}]), "made_up is nothing"),
    ],
)


@FORGED_OBJECTS
def test_a_forged_object_is_one_clear_error_with_trust_too(tmp_path, change, message):
    interrupted(tmp_path)
    directory = rewritten(tmp_path, change)
    with pytest.raises(CheckpointError, match=f"{directory.name} .*{message}"):
        PPOPlus.resume(directory, make_envs(), device="cpu")


@FORGED_OBJECTS
def test_without_trust_forged_objects_are_not_even_read(tmp_path, change, message):
    interrupted(tmp_path)

    def only_objects(files, state):
        change(files, state)
        # A name of a method is an error, as above
        innermost(state).pop("step", None)
        # No byte may belong to two arrays, which is an error too
        for kind, *content in state["env"]["envs"][0].get("table", []):
            if kind == "array":
                content[0]["$array"]["shape"] = [0]

    envs = make_envs()
    with pytest.warns(UserWarning, match="were left out"):
        PPOPlus.resume(rewritten(tmp_path, only_objects), envs, device="cpu", trusted=False)
    assert not envs.has_attr("made_up")


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere"])
def test_without_trust_the_log_stays_inside_its_folder(tmp_path, name):
    interrupted(tmp_path)
    directory = rewritten(tmp_path, lambda files, state: state["attributes"].update(_tb_log_name=name))
    with pytest.raises(CheckpointError, match=f"_tb_log_name.*{name}"):
        PPOPlus.resume(directory, make_envs(), device="cpu", trusted=False)
    assert PPOPlus.resume(directory, make_envs(), device="cpu").num_timesteps == 48


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder", "holes", "link"])
@pytest.mark.parametrize("name", ["manifest.json", "model.zip", "training_state.json", "training_state.bin"])
def test_without_trust_only_regular_files_are_read(tmp_path, name, kind):
    interrupted(tmp_path)
    path = latest_checkpoint(tmp_path) / name
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        (tmp_path / "content").write_bytes(content)
        kind = tmp_path / "content"
    make_special_file(path, kind)
    with (
        pytest.warns(UserWarning, match=f"skipped an invalid checkpoint: .*{name}"),
        pytest.raises(CheckpointError, match="there is no valid checkpoint"),
    ):
        PPOPlus.resume(path.parent, make_envs(), device="cpu", trusted=False)


def test_without_trust_a_linked_checkpoint_is_passed_by_but_the_users_own_link_is_followed(tmp_path):
    interrupted(tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / checkpoint.name).symlink_to(checkpoint)
    with (
        pytest.warns(UserWarning, match="is a symbolic link"),
        pytest.raises(CheckpointError, match="there is no valid checkpoint"),
    ):
        PPOPlus.resume(tmp_path / "others", make_envs(), device="cpu", trusted=False)
    for given in (tmp_path / "others" / checkpoint.name, tmp_path / "link"):
        if given.name == "link":
            given.symlink_to(tmp_path / "run")
        assert PPOPlus.resume(given, make_envs(), device="cpu", trusted=False).num_timesteps == 48
    assert PPOPlus.resume(tmp_path / "others", make_envs(), device="cpu").num_timesteps == 48
