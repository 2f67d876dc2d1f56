"""Random arguments, spaces and files: each works, or fails with a clear error of a documented type.

Each test has a hundred examples or so, which never change. ``FUZZ_EXAMPLES=20000 pytest tests/saving/test_fuzzing.py``
draws 20,000 random examples for each test.
"""

import functools
import io
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from environments import SMALL_NET, make_env
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import (
    CheckpointError,
    PPOPlus,
    TrainingCheckpoint,
    UntrustedFileError,
    WrapperStackError,
    load_vec_normalize,
    make_schedule,
    save_vec_normalize,
)
from sb3_ppo_plus.resuming.checkpoint_directory import newest_checkpoint, read_checkpoint, write_checkpoint
from sb3_ppo_plus.saving.described_spaces import decode_space, encode_space
from sb3_ppo_plus.schedules import schedule_value
from sb3_ppo_plus.untrusted.strict_json import parse
from sb3_ppo_plus.zoo.enjoy import read_hyperparams

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
pytestmark = [
    pytest.mark.timeout(900 if EXAMPLES == 0 else 3600),
    # Allowed but odd values are warned of, such as a minibatch size that does not divide the rollout
    pytest.mark.filterwarnings("ignore"),
]


def fuzz(n_examples):
    return settings(
        max_examples=EXAMPLES or n_examples,
        derandomize=EXAMPLES == 0,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Constructor arguments

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, -(2**63), 1e-300, 1e300, -0.0, 0.5, np.inf, -np.inf, np.nan]),
    st.floats(-2, 2),
    st.sampled_from(
        ["", "auto", "beta", "bf16", "skip", "raise", "lin_1e-3", "cos_1e-3_0", "exp_1_2", "MlpPolicy", "\0"]
    ),
    st.text(max_size=4),
    st.lists(st.integers(-1, 3), max_size=2),
    st.dictionaries(st.sampled_from(["a", "net_arch", "extractors", "betas", "eps"]), st.integers(-1, 9), max_size=2),
    st.builds(object),
    st.sampled_from([int, PPOPlus, np.float32(0.5), np.int64(4), np.array([1.0]), lambda progress: progress, len]),
)
# Without n_steps, whose rollout buffer could fill the memory, and without devices and folders
ARGUMENTS = [
    *("policy", "learning_rate", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf"),
    *("normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "use_sde", "sde_sample_freq", "target_kl"),
    *("rollout_buffer_class", "rollout_buffer_kwargs", "stats_window_size", "policy_kwargs", "seed", "amp"),
    *("critic_learning_rate", "pessimistic_value_clip", "action_masking", "on_non_finite", "max_skipped"),
]
POLICY_KWARGS = [
    *("net_arch", "activation_fn", "ortho_init", "log_std_init", "squash_output", "features_extractor_class"),
    *("features_extractor_kwargs", "share_features_extractor", "optimizer_class", "optimizer_kwargs", "action_dist"),
    *("action_dist_kwargs", "full_std", "use_expln", "normalize_images", "unheard_of"),
]


def is_documented(error):
    """Whether an error has a message and a documented type. AssertionErrors are SB3's own."""
    return isinstance(error, ValueError | TypeError | AssertionError | FloatingPointError) and str(error)


def builds_or_says_why_not(arguments):
    arguments = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu"} | arguments
    try:
        model = PPOPlus(arguments.pop("policy", "MlpPolicy"), make_env(), **arguments)
    except Exception as error:
        assert is_documented(error), f"{type(error)}: {error}"
        return
    # Accepted arguments train, or training diverges with a clear error
    try:
        model.learn(8)
    except Exception as error:
        assert is_documented(error), f"{type(error)} in learn: {error}"


@fuzz(150)
@given(st.dictionaries(st.sampled_from(ARGUMENTS), JUNK, min_size=1, max_size=3))
def test_constructor_arguments_work_or_say_why_not(arguments):
    builds_or_says_why_not({"policy_kwargs": SMALL_NET} | arguments)


@fuzz(100)
@given(st.sampled_from(["n_steps", *ARGUMENTS]), JUNK)
def test_one_constructor_argument_works_or_says_why_not(name, value):
    if name == "n_steps" and isinstance(value, int) and value > 100:
        return
    builds_or_says_why_not({"policy_kwargs": SMALL_NET, name: value})


# Spaces

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NUMBERS = st.floats(allow_nan=False, width=32)


@st.composite
def boxes(draw):
    dtype = draw(st.sampled_from([np.float32, np.float64, np.uint8, np.int64, np.float16]))
    shape = draw(SHAPES)
    if not np.issubdtype(dtype, np.floating):
        low = draw(st.integers(0, 100))
        return spaces.Box(low, draw(st.integers(low, 255)), shape, dtype)
    low = np.asarray(draw(st.floats(-60000, 0, width=16)), dtype)
    high = np.asarray(draw(st.floats(0, 60000, width=16)), dtype)
    return spaces.Box(np.full(shape, low), np.full(shape, high), shape, dtype)


LEAVES = st.one_of(
    boxes(),
    st.builds(spaces.Discrete, st.integers(1, 10), start=st.integers(-5, 5)),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(spaces.MultiDiscrete),
    st.integers(1, 5).map(spaces.MultiBinary),
)
SPACES = st.recursive(
    LEAVES, lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3).map(spaces.Dict), max_leaves=4
)


@fuzz(150)
@given(SPACES)
def test_a_description_gives_its_space_back(space):
    described = parse(json.dumps(encode_space(space)).encode(), "text")
    assert decode_space(described, "space") == space


@fuzz(60)
@given(SPACES, LEAVES, st.sampled_from(["gaussian", "beta", "squashed_gaussian"]))
def test_models_of_any_spaces(observation_space, action_space, action_dist):
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    kwargs = SMALL_NET | ({"action_dist": action_dist} if isinstance(action_space, spaces.Box) else {})
    try:
        env = make_env(observation_space=observation_space, action_space=action_space)
    except Exception:
        # Gymnasium or SB3 refuses this space
        return
    try:
        PPOPlus(policy, env, n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=kwargs, device="cpu")
    except Exception as error:
        assert is_documented(error) or isinstance(error, NotImplementedError), f"{type(error)}: {error}"


# Schedules

SCHEDULE_TEXT = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"(lin_|cos_|warmup_cos_|exp_)?-?[0-9.e+-]{0,6}(_-?[0-9.e+-]{0,6})?", fullmatch=True),
    st.builds("{}_{}_{}".format, st.sampled_from(["lin", "cos", "exp", "warmup_cos"]), NUMBERS, NUMBERS),
)


