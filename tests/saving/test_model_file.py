import copy
import inspect
import io
import json
import pickle
import zipfile

import cloudpickle
import numpy as np
import pytest
import torch as th
from environments import (
    ASYMMETRIC,
    IMAGE,
    SMALL_DICT,
    SMALL_NET,
    logs_of_updates,
    make_env,
)
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from states import assert_same_training
from trained_alike import SETTINGS

from sb3_ppo_plus import MlpPolicy, PPOPlus, make_schedule


class CustomPolicy(ActorCriticPolicy):
    pass


def has_moments(model):
    return any("exp_avg" in entries for entries in model.policy.optimizer.state_dict()["state"].values())


# From SB3's PPO, and back

MODELS = {
    "value clipping": {"clip_range_vf": 0.02, "learning_rate": 1e-2},
    "value clip schedule": {"clip_range_vf": lambda progress: 0.02, "learning_rate": 1e-2},
    "discrete": {"action_space": spaces.Discrete(3), "target_kl": 1e-3, "learning_rate": 1e-2},
    "multi_binary": {"action_space": spaces.MultiBinary(3), "ent_coef": 0.01},
    "dict": {"policy": "MultiInputPolicy", "observation_space": SMALL_DICT},
    "images": {
        "policy": "CnnPolicy",
        "observation_space": IMAGE,
        "n_steps": 8,
        "batch_size": 8,
        "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}},
    },
    "gSDE": {"use_sde": True, "sde_sample_freq": 4},
    "squashed gSDE": {"use_sde": True, "policy_kwargs": SMALL_NET | {"squash_output": True}},
    "schedules": {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0), "clip_range": lambda progress: 0.1 + progress / 10},
    "custom policy": {"policy": CustomPolicy},
    "rmsprop": {"policy_kwargs": SMALL_NET | {"optimizer_class": th.optim.RMSprop}},
    "separate extractors": {"policy_kwargs": SMALL_NET | {"share_features_extractor": False}},
}


def build(algorithm, settings, **more):
    settings = SETTINGS | {"policy": "MlpPolicy"} | copy.deepcopy(settings)
    env_kwargs = {key: settings.pop(key) for key in ("observation_space", "action_space") if key in settings}
    return algorithm(settings.pop("policy"), make_env(**env_kwargs), **settings, **more), lambda: make_env(**env_kwargs)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_model_of_sb3s_ppo_continues_exactly_as_in_sb3(settings, tmp_path):
    model, env = build(PPO, settings)
    model.learn(2 * model.n_steps)
    model.save(tmp_path / "sb3")
    continued = []
    for algorithm in (PPO, PPOPlus):
        loaded = algorithm.load(tmp_path / "sb3", env=env(), device="cpu")
        assert_same_training(model, loaded)
        loaded.learn(2 * model.n_steps, reset_num_timesteps=False)
        continued.append(loaded)
    assert_same_training(*continued)
    assert isinstance(continued[1], PPOPlus)
    with pytest.raises(AssertionError):
        assert_same_training(model, continued[1])


def test_sb3s_value_clipping_survives_saving_and_loading_again(tmp_path):
    model, env = build(PPO, MODELS["value clipping"])
    model.learn(2 * model.n_steps).save(tmp_path / "sb3")
    PPOPlus.load(tmp_path / "sb3", device="cpu").save(tmp_path / "plus")
    continued = [
        algorithm.load(tmp_path / name, env=env(), device="cpu").learn(2 * model.n_steps, reset_num_timesteps=False)
        for algorithm, name in ((PPO, "sb3"), (PPOPlus, "plus"))
    ]
    assert_same_training(*continued)
    assert continued[1].pessimistic_value_clip is False


def test_the_form_of_value_clipping_can_be_chosen_while_loading(tmp_path):
    build(PPO, MODELS["value clipping"])[0].save(tmp_path / "sb3")
    assert PPOPlus.load(tmp_path / "sb3", pessimistic_value_clip=True).pessimistic_value_clip is True
    build(PPOPlus, MODELS["value clipping"])[0].save(tmp_path / "plus")
    assert PPOPlus.load(tmp_path / "plus").pessimistic_value_clip is True
    assert PPOPlus.load(tmp_path / "plus", pessimistic_value_clip=False).pessimistic_value_clip is False


