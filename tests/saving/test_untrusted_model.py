"""Loading without trust gives the model that loading with trust gives, or names what the file lacks."""

import dataclasses
import io
import json
import runpy
import zipfile

import models
import numpy as np
import pytest
import torch as th
from environments import BOX, CHANNEL_FIRST, SMALL_DICT, SMALL_NET, ToyEnv, make_env
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from states import assert_same_training

from sb3_ppo_plus import (
    Cosine,
    Exponential,
    ImpalaCNN,
    Linear,
    MlpPolicy,
    PPOPlus,
    PPOPlusRolloutBuffer,
    UntrustedFileError,
    WarmupCosine,
    buffers,
)

SETTINGS = models.SETTINGS | {"seed": 3, "policy_kwargs": SMALL_NET}


class OwnPolicy(MlpPolicy):
    pass


class OwnSB3Policy(ActorCriticPolicy):
    pass


class OwnExtractor(FlattenExtractor):
    pass


class OwnActivation(th.nn.Softplus):
    pass


class OwnOptimizer(th.optim.Adam):
    pass


class OwnBuffer(PPOPlusRolloutBuffer):
    pass


@dataclasses.dataclass(frozen=True)
class OwnSchedule:
    start: float

    def __call__(self, progress_remaining):
        return self.start * progress_remaining


def build(policy="MlpPolicy", observation_space=BOX, action_space=None, n_envs=1, **settings):
    env_kwargs = {"observation_space": observation_space}
    if action_space is not None:
        env_kwargs["action_space"] = action_space
    return PPOPlus(policy, make_env(n_envs, **env_kwargs), **SETTINGS | settings), lambda: make_env(
        n_envs, **env_kwargs
    )


def saved(model):
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