@fuzz(500)
@given(SCHEDULE_TEXT, st.floats(0, 1))
def test_schedule_strings_are_read_or_refused(text, progress_remaining):
    try:
        schedule = make_schedule(text, "ent_coef")
    except ValueError as error:
        assert str(error).startswith("ent_coef")
        return
    assert 0 <= schedule_value(schedule, progress_remaining, "ent_coef") < np.inf


# Files


@functools.cache
def model_members():
    file = io.BytesIO()
    PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=SMALL_NET, device="cpu").learn(
        8
    ).save(file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@st.composite
def altered(draw, content):
    """Draw the content with some bytes replaced, a part cut out, or a part doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 4, 64, len(content)]))
        how = draw(st.sampled_from(["replace", "cut", "double"]))
        if how == "replace":
            new = draw(st.binary(min_size=1, max_size=8))
            content[start : start + len(new)] = new
        elif how == "cut":
            del content[start : start + length]
        elif len(content) < 2**20:
            content[start:start] = content[start : start + length]
    return bytes(content)


def loads_or_says_why_not(content):
    try:
        PPOPlus.load(io.BytesIO(content), trusted=False, device="cpu")
    except UntrustedFileError as error:
        assert str(error)


@fuzz(120)
@given(st.data())
def test_altered_bytes_of_a_model_are_loaded_or_refused(data):
    loads_or_says_why_not(data.draw(altered(zipped(model_members()))))


@fuzz(150)
@given(st.data())
def test_altered_members_of_a_model_are_loaded_or_refused(data):
    members = model_members()
    name = data.draw(st.sampled_from(["ppo_plus.json", "policy.pth", "policy.optimizer.pth"]))
    loads_or_says_why_not(zipped(members | {name: data.draw(altered(members[name]))}))


@fuzz(80)
@given(st.data())
def test_altered_tensors_of_a_model_are_loaded_or_refused(data):
    members = model_members()
    name = data.draw(st.sampled_from(["policy.pth", "policy.optimizer.pth"]))
    with zipfile.ZipFile(io.BytesIO(members[name])) as archive:
        inner = {each: archive.read(each) for each in archive.namelist()}
    changed = data.draw(st.sampled_from(["archive/data.pkl", "archive/data/0", "archive/version", "archive/byteorder"]))
    inner[changed] = data.draw(altered(inner[changed]))
    loads_or_says_why_not(zipped(members | {name: zipped(inner)}))


@pytest.fixture(scope="module")
def some_model():
    return PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, policy_kwargs=SMALL_NET, device="cpu")


@fuzz(100)
@given(st.data())
def test_altered_parameters_of_a_file_are_loaded_or_refused(some_model, data):
    members = model_members()
    name = data.draw(st.sampled_from(["policy.pth", "policy.optimizer.pth", None]))
    if name is None:
        content = data.draw(altered(zipped(members)))
    else:
        content = zipped(members | {name: data.draw(altered(members[name]))})
    try:
        some_model.set_parameters(io.BytesIO(content), device="cpu")
    except (ValueError, RuntimeError) as error:
        # PyTorch's own error for parameters of other shapes is a RuntimeError
        assert isinstance(error, UntrustedFileError) or "state_dict" in str(error) or "expected" in str(error)


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(-1e9, 1e9), st.text(max_size=5)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["$", "name", "a", "shape"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value, path=()):
    """Yield the paths of all values inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(value, path, new):
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = with_value(value[path[0]], path[1:], new)
    return copied


@fuzz(200)
@given(st.data())
def test_altered_values_of_a_description_are_loaded_or_refused(data):
    members = model_members()
    description = json.loads(members["ppo_plus.json"])
    path = data.draw(st.sampled_from(list(places(description))))
    changed = with_value(description, path, data.draw(PLAIN))
    loads_or_says_why_not(zipped(members | {"ppo_plus.json": json.dumps(changed)}))


@fuzz(100)
@given(st.data())
def test_altered_bytes_of_a_normaliser_are_loaded_or_refused(tmp_path, data):
    path = tmp_path / "plain.json"
    save_vec_normalize(VecNormalize(make_env()), path)
    path.write_bytes(data.draw(altered(path.read_bytes())))
    try:
        load_vec_normalize(path, make_env())
    except ValueError as error:
        assert str(error)


CONFIG = b"""!!python/object/apply:collections.OrderedDict
- - [env_wrapper, [gymnasium.wrappers.TimeLimit: {max_episode_steps: 5}]]
  - [frame_stack, 4]
  - [normalize, '{norm_obs: True}']
  - [env_kwargs, {a: &x [1, true], b: *x}]
"""


@fuzz(150)
@given(st.one_of(altered(CONFIG), st.binary(max_size=50), st.text(max_size=50).map(str.encode)))
def test_altered_bytes_of_a_config_are_read_or_refused(tmp_path, content):
    (tmp_path / "config.yml").write_bytes(content)
    try:
        hyperparams, _ = read_hyperparams(str(tmp_path))
    except UntrustedFileError as error:
        assert str(error)
        return
    assert set(hyperparams) <= {"normalize", "frame_stack", "env_kwargs", "env_wrapper", "vec_env_wrapper"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=SMALL_NET, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(8, TrainingCheckpoint(1, folder))
    return Path(model.last_checkpoint)


@fuzz(120)
@given(st.data())
def test_altered_bytes_of_a_checkpoint_are_refused(checkpoint, tmp_path, data):
    shutil.rmtree(tmp_path)
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    file = data.draw(st.sampled_from(sorted(path.name for path in checkpoint.iterdir())))
    content = (checkpoint / file).read_bytes()
    changed = data.draw(altered(content))
    (tmp_path / checkpoint.name / file).write_bytes(changed)
    if changed == content:
        return
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / checkpoint.name)
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="there is no valid checkpoint"):
        PPOPlus.resume(tmp_path, make_env())


@fuzz(60)
@given(st.data())
def test_altered_values_of_a_training_state_are_resumed_or_refused(checkpoint, tmp_path, data):
    files = dict(read_checkpoint(checkpoint).files)
    state = json.loads(files["training_state.json"])
    path = data.draw(st.sampled_from(list(places(state))))
    files["training_state.json"] = json.dumps(with_value(state, path, data.draw(PLAIN))).encode()
    shutil.rmtree(tmp_path)
    directory = write_checkpoint(tmp_path, files, 8)
    try:
        PPOPlus.resume(directory, make_env(), device="cpu", trusted=False)
    except (CheckpointError, WrapperStackError) as error:
        assert str(error)
