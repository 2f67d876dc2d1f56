"""Files of version 0.1 load, predict, train on and resume; and what is saved now has what version 0.1 reads."""

import base64
import hashlib
import io
import json
import pickle
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import pytest
import torch as th
from environments import make_env
from old_file_cases import (
    CASES,
    INTERRUPTED_AFTER,
    N_ENVS,
    N_STEPS,
    N_UPDATES,
    POLICY_FILES,
    SMALL,
    TOTAL_TIMESTEPS,
    cartpole,
    make_evaluation,
    make_run,
    make_run_env,
)
from old_files import (
    check_end_of_run,
    check_model,
    check_normalizers,
    check_policy_file,
    load_model,
    resume,
    write_checkpoint,
)
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from states import assert_same_bits, assert_same_training, state_of

from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus, TrainingCheckpoint, load_vec_normalize, save_vec_normalize

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
    # The old files were written with NumPy 1.26, so that every version since reads them
    pytest.mark.filterwarnings("ignore:numpy.core.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:what follows may differ in the last bits"),
]

ARCHIVE = Path(__file__).parents[1] / "data" / "version_0_1.tar.gz"
SHA256 = "e860a7f8fc134b635cc762ca39d0a10f930331941a81e45231ff852c9b53de87"
COMMIT = "2860725fb6ff85fefa227d344e5d0586b575bb80"
# Keys of later versions, which version 0.1 does not look for
PASSED_OVER = {"mean_return", "beside", "trainable"}
PASSED_OVER |= {"names", "class_names", "seeds", "table", "kwargs", "outside", "was_reset"}
CHECKPOINT = f"checkpoint_{INTERRUPTED_AFTER:06d}_{INTERRUPTED_AFTER * N_STEPS * N_ENVS}_steps"
# All classes of version 0.1 that a file may name
NAMES_IN_VERSION_0_1 = {
    "sb3_ppo_plus.buffers.PPOPlusDictRolloutBuffer",
    "sb3_ppo_plus.buffers.PPOPlusRolloutBuffer",
    "sb3_ppo_plus.extractors.ImpalaCNN",
    "sb3_ppo_plus.extractors.MultiInputExtractor",
    "sb3_ppo_plus.extractors.TransformerExtractor",
    "sb3_ppo_plus.policies.ActorCriticPlusCnnPolicy",
    "sb3_ppo_plus.policies.ActorCriticPlusPolicy",
    "sb3_ppo_plus.policies.CnnLstmPolicy",
    "sb3_ppo_plus.policies.MlpLstmPolicy",
    "sb3_ppo_plus.policies.MultiInputActorCriticPlusPolicy",
    "sb3_ppo_plus.policies.MultiInputLstmPolicy",
    "sb3_ppo_plus.schedules.Constant",
    "sb3_ppo_plus.schedules.Cosine",
    "sb3_ppo_plus.schedules.Exponential",
    "sb3_ppo_plus.schedules.Linear",
    "sb3_ppo_plus.schedules.WarmupCosine",
}


@pytest.fixture(scope="module")
def old_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "files"


def test_the_archive_is_the_one_that_version_0_1_has_written(old_files):
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == SHA256, f"{ARCHIVE} must never change"
    assert json.loads((old_files / "made_with.json").read_text())["commit"] == COMMIT


# Old files in new code


@pytest.mark.parametrize("name", CASES)
def test_an_old_model_predicts_and_trains_on_alike_with_trust_and_without(name, old_files):
    assert_same_training(*check_model(name, old_files))


@pytest.mark.parametrize("name", CASES)
def test_an_old_model_is_saved_again_with_all_its_arguments(name, old_files):
    for trusted in (True, False):
        assert description(saved(load_model(name, old_files, trusted))) == description(old_files / f"{name}.zip")


@pytest.mark.parametrize("name", POLICY_FILES)
def test_an_old_policy_predicts(name, old_files):
    check_policy_file(name, old_files)


def test_an_old_normaliser_loads_from_json_and_from_pickle(old_files):
    check_normalizers("gsde_with_vec_normalize", old_files)


