import inspect
import warnings

import numpy as np
import pytest
from environments import BOX, SMALL_DICT, SMALL_NET, make_env
from gymnasium import spaces
from models import assert_refused

from sb3_ppo_plus import MlpPolicy, PPOPlus
from sb3_ppo_plus.argument_checks import integer_of_at_least, is_integer
from sb3_ppo_plus.saving.model_description import constructor_arguments

INTEGERS = ["n_steps", "batch_size", "n_epochs", "sde_sample_freq", "stats_window_size", "seed", "restart_workers"]
NUMBERS = ["gamma", "gae_lambda", "max_grad_norm", "target_kl", "worker_timeout"]
FLAGS = ["normalize_advantage", "use_sde", "pessimistic_value_clip"]
OTHERS = ["policy_kwargs", "rollout_buffer_kwargs", "rollout_buffer_class"]


def build(policy="MlpPolicy", env=None, **settings):
    return PPOPlus(policy, env or make_env(), **{"policy_kwargs": SMALL_NET, "n_steps": 64} | settings)


@pytest.mark.parametrize("value", [b"1", [1], object(), 1j])
@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS, *FLAGS, *OTHERS, "policy"])
def test_an_argument_of_another_type_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name} must be"):
        build(**{name: value})


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_a_bool_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        build(**{name: True})


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_a_string_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        build(**{name: "1"})


@pytest.mark.parametrize("name", INTEGERS)
def test_a_float_is_no_integer(name):
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        build(**{name: 64.0})


@pytest.mark.parametrize("value", [int, dict, PPOPlus])
def test_a_rollout_buffer_class_is_one(value):
    with pytest.raises(TypeError, match="rollout_buffer_class must be a subclass of RolloutBuffer"):
        build(rollout_buffer_class=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 0),
        ("n_epochs", -1),
        ("stats_window_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("gamma", 1.01),
        ("gamma", float("nan")),
        ("gae_lambda", -0.1),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", float("nan")),
        ("target_kl", 0),
        ("worker_timeout", 0),
        ("worker_timeout", float("nan")),
        ("worker_timeout", float("inf")),
        ("restart_workers", -1),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        build(**{name: value})


@pytest.mark.parametrize("name", ["n_steps", "batch_size"])
def test_without_normalisation_one_step_and_batch_size_one_are_allowed(name):
    settings = {"n_steps": 1, "batch_size": 1, "normalize_advantage": False}
    build(**settings).learn(1)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        build(**settings | {name: 0})


@pytest.mark.parametrize(
    "settings",
    [
        {"n_steps": np.int64(64), "gamma": np.float32(0.9), "seed": 1},
        {"gamma": 1, "gae_lambda": 0, "max_grad_norm": 0},
        {"worker_timeout": np.float32(0.5), "restart_workers": np.int64(2)},
        {"normalize_advantage": np.bool_(False), "batch_size": 16, "n_steps": 16},
    ],
)
def test_numbers_of_numpy_and_the_edges_of_a_range_are_taken(settings):
    build(**settings)


# Names that are not quite right


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("ent_coeff", "ent_coef"), ("n_step", "n_steps"), ("entropy_coef", "ent_coef"), ("Compile", "compile")],
)
def test_an_unknown_argument_gets_the_nearest_name(name, nearest):
    assert_refused(
        TypeError, f"PPOPlus() got an unexpected keyword argument '{name}'; did you mean '{nearest}'?", **{name: 1}
    )


@pytest.mark.parametrize("name", ["memory", "memory_kwargs", "action_dist", "features_extractor_class", "net_arch"])
@pytest.mark.parametrize("more", ["activation_fn", "optimizer_kwargs", "lstm_hidden_size"])
def test_an_argument_of_the_policy_is_sent_to_policy_kwargs(name, more):
    for each in (name, more):
        assert_refused(TypeError, f"'{each}'", f"give it in policy_kwargs={{'{each}': ...}}", **{each: 1})


def test_a_misspelt_argument_of_the_policy_is_sent_there_too():
    assert_refused(TypeError, "did you mean 'action_dist' in policy_kwargs?", action_distr="beta")


def test_an_argument_that_resembles_none_is_named():
    with pytest.raises(TypeError, match=r"PPOPlus\(\) got an unexpected keyword argument 'xyzzy'$"):
        build(xyzzy=1)


def test_the_signature_is_the_constructors_own():
    parameters = inspect.signature(PPOPlus).parameters
    assert all(each.kind is not each.VAR_KEYWORD for each in parameters.values())
    assert parameters["compile"].default is False