@pytest.mark.parametrize("settings", [MODELS[name] for name in ("value clipping", "discrete", "dict", "gSDE")], ids=str)
def test_parameters_of_a_zip_of_ours_go_into_sb3s_ppo(settings, tmp_path):
    model, _ = build(PPOPlus, settings)
    model.learn(2 * model.n_steps).save(tmp_path / "plus")
    sb3, _ = build(PPO, settings | {"seed": 9})
    sb3.set_parameters(tmp_path / "plus", device="cpu")
    theirs, ours = sb3.policy.state_dict(), model.policy.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(th.equal(theirs[name], ours[name]) for name in ours)
    assert has_moments(sb3)
    sb3.learn(sb3.n_steps)


def test_parameters_of_a_trained_ppo_plus_train_on_in_sb3_as_in_ours():
    ours, _ = build(PPOPlus, {})
    ours.learn(64)
    models = [build(algorithm, {"seed": 9})[0] for algorithm in (PPO, PPOPlus)]
    for model in models:
        model.set_parameters(copy.deepcopy(ours.get_parameters()), device="cpu")
        model.set_random_seed(1)
        model.learn(64)
    assert_same_training(*models)


# Our own models

EXTRAS = {
    "default": {},
    "gaussian": {"policy_kwargs": SMALL_NET | {"action_dist": "gaussian"}},
    "squashed_gaussian": {"policy_kwargs": SMALL_NET | {"action_dist": "squashed_gaussian"}},
    "beta": {"policy_kwargs": SMALL_NET | {"action_dist": "beta", "action_dist_kwargs": {"deterministic": "mode"}}},
    "names": {"policy_kwargs": SMALL_NET | {"activation_fn": "elu", "optimizer_class": "adamw"}},
    "transformer": {
        "policy_kwargs": {
            "features_extractor_class": "transformer",
            "features_extractor_kwargs": {"d_model": 8, "n_heads": 2, "n_layers": 1},
        }
    },
    "strings": {
        "learning_rate": "cos_1e-2",
        "clip_range": "lin_0.2",
        "clip_range_vf": "lin_0.2_0.1",
        "ent_coef": "lin_0.01",
        "vf_coef": make_schedule("exp_0.5_0.1"),
    },
    "critic": {"critic_learning_rate": "lin_1e-2", "learning_rate": 1e-3},
    "amp": {"amp": "bf16"},
    "workers": {"worker_timeout": 60.5, "restart_workers": 3},
    "sb3 value clip": {"clip_range_vf": 0.1, "pessimistic_value_clip": False},
}


@pytest.mark.parametrize("settings", EXTRAS.values(), ids=EXTRAS)
def test_a_saved_model_continues_as_one_that_was_never_saved(settings, tmp_path):
    model, env = build(PPOPlus, settings)
    model.learn(64)
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env=env(), device="cpu")
    # The critic's group gets its learning rate with the next update
    assert_same_training(model, loaded, learning_rates="critic_learning_rate" not in settings)
    model.set_env(env())
    logs = []
    for each in (model, loaded):
        each.set_random_seed(model.seed)
        logs.append(logs_of_updates(each, 64, reset_num_timesteps=False))
    assert_same_training(model, loaded)
    for before, after in zip(*logs, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            if name.startswith("train/"):
                assert after[name] == before[name], name


@pytest.mark.parametrize("settings", EXTRAS.values(), ids=EXTRAS)
def test_arguments_survive_saving_as_they_were_given(settings, tmp_path):
    model, _ = build(PPOPlus, settings)
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model")
    for name, value in settings.items():
        if name == "policy_kwargs":
            assert loaded.policy_kwargs == value
        elif name in ("clip_range", "clip_range_vf"):
            # SB3 turns these into schedules
            assert [getattr(loaded, name)(p) for p in (1.0, 0.5, 0.0)] == [
                make_schedule(value)(p) for p in (1.0, 0.5, 0.0)
            ]
        else:
            assert getattr(loaded, name) == value


def test_a_loaded_model_predicts_as_the_saved_one(tmp_path):
    observations = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    for settings in EXTRAS.values():
        model, _ = build(PPOPlus, settings)
        model.learn(32).save(tmp_path / "model")
        loaded = PPOPlus.load(tmp_path / "model", device="cpu")
        expected, _ = model.predict(observations, deterministic=True)
        assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)