MODELS = {
    "defaults": {},
    "discrete": {"action_space": spaces.Discrete(3), "target_kl": 0.1},
    "multi_discrete": {"action_space": spaces.MultiDiscrete([3, 2])},
    "multi_binary": {"action_space": spaces.MultiBinary(3)},
    "dict": {"policy": "MultiInputPolicy", "observation_space": SMALL_DICT},
    "combined": {
        "policy": "MultiInputPolicy",
        "observation_space": spaces.Dict({"image": CHANNEL_FIRST, "vector": BOX}),
        "n_steps": 8,
        "batch_size": 8,
        "policy_kwargs": {
            "features_extractor_class": "combined",
            "features_extractor_kwargs": {"extractors": {"image": {"class": ImpalaCNN, "channels": (4,)}}},
        },
    },
    "sb3's extractor": {
        "policy": "MultiInputPolicy",
        "observation_space": SMALL_DICT,
        "policy_kwargs": SMALL_NET | {"features_extractor_class": CombinedExtractor},
    },
    "images": {
        "policy": "CnnPolicy",
        "observation_space": CHANNEL_FIRST,
        "n_steps": 8,
        "batch_size": 8,
        "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}},
    },
    "transformer": {
        "policy_kwargs": SMALL_NET
        | {
            "features_extractor_class": "transformer",
            "features_extractor_kwargs": {"seq_len": 3, "d_model": 8, "n_heads": 2, "n_layers": 1},
        },
    },
    "gSDE": {"use_sde": True, "sde_sample_freq": 4, "policy_kwargs": SMALL_NET | {"squash_output": True}},
    "beta": {"policy_kwargs": SMALL_NET | {"action_dist": "beta", "action_dist_kwargs": {"deterministic": "mode"}}},
    "squashed": {"policy_kwargs": SMALL_NET | {"action_dist": "squashed_gaussian"}},
    "classes": {"policy_kwargs": SMALL_NET | {"activation_fn": th.nn.ReLU, "optimizer_class": th.optim.RMSprop}},
    "momentum": {
        "policy_kwargs": SMALL_NET | {"optimizer_class": "sgd", "optimizer_kwargs": {"momentum": 0.5}},
    },
    "amsgrad": {"policy_kwargs": SMALL_NET | {"optimizer_class": "adamw", "optimizer_kwargs": {"amsgrad": True}}},
    "critic": {"critic_learning_rate": "cos_1e-3"},
    "schedules": {
        "learning_rate": Linear(1e-3, 1e-4, 0.5),
        "clip_range": Cosine(0.2),
        "clip_range_vf": WarmupCosine(0.2),
        "ent_coef": Exponential(0.1, 0.01),
        "vf_coef": LinearSchedule(0.5, 0.1, 0.9),
    },
    "strings and numpy numbers": {"learning_rate": "warmup_cos_1e-3", "gamma": np.float32(0.5), "n_steps": np.int64(8)},
    "own terms": {"n_envs": 2, "normalize_advantage": False, "pessimistic_value_clip": False, "clip_range_vf": 0.2},
    "policy class": {"policy": MlpPolicy},
    "workers": {"worker_timeout": 60.5, "restart_workers": 3},
    "lstm": {"policy": "MlpLstmPolicy", "policy_kwargs": SMALL_NET | {"memory_kwargs": {"hidden_size": 8}}},
    "gtrxl": {
        "policy_kwargs": SMALL_NET
        | {"memory": "gtrxl", "memory_kwargs": {"hidden_size": 8, "memory_length": 4, "sequence_length": 8}}
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loaded_without_trust_equals_one_loaded_with_trust_and_trains_on_equally(name):
    model, env = build(**MODELS[name])
    file = saved(model.learn(2 * model.n_steps))
    careful = PPOPlus.load(file, env=env(), device="cpu", trusted=False)
    assert_same_training(PPOPlus.load(file, device="cpu"), careful)
    careful.learn(2 * model.n_steps, reset_num_timesteps=False)
    trusting = PPOPlus.load(file, env=env(), device="cpu").learn(2 * model.n_steps, reset_num_timesteps=False)
    assert_same_training(trusting, careful)
    with pytest.raises(AssertionError):
        assert_same_training(model, careful)


@pytest.mark.parametrize("name", ["defaults", "dict", "gSDE", "beta"])
def test_without_env_it_predicts_as_the_model_did(name):
    model, env = build(**MODELS[name])
    loaded = PPOPlus.load(saved(model), trusted=False, device="cpu")
    observations = env().reset()
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    assert loaded.observation_space == model.observation_space and loaded.action_space == model.action_space


def test_nothing_is_unpickled(monkeypatch):
    file = saved(build()[0].learn(32))

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("cloudpickle.loads", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    PPOPlus.load(file, trusted=False, device="cpu")
    with pytest.raises(AssertionError, match="unpickled"):
        PPOPlus.load(file, device="cpu")


def test_sb3_loads_a_zip_that_has_a_description(tmp_path):
    model, _ = build()
    model.learn(32).save(tmp_path / "plus")
    assert "ppo_plus.json" in zipfile.ZipFile(tmp_path / "plus.zip").namelist()
    loaded = PPO.load(tmp_path / "plus", device="cpu")
    ours = model.policy.state_dict()
    assert all(th.equal(value, ours[name]) for name, value in loaded.policy.state_dict().items())


def test_arguments_can_be_replaced_while_loading():
    model, _ = build(learning_rate=1e-3, ent_coef=0.1)
    loaded = PPOPlus.load(
        saved(model), trusted=False, custom_objects={"ent_coef": 0.2, "lr_schedule": None}, learning_rate="lin_1e-4"
    )
    assert loaded.learning_rate == "lin_1e-4" and loaded.ent_coef == 0.2
    assert loaded.gamma == model.gamma


def test_the_folder_of_logs_is_not_taken_from_the_file(tmp_path):
    model, _ = build(tensorboard_log=str(tmp_path))
    assert PPOPlus.load(saved(model), trusted=False).tensorboard_log is None


def test_an_env_of_other_spaces_is_refused():
    file = saved(build()[0])
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        PPOPlus.load(file, env=build(observation_space=spaces.Box(-1, 1, (4,)))[0].env, trusted=False)


# What has no plain description


def local_schedule():
    return lambda progress: 1e-3 * progress


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rate": local_schedule()}, "learning_rate is 'the function local_schedule.<locals>.<lambda>"),
        ({"clip_range": np.cos}, "clip_range"),
        (
            {"policy_kwargs": SMALL_NET | {"activation_fn": type("Local", (th.nn.Tanh,), {})}},
            "policy_kwargs.activation_",
        ),
        (
            {"policy_kwargs": SMALL_NET | {"optimizer_kwargs": {"betas": (0.9, local_schedule)}}},
            "optimizer_kwargs.betas",
        ),
        ({"policy": type("Local", (MlpPolicy,), {"__qualname__": "f.<locals>.Local"})}, "policy is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_without_a_plain_description_is_saved_and_named_by_loading_without_trust(settings, named):
    if "optimizer_kwargs" in str(settings):
        # Set afterwards, since Adam would refuse it
        model, _ = build()
        model.policy_kwargs = settings["policy_kwargs"]
    else:
        model, _ = build(**settings)
    file = saved(model)
    with pytest.raises(UntrustedFileError, match=named):
        PPOPlus.load(file, trusted=False)


def test_a_space_of_the_users_own_class_is_named():
    class Own(spaces.Box):
        pass

    with pytest.raises(UntrustedFileError, match=r"observation_space is .*Own"):
        PPOPlus.load(saved(build(observation_space=Own(-1, 1, (3,)))[0]), trusted=False)


def test_a_value_without_a_plain_description_may_be_given_while_loading():
    model, _ = build(learning_rate=local_schedule())
    assert PPOPlus.load(saved(model), trusted=False, learning_rate=1e-4).learning_rate == 1e-4


def test_options_of_the_compiler_are_not_taken_from_a_file():
    file = saved(build(compile={"cpp.cxx": ("/tmp/evil",)})[0])
    with pytest.raises(UntrustedFileError, match="compile: options"):
        PPOPlus.load(file, trusted=False)
    assert PPOPlus.load(file, trusted=False, compile=False).compile is False


OWN = {
    "policy": (OwnPolicy, {"policy": OwnPolicy}),
    "SB3's policy": (OwnSB3Policy, {"policy": OwnSB3Policy}),
    "features extractor": (OwnExtractor, {"policy_kwargs": SMALL_NET | {"features_extractor_class": OwnExtractor}}),
    "activation": (OwnActivation, {"policy_kwargs": SMALL_NET | {"activation_fn": OwnActivation}}),
    "optimiser": (OwnOptimizer, {"policy_kwargs": SMALL_NET | {"optimizer_class": OwnOptimizer}}),
    "rollout buffer": (OwnBuffer, {"rollout_buffer_class": OwnBuffer}),
    "schedule": (OwnSchedule, {"ent_coef": OwnSchedule(0.1)}),
}


@pytest.mark.parametrize("name", OWN)
def test_own_classes_are_used_only_where_the_caller_allows_them(name):
    own, settings = OWN[name]
    model, env = build(**settings)
    file = saved(model.learn(32))
    with pytest.raises(UntrustedFileError, match=rf"the class '.*{own.__name__}', which is not one of"):
        PPOPlus.load(file, trusted=False)
    others = [cls for cls, _ in OWN.values() if cls is not own]
    with pytest.raises(UntrustedFileError, match=own.__name__):
        PPOPlus.load(file, trusted=False, allow=others)
    loaded = PPOPlus.load(file, env=env(), trusted=False, allow=[own], device="cpu")
    assert_same_training(model, loaded)


@pytest.mark.parametrize("value", [print, "OwnPolicy", th.optim, int, object(), Linear(1.0)])
def test_allow_takes_classes_of_the_known_kinds_only(value):
    with pytest.raises(TypeError, match="allow must hold subclasses of ActorCriticPolicy"):
        PPOPlus.load(saved(build()[0]), trusted=False, allow=[value])


def test_a_class_alone_in_place_of_a_list_is_an_error_that_says_so():
    with pytest.raises(TypeError, match=r"allow must be a list of classes.*write allow=\[OwnPolicy\]"):
        PPOPlus.load(saved(build()[0]), trusted=False, allow=OwnPolicy)


def test_a_class_of_the_same_name_in_another_module_is_given_as_an_argument():
    same_name = type("OwnExtractor", (OwnExtractor,), {"__module__": "elsewhere"})
    settings = OWN["features extractor"][1]
    model, _ = build(**settings)
    file = saved(model)
    with pytest.raises(UntrustedFileError, match=r"elsewhere\.OwnExtractor has another module.*policy_kwargs="):
        PPOPlus.load(file, trusted=False, allow=[same_name])
    replaced = {**settings["policy_kwargs"], "features_extractor_class": same_name}
    assert type(PPOPlus.load(file, trusted=False, policy_kwargs=replaced).policy.features_extractor) is same_name


def test_allow_is_refused_with_trust():
    with pytest.raises(ValueError, match="allow is for trusted=False"):
        PPOPlus.load(saved(build()[0]), allow=[OwnPolicy])


def test_subclasses_of_ppo_plus_describe_their_own_arguments():
    class Own(PPOPlus):
        def __init__(self, *args, my_number=1, **kwargs):
            self.my_number = my_number
            super().__init__(*args, **kwargs)

    file = saved(Own("MlpPolicy", make_env(), my_number=5, **SETTINGS))
    assert Own.load(file, trusted=False).my_number == 5
    with pytest.raises(UntrustedFileError, match=r"PPOPlus has no arguments .*my_number"):
        PPOPlus.load(file, trusted=False)


# SB3's own zips


def test_sb3s_zip_names_the_safe_route_and_that_route_unpickles_nothing(tmp_path, monkeypatch):
    sb3 = PPO("MlpPolicy", make_env(), **SETTINGS)
    sb3.learn(32).save(tmp_path / "sb3")
    with pytest.raises(UntrustedFileError, match=r"PPOPlus\(policy, env\)\.set_parameters\("):
        PPOPlus.load(tmp_path / "sb3", trusted=False)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("pickle.loads", "pickle.load", "cloudpickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    model, _ = build()
    model.set_parameters(tmp_path / "sb3", device="cpu")
    ours = model.policy.state_dict()
    assert all(th.equal(value, ours[name]) for name, value in sb3.policy.state_dict().items())


@pytest.mark.parametrize("exclude", [["learning_rate"], ["seed"]])
def test_what_was_not_saved_is_the_constructors_default(exclude):
    model, _ = build(learning_rate=0.1, seed=7)
    file = io.BytesIO()
    model.save(file, exclude=exclude)
    loaded = PPOPlus.load(file, trusted=False)
    assert (loaded.learning_rate == 3e-4) == (exclude == ["learning_rate"])
    assert (loaded.seed is None) == (exclude == ["seed"])


def test_the_description_is_plain_json():
    model, _ = build()
    with zipfile.ZipFile(saved(model)) as archive:
        description = json.loads(archive.read("ppo_plus.json"))
    assert description["arguments"]["n_steps"] == 32
    assert description["policy"] == {"$": "class", "name": "MlpPolicy"}


class MaskedEnv(ToyEnv):
    def action_masks(self):
        return np.array([True, False, True])


def test_a_model_that_was_built_for_masks_still_needs_them(tmp_path):
    env = make_vec_env(lambda: MaskedEnv(action_space=spaces.Discrete(3)), n_envs=2)
    model = PPOPlus("MlpPolicy", env, **SETTINGS)
    file = saved(model.learn(64))
    loaded = PPOPlus.load(file, env=env, trusted=False, device="cpu")
    assert_same_training(model, loaded)
    observations, masks = env.reset(), np.array([[False, True, False]] * 2)
    assert (loaded.predict(observations, action_masks=masks)[0] == 1).all()
    without_env = PPOPlus.load(file, trusted=False, device="cpu")
    assert (without_env.predict(observations, action_masks=masks)[0] == 1).all()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_rollout_buffers_that_a_file_may_name_are_four(monkeypatch):
    class Imported(RolloutBuffer):
        """Stands for whatever comes into that module."""

    monkeypatch.setattr(buffers, "Imported", Imported, raising=False)
    tables = runpy.run_module("sb3_ppo_plus.saving.model_description")
    assert tables["ROLLOUT_BUFFERS"] == {
        "RolloutBuffer": RolloutBuffer,
        "DictRolloutBuffer": DictRolloutBuffer,
        "PPOPlusRolloutBuffer": buffers.PPOPlusRolloutBuffer,
        "PPOPlusDictRolloutBuffer": buffers.PPOPlusDictRolloutBuffer,
    }