def test_an_old_model_trains_on_as_sb3s_ppo_does_from_the_same_parameters(old_files):
    ours = load_model("defaults", old_files, trusted=True)
    sb3 = PPO("MlpPolicy", cartpole(), n_steps=N_STEPS, batch_size=16, n_epochs=2, policy_kwargs=SMALL, device="cpu")
    sb3.set_parameters(old_files / "defaults.zip", device="cpu")
    sb3._n_updates = ours._n_updates
    for model in (sb3, ours):
        set_random_seed(0)
        model.learn(2 * N_STEPS * N_ENVS)
    assert_same_training(sb3, ours)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The run of the old checkpoint, uninterrupted, with the present code."""
    folder = tmp_path_factory.mktemp("whole_run")
    model, evaluation = make_run(), make_evaluation()
    model.learn(TOTAL_TIMESTEPS, [evaluation, TrainingCheckpoint(1, folder, keep_last=N_UPDATES)])
    return model, evaluation, folder


def result_of(model, evaluation):
    return {**state_of_run(model), "evaluation": [evaluation.best_mean_reward, evaluation.last_mean_reward]}


def state_of_run(model):
    return {
        "state": state_of(model),
        "normalizer": [vars(model.env.obs_rms), vars(model.env.ret_rms), model.env.returns],
        "observations": model._last_obs,
        "points": model.env.get_attr("point"),
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
    }


def state_at_interruption(folder):
    return state_of_run(PPOPlus.resume(folder / CHECKPOINT, make_run_env(), device="cpu"))


@pytest.mark.parametrize("trusted", [True, False])
def test_a_run_that_was_interrupted_in_version_0_1_ends_as_if_it_had_not_been(trusted, old_files, whole_run):
    *whole, folder = whole_run
    resumed = resume(old_files / "run", trusted)
    for model, _ in (whole, resumed):
        check_end_of_run(model, old_files)
    # Where this processor rounds as the one on which the first half ran
    if have_same_bits(state_at_interruption(old_files / "run"), state_at_interruption(folder)):
        assert_same_bits(result_of(*resumed), result_of(*whole))


def have_same_bits(value, other):
    try:
        assert_same_bits(value, other)
    except AssertionError:
        return False
    return True


# New files in old code


@pytest.fixture(scope="module", params=CASES)
def new_model(request):
    model = CASES[request.param].make_model()
    return request.param, model.learn(N_STEPS * N_ENVS)


def test_a_new_model_is_described_as_version_0_1_described_it(new_model, old_files):
    name, model = new_model
    assert description(saved(model)) == description(old_files / f"{name}.zip")


def test_a_new_model_names_only_classes_that_version_0_1_has(new_model, old_files):
    name, model = new_model
    names = pickled_names(saved(model))
    assert names == pickled_names(old_files / f"{name}.zip")
    assert names <= NAMES_IN_VERSION_0_1


def test_a_new_model_holds_every_attribute_that_version_0_1_saved(new_model, old_files):
    name, model = new_model
    attributes_of_sb3 = data(saved(PPO("MlpPolicy", make_env(), device="cpu"))).keys()
    assert data(old_files / f"{name}.zip").keys() - attributes_of_sb3 <= data(saved(model)).keys()


def test_saving_leaves_the_policies_classes_as_they_were():
    model = CASES["defaults"].make_model()
    module = ActorCriticPlusPolicy.__module__
    saved(model)
    assert ActorCriticPlusPolicy.__module__ == module == "sb3_ppo_plus.policies.actor_critic"
    model.own = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle"):
        saved(model)
    assert ActorCriticPlusPolicy.__module__ == module


def test_a_class_of_ones_own_names_only_classes_that_version_0_1_has():
    class Own(ActorCriticPlusPolicy):
        pass

    model = PPOPlus(Own, cartpole(), n_steps=N_STEPS, policy_kwargs=SMALL, device="cpu")
    assert "sb3_ppo_plus.policies.ActorCriticPlusPolicy" in pickled_names(saved(model)) <= NAMES_IN_VERSION_0_1


@pytest.mark.parametrize("name", POLICY_FILES)
def test_a_new_policy_names_only_classes_that_version_0_1_has(name, tmp_path):
    CASES[name].make_model().policy.save(tmp_path / "policy.pth")
    unpickler = type("Unpickler", (NamesUnpickler,), {"names": set()})
    pickle_module = types.SimpleNamespace(__name__="pickle", Unpickler=unpickler)
    th.load(tmp_path / "policy.pth", weights_only=False, pickle_module=pickle_module)
    assert "collections.OrderedDict" in unpickler.names
    assert of_ours(unpickler.names) <= NAMES_IN_VERSION_0_1


def test_a_normaliser_is_written_as_version_0_1_wrote_it(old_files, tmp_path):
    env = load_vec_normalize(old_files / "vec_normalize.json", CASES["gsde_with_vec_normalize"].make_env())
    save_vec_normalize(env, tmp_path / "vec_normalize.json")
    assert (tmp_path / "vec_normalize.json").read_text() == (old_files / "vec_normalize.json").read_text()


def test_a_new_checkpoint_is_laid_out_as_version_0_1_laid_it_out(old_files, tmp_path):
    write_checkpoint(tmp_path)
    old, new = old_files / "run" / CHECKPOINT, tmp_path / CHECKPOINT
    # Version 0.1 passes over it
    names = {path.name for path in new.iterdir()} - {"vecnormalize.json"}
    assert names == {path.name for path in old.iterdir()}
    manifest, state = (
        keys_in(json.loads((new / file).read_text())) for file in ("manifest.json", "training_state.json")
    )
    assert manifest == keys_in(json.loads((old / "manifest.json").read_text()))
    assert state == keys_in(json.loads((old / "training_state.json").read_text()))
    assert description(new / "model.zip") == description(old / "model.zip")
    assert pickled_names(new / "model.zip") == pickled_names(old / "model.zip")


def saved(model):
    file = io.BytesIO()
    model.save(file)
    return file


def description(file):
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("ppo_plus.json"))


def data(file):
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("data"))


class NamesUnpickler(pickle.Unpickler):
    """Collects the names by which a pickle finds classes and functions."""

    names: set[str]

    def find_class(self, module, name):
        self.names.add(f"{module}.{name}")
        return super().find_class(module, name)


def pickled_names(file):
    """The names of ours in the pickles that SB3 puts into a model's JSON."""
    unpickler = type("Unpickler", (NamesUnpickler,), {"names": set()})
    for item in data(file).values():
        if isinstance(item, dict) and ":serialized:" in item:
            unpickler(io.BytesIO(base64.b64decode(item[":serialized:"]))).load()
    return of_ours(unpickler.names)


def of_ours(names):
    return {name for name in names if name.startswith("sb3_ppo_plus.")}


def keys_in(value):
    """The keys of a JSON value, and of all that is in it, but for those that version 0.1 passes over."""
    if isinstance(value, dict):
        return {key: keys_in(item) for key, item in value.items() if key not in PASSED_OVER}
    return [keys_in(item) for item in value] if isinstance(value, list) else None