def test_load_takes_changed_coefficients(tmp_path):
    model, env = build(PPOPlus, {})
    model.learn(32).save(tmp_path / "model")
    loaded = PPOPlus.load(
        tmp_path / "model",
        env=env(),
        device="cpu",
        ent_coef="lin_0.01",
        vf_coef=lambda progress: 0.25,
        learning_rate="1e-5",
        critic_learning_rate=2e-5,
        clip_range="lin_0.4",
        clip_range_vf="0.3",
    )
    (logs,) = logs_of_updates(loaded, 64)[-1:]
    assert logs["train/ent_coef"] == 0.0
    assert logs["train/vf_coef"] == 0.25
    assert logs["train/learning_rate"] == 1e-5
    assert logs["train/critic_learning_rate"] == 2e-5
    assert logs["train/clip_range"] == 0.0
    assert logs["train/clip_range_vf"] == 0.3
    assert loaded.ent_coef == "lin_0.01"


def test_load_refuses_unknown_keywords(tmp_path):
    model, env = build(PPOPlus, {})
    model.save(tmp_path / "model")
    with pytest.raises(TypeError, match=r"learning_rte.*allowed.*learning_rate"):
        PPOPlus.load(tmp_path / "model", env=env(), learning_rte=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [{"ent_coef": -1.0}, {"vf_coef": "linear_1"}, {"clip_range": float("nan")}, {"amp": "fp16"}],
    ids=str,
)
def test_load_checks_the_arguments_that_it_is_given(arguments, tmp_path):
    build(PPOPlus, {})[0].save(tmp_path / "model")
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PPOPlus.load(tmp_path / "model", device="cpu", **arguments)


def test_load_of_something_that_is_no_model_says_so_as_sb3_does(tmp_path):
    (tmp_path / "model.zip").write_text("no zip")
    for algorithm in (PPO, PPOPlus):
        with pytest.raises(ValueError, match="zip"):
            algorithm.load(tmp_path / "model.zip")
        with pytest.raises(FileNotFoundError):
            algorithm.load(tmp_path / "absent")


@pytest.mark.parametrize("algorithm", [PPO, PPOPlus])
def test_models_travel_through_paths_strings_and_open_files(algorithm, tmp_path):
    model, _ = build(algorithm, MODELS["value clipping"])
    buffer = io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    model.save(str(tmp_path / "model"))
    with open(tmp_path / "model.zip", "rb") as file:
        loaded = [PPOPlus.load(source) for source in (buffer, file, str(tmp_path / "model"), tmp_path / "model.zip")]
    for each in loaded:
        assert_same_training(model, each)
        assert each.pessimistic_value_clip is (algorithm is PPOPlus)


def test_what_is_derived_is_not_saved(tmp_path):
    model, _ = build(PPOPlus, {"amp": True, "critic_learning_rate": 1e-3})
    model.learn(32).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    arguments = inspect.signature(PPOPlus.__init__).parameters.values()
    ours = {argument.name for argument in arguments if argument.kind is inspect.Parameter.KEYWORD_ONLY}
    known = {"_built_for_masks", "_was_given_masks", "_skipped_steps", "_skipped_in_a_row"}
    assert set(data) - set(vars(build(PPO, {})[0])) == ours | known
    # The model is small, so larger attributes would be buffers or parameters
    assert max(len(json.dumps(value)) for value in data.values()) < 20_000


def test_critic_learning_rate_added_while_loading_keeps_the_moments_of_each_parameter(tmp_path):
    model, env = build(PPOPlus, {})
    model.learn(64).save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env=env(), device="cpu", critic_learning_rate=1e-2)
    assert_moments_equal(model, loaded)
    loaded.learn(32, reset_num_timesteps=False)


def test_critic_learning_rate_dropped_while_loading_keeps_the_moments_of_each_parameter(tmp_path):
    model, env = build(PPOPlus, {"critic_learning_rate": 1e-2})
    model.learn(64).save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env=env(), device="cpu", critic_learning_rate=None)
    assert_moments_equal(model, loaded)
    loaded.learn(32, reset_num_timesteps=False)


def moments(model):
    """Return Adam's moments by the name of the parameter."""
    state = model.policy.optimizer.state_dict()["state"]
    parameters = [parameter for group in model.policy.optimizer.param_groups for parameter in group["params"]]
    index = {id(parameter): i for i, parameter in enumerate(parameters)}
    return {name: state[index[id(parameter)]] for name, parameter in model.policy.named_parameters()}


def assert_moments_equal(first, second):
    expected, actual = moments(first), moments(second)
    for name, entries in expected.items():
        for key, value in entries.items():
            assert th.equal(actual[name][key], value), (name, key)