def test_a_subclass_passes_arguments_on_and_adds_its_own(tmp_path):
    class Adds(PPOPlus):
        def __init__(self, *args, bonus=1.0, **rest):
            self.bonus = bonus
            super().__init__(*args, **rest)

    env = make_env()
    model = Adds("MlpPolicy", env, bonus=2.0, n_steps=16, batch_size=16, policy_kwargs=SMALL_NET)
    assert model.bonus == 2.0 and model.n_steps == 16
    model.save(tmp_path / "model")
    assert Adds.load(tmp_path / "model", trusted=False, bonus=3.0).bonus == 3.0
    assert {"bonus", "compile", "n_steps"} < set(constructor_arguments(Adds))
    assert not {"args", "rest", "self"} & set(constructor_arguments(Adds))
    with pytest.raises(TypeError, match=r"Adds\(\) got an unexpected keyword argument 'gama'; did you mean 'gamma'"):
        Adds("MlpPolicy", env, gama=0.9)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ({"policy": "MLPPolicy"}, "MlpPolicy"),
        ({"policy": "MultiInputLSTMPolicy"}, "MultiInputLstmPolicy"),
        ({"policy_kwargs": {"features_extractor_class": "Transformers"}}, "transformer"),
        ({"policy_kwargs": {"features_extractor_class": "NatureCNN"}}, "nature_cnn"),
        ({"policy_kwargs": {"activation_fn": "LeakyReLU"}}, "leaky_relu"),
        ({"policy_kwargs": {"optimizer_class": "AdamW_"}}, "adamw"),
        ({"policy_kwargs": {"action_dist": "gausian"}}, "gaussian"),
        ({"policy_kwargs": {"action_dist": "Beta"}}, "beta"),
        ({"policy_kwargs": {"memory": "LSTM"}}, "lstm"),
        ({"policy_kwargs": {"memory": "gtr_xl"}}, "gtrxl"),
        ({"policy_kwargs": {"memory": "lstm", "memory_kwargs": {"hidden": 8}}}, "hidden_size"),
        ({"policy_kwargs": {"action_dist": "beta", "action_dist_kwargs": {"determinstic": "mode"}}}, "deterministic"),
        ({"policy_kwargs": {"net_arch": "Medium"}}, "medium"),
    ],
    ids=str,
)
def test_an_unknown_name_gets_the_nearest_one(arguments, nearest):
    given = str(next(iter(arguments.values())) if "policy" in arguments else "")
    assert_refused((ValueError, TypeError), given, f"; did you mean '{nearest}'?", **arguments)


def test_an_unknown_argument_of_the_policy_gets_the_nearest_name():
    message = "policy_kwargs: ActorCriticPlusPolicy has no argument 'net_archs'; did you mean 'net_arch'?"
    assert_refused(TypeError, message, policy_kwargs={"net_archs": [8]})


def test_a_policy_of_the_users_takes_arguments_of_its_own():
    class Own(MlpPolicy):
        def __init__(self, *args, **kwargs):
            self.temperature = kwargs.pop("temperature")
            super().__init__(*args, **kwargs)

    model = build(policy=Own, policy_kwargs=SMALL_NET | {"temperature": 2.0})
    assert model.policy.temperature == 2.0


def test_a_subclass_may_find_policies_in_its_own_way():
    class Own(PPOPlus):
        def _get_policy_from_name(self, policy_name):
            return MlpPolicy

    assert type(Own("whatever", make_env(), n_steps=64).policy) is MlpPolicy


@pytest.mark.parametrize("value", ["big", "64,64", ""])
def test_another_name_of_a_network_is_an_error_that_says_what_is_allowed(value):
    assert_refused(ValueError, "net_arch must be", "tiny", "medium", repr(value), policy_kwargs={"net_arch": value})


# A Transformer over one token


TRANSFORMER = {"features_extractor_class": "transformer"}
SMALL_TRANSFORMER = {"d_model": 8, "n_heads": 2, "n_layers": 1}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("policy", "space", "policy_kwargs"),
    [
        ("MlpPolicy", BOX, TRANSFORMER | {"features_extractor_kwargs": SMALL_TRANSFORMER}),
        (
            "MultiInputPolicy",
            SMALL_DICT,
            {
                "features_extractor_class": "combined",
                "features_extractor_kwargs": {"extractors": {"vector": {"class": "transformer", **SMALL_TRANSFORMER}}},
            },
        ),
    ],
    ids=["vector", "dict"],
)
def test_a_transformer_over_a_plain_vector_warns_once(policy, space, policy_kwargs, shared, tmp_path):
    env = make_env(observation_space=space)
    with pytest.warns(UserWarning, match="a single token, which leaves nothing to attend to") as warned:
        model = build(policy=policy, env=env, policy_kwargs={**policy_kwargs, "share_features_extractor": shared})
    assert len(warned) == 1
    model.learn(16).save(tmp_path / "model")
    with warnings.catch_warnings(action="error"):
        PPOPlus.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("space", "seq_len"), [(BOX, 3), (BOX, 1), (spaces.Box(-1, 1, (4, 3)), None), (spaces.Box(-1, 1, (1, 3)), None)]
)
def test_a_transformer_that_was_told_what_a_frame_is_does_not_warn(space, seq_len):
    policy_kwargs = TRANSFORMER | {"features_extractor_kwargs": {**SMALL_TRANSFORMER, "seq_len": seq_len}}
    with warnings.catch_warnings(action="error"):
        build(env=make_env(observation_space=space), policy_kwargs=policy_kwargs)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_python_and_numpy_become_ints(value):
    assert is_integer(value) and is_integer(value, 3) and not is_integer(value, 4)
    assert type(integer_of_at_least(3, "n", value)) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, "3", None, np.array(3), 2, np.int64(-3)])
def test_what_is_no_integer_or_is_too_small_is_named(value):
    with pytest.raises(ValueError, match="n must be an integer of at least 3, got "):
        integer_of_at_least(3, "n", value)


@pytest.mark.parametrize(
    ("name", "where"),
    [("n_timesteps", "argument of learn"), ("callback", "argument of learn"), ("n_envs", "RL Zoo's hyperparameter")],
)
def test_what_belongs_elsewhere_says_where(name, where):
    with pytest.raises(TypeError, match=where):
        PPOPlus("MlpPolicy", make_env(), **{name: 1})


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "CnnLstmPolicy"])
def test_dict_observations_need_the_policy_for_them_with_an_lstm_too(policy):
    with pytest.raises(ValueError, match="You must use `MultiInputLstmPolicy` when working with dict observation"):
        PPOPlus(policy, make_env(observation_space=SMALL_DICT))