@pytest.mark.parametrize("critic_learning_rate", [None, 1e-2])
def test_saved_optimizer_states_are_in_sb3s_order(critic_learning_rate, tmp_path):
    model, _ = build(PPOPlus, {"critic_learning_rate": critic_learning_rate})
    model.learn(64).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        saved = th.load(io.BytesIO(archive.read("policy.optimizer.pth")), weights_only=True)
    assert [group["params"] for group in saved["param_groups"]] == [list(range(13))]
    by_name = moments(model)
    for index, (name, parameter) in enumerate(model.policy.named_parameters()):
        assert saved["state"][index]["exp_avg"].shape == parameter.shape
        assert th.equal(saved["state"][index]["exp_avg"], by_name[name]["exp_avg"]), name


def test_sb3s_model_takes_a_critic_learning_rate_and_goes_back(tmp_path):
    sb3, env = build(PPO, {})
    sb3.learn(64).save(tmp_path / "sb3")
    loaded = PPOPlus.load(tmp_path / "sb3", env=env(), device="cpu", critic_learning_rate=1e-2)
    assert_moments_equal(sb3, loaded)
    loaded.save(tmp_path / "plus")
    sb3.set_parameters(tmp_path / "plus", device="cpu")
    assert_moments_equal(loaded, sb3)
    # SB3 writes its one learning rate to its one group at the next update
    sb3.learn(32)


def test_vec_normalize_models_evaluate_alike_after_loading(tmp_path):
    env = VecNormalize(make_env(2))
    model = PPOPlus("MlpPolicy", env, **SETTINGS).learn(128)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "norm.pkl"))
    restored = VecNormalize.load(str(tmp_path / "norm.pkl"), make_env(2))
    loaded = PPOPlus.load(tmp_path / "model", env=restored, device="cpu")
    restored.training = restored.norm_reward = False
    restored.seed(0)
    first = evaluate_policy(loaded, restored, n_eval_episodes=4)
    restored.seed(0)
    assert evaluate_policy(model, restored, n_eval_episodes=4) == first


# Parameters


def test_set_parameters_is_the_inverse_of_get_parameters():
    for settings in ({}, {"critic_learning_rate": 1e-2}):
        first, second = (build(PPOPlus, settings | {"seed": seed})[0].learn(32) for seed in (0, 1))
        second.set_parameters(copy.deepcopy(first.get_parameters()), device="cpu")
        assert_same_training(first, second, learning_rates=not settings)


def test_set_parameters_refuses_what_does_not_match():
    model, _ = build(PPOPlus, {})
    parameters = model.get_parameters()
    with pytest.raises(ValueError, match="Names of parameters"):
        model.set_parameters({"policy": parameters["policy"]})
    model.set_parameters({"policy": parameters["policy"]}, exact_match=False)


@pytest.mark.parametrize("source", ["dict", "zip"])
def test_set_parameters_leaves_its_source_alone(source, tmp_path):
    model, _ = build(PPOPlus, {"critic_learning_rate": 1e-2})
    model.learn(32)
    model.save(tmp_path / "model")
    parameters = copy.deepcopy(model.get_parameters())
    kept = copy.deepcopy(parameters)
    other, _ = build(PPOPlus, {"critic_learning_rate": 1e-3})
    other.set_parameters(parameters if source == "dict" else tmp_path / "model", device="cpu")
    assert_moments_equal(model, other)
    assert parameters["policy.optimizer"]["param_groups"] == kept["policy.optimizer"]["param_groups"]


# Policies by themselves


@pytest.mark.parametrize(
    "settings", [EXTRAS[name] for name in ("gaussian", "squashed_gaussian", "beta", "names", "critic")]
)
@pytest.mark.parametrize("way", ["save", "deepcopy", "pickle", "cloudpickle"])
def test_a_copied_or_loaded_policy_works_without_its_model(way, settings, tmp_path):
    model, _ = build(PPOPlus, settings)
    model.learn(32)
    observations = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    if way == "save":
        model.policy.save(tmp_path / "policy.pth")
        policy = MlpPolicy.load(tmp_path / "policy.pth", device="cpu")
    elif way == "deepcopy":
        policy = copy.deepcopy(model.policy)
    else:
        pickler = pickle if way == "pickle" else cloudpickle
        policy = pickler.loads(pickler.dumps(model.policy))
    assert np.array_equal(policy.predict(observations, deterministic=True)[0], expected)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    model.learn(32)
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items()), "shares memory"
    sampled, _ = policy.predict(observations)
    assert all(ASYMMETRIC.contains(action) for action in sampled)
