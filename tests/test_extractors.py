import warnings

import numpy as np
import pytest
import torch as th
from extractor_cases import DICT_EXTRACTORS, POOLINGS, RandomEnv, box, dict_space, image, ortho_init, transformer
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

from sb3_ppo_plus.envs.frames import check_frames
from sb3_ppo_plus.extractors import (
    FEATURES_EXTRACTORS,
    ImpalaCNN,
    MultiInputExtractor,
    TransformerExtractor,
    resolve_features_extractor,
)


def test_dict_extractor_traces_without_graph_breaks():
    extractor = MultiInputExtractor(dict_space(), extractors=DICT_EXTRACTORS)
    observations = {"history": th.randn(2, 5, 3), "image": th.rand(2, 3, 7, 7), "vector": th.randn(2, 4)}
    traced = th.compile(extractor, fullgraph=True, backend="eager")
    th.testing.assert_close(traced(observations), extractor(observations), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 7, 7), (4, 84, 84)])
@pytest.mark.parametrize("ortho", [True, False])
def test_impala_features_start_at_the_scale_of_one(shape, ortho):
    th.manual_seed(0)
    extractor = ImpalaCNN(image(*shape))
    if ortho:
        ortho_init(extractor)
    with th.no_grad():
        rms = extractor(th.rand(4, *shape)).square().mean().sqrt()
    assert 0.01 < rms < 5.0


# ImpalaCNN


@pytest.mark.parametrize("shape", [(3, 7, 7), (1, 8, 19), (4, 84, 84), (12, 64, 9)])
def test_impala_takes_channel_first_images_of_any_size_from_7x7(shape):
    extractor = ImpalaCNN(image(*shape), features_dim=32)
    features = extractor(th.rand(2, *shape))
    assert features.shape == (2, 32)
    assert (features >= 0).all()


def test_impala_has_the_papers_15_convolutions_and_one_linear():
    convolutions = [m for m in ImpalaCNN(image(3, 64, 64)).modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [16] * 5 + [32] * 10
    assert all(m.kernel_size == (3, 3) and m.stride == (1, 1) for m in convolutions)
    assert ImpalaCNN(image(3, 64, 64)).linear[0].in_features == 32 * 8 * 8


def test_impala_takes_scaled_images_with_normalized_image():
    space = spaces.Box(0.0, 1.0, (3, 9, 9), np.float32)
    assert ImpalaCNN(space, normalized_image=True)(th.rand(2, 3, 9, 9)).shape == (2, 256)
    with pytest.raises(ValueError, match="normalized_image=True"):
        ImpalaCNN(space)


# Dict observations


def test_combined_without_extractors_equals_sb3s_bit_for_bit():
    space = spaces.Dict({"vector": box(4), "image": image(3, 64, 64), "code": spaces.Discrete(3)})
    built = []
    for extractor_class in (CombinedExtractor, MultiInputExtractor):
        th.manual_seed(3)
        built.append((extractor_class(space, cnn_output_dim=32), th.rand(3)))
    (theirs, their_noise), (ours, our_noise) = built
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(th.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert th.equal(our_noise, their_noise)
    assert ours.features_dim == theirs.features_dim
    observations = {"vector": th.randn(2, 4), "image": th.rand(2, 3, 64, 64), "code": th.eye(3)[:2]}
    assert th.equal(ours(observations), theirs(observations))


def test_ppo_with_combined_without_extractors_trains_to_sb3s_parameters():
    space = spaces.Dict({"vector": box(4), "other": box(2, 2)})
    parameters = []
    for extractor_class in (CombinedExtractor, MultiInputExtractor):
        env = RandomEnv(space)
        space.seed(0)
        kwargs = {"features_extractor_class": extractor_class}
        model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=8, n_epochs=2, policy_kwargs=kwargs, seed=0)
        parameters.append(model.learn(32).policy.parameters_to_vector())
    np.testing.assert_array_equal(*parameters)


def test_named_keys_get_their_extractor_and_the_others_sb3s_in_the_order_of_the_space():
    extractor = MultiInputExtractor(dict_space(), extractors=DICT_EXTRACTORS)
    assert list(extractor.extractors) == ["history", "image", "vector"]
    assert [type(m) for m in extractor.extractors.values()] == [TransformerExtractor, ImpalaCNN, nn.Flatten]
    observations = {"history": th.randn(2, 5, 3), "image": th.rand(2, 3, 7, 7), "vector": th.randn(2, 4)}
    features = extractor(observations)
    assert extractor.features_dim == 16 + 24 + 4
    parts = [extractor.extractors[key](observations[key]) for key in observations]
    assert th.equal(features, th.cat(parts, dim=1))


def test_every_key_may_be_named_by_name_or_class():
    space = spaces.Dict({"a": box(5, 3), "b": box(4)})
    extractor = MultiInputExtractor(space, extractors={"a": "transformer", "b": FlattenExtractor})
    assert extractor.features_dim == 64 + 4
    assert extractor({"a": th.randn(2, 5, 3), "b": th.randn(2, 4)}).shape == (2, 68)


def test_normalized_image_reaches_the_cnn_of_a_key():
    space = spaces.Dict({"image": spaces.Box(0.0, 1.0, (3, 9, 9), np.float32), "vector": box(2)})
    extractor = MultiInputExtractor(space, normalized_image=True, extractors={"image": "impala_cnn"})
    assert extractor.features_dim == 258


# With SB3's PPO


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("policy", "space", "n_stack", "extractor_class", "kwargs"),
    [
        ("MlpPolicy", box(3), 4, TransformerExtractor, {"seq_len": 4, "d_model": 16, "n_heads": 2}),
        ("MlpPolicy", box(4, 3), None, TransformerExtractor, {"pooling": "last", "n_layers": 1}),
        ("MlpPolicy", box(3), None, TransformerExtractor, {"pooling": "cls", "n_layers": 1}),
        ("CnnPolicy", image(3, 7, 7), None, ImpalaCNN, {"features_dim": 16}),
        ("CnnPolicy", image(7, 7, 3), None, ImpalaCNN, {"features_dim": 16}),
        ("MultiInputPolicy", dict_space(), None, MultiInputExtractor, {"extractors": DICT_EXTRACTORS}),
    ],
)
def test_sb3s_ppo_trains_every_extractor_shared_and_separate(policy, space, n_stack, extractor_class, kwargs, share):
    env = DummyVecEnv([lambda: RandomEnv(space)] * 2)
    policy_kwargs = {
        "features_extractor_class": extractor_class,
        "features_extractor_kwargs": kwargs,
        "share_features_extractor": share,
    }
    stacked = VecFrameStack(env, n_stack) if n_stack else env
    model = PPO(policy, stacked, n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=policy_kwargs, seed=0)
    assert (model.policy.pi_features_extractor is model.policy.vf_features_extractor) == share
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(16)
    after = dict(model.policy.named_parameters())
    assert all(th.isfinite(p).all() for p in after.values())
    assert [name for name in before if th.equal(before[name], after[name])] == []


@pytest.mark.parametrize("pooling", POOLINGS)
def test_before_the_first_step_the_log_ratio_is_zero(pooling):
    env = VecFrameStack(DummyVecEnv([lambda: RandomEnv(box(3))] * 2), 4)
    kwargs = {"seq_len": 4, "pooling": pooling}
    policy_kwargs = {"features_extractor_class": TransformerExtractor, "features_extractor_kwargs": kwargs}
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=1, policy_kwargs=policy_kwargs, seed=0)
    ratios = []
    model.train = lambda: ratios.append(_log_ratio(model))
    model.learn(64)
    assert ratios[0].abs().max() < 1e-5


def _log_ratio(model: PPO) -> th.Tensor:
    """Log-ratio of the whole rollout, as PPO.train computes it."""
    model.policy.set_training_mode(True)
    batch = next(model.rollout_buffer.get(None))
    _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
    return (log_prob - batch.old_log_prob).detach()


# Names and errors


def test_names_resolve_to_classes_and_classes_to_themselves():
    assert set(FEATURES_EXTRACTORS) == {"transformer", "impala_cnn", "nature_cnn", "flatten", "combined"}
    assert resolve_features_extractor("transformer") is TransformerExtractor
    assert resolve_features_extractor("nature_cnn") is NatureCNN
    assert resolve_features_extractor("flatten") is FlattenExtractor
    assert resolve_features_extractor("combined") is MultiInputExtractor
    assert resolve_features_extractor(ImpalaCNN) is ImpalaCNN
    with pytest.raises(ValueError, match=r"transformer, impala_cnn, nature_cnn, flatten, combined, got 'resnet'"):
        resolve_features_extractor("resnet")
    for value in (None, 3, nn.Flatten, FlattenExtractor(box(2))):
        with pytest.raises(TypeError, match="features_extractor_class"):
            resolve_features_extractor(value)


@pytest.mark.parametrize(
    ("space", "kwargs", "message"),
    [
        (box(10), {"seq_len": 4}, "seq_len must divide the observation's size 10, got 4"),
        (box(6, 3), {"seq_len": 3}, "seq_len must be None or 6.*got 3"),
        (box(12), {"seq_len": 0}, "seq_len .*at least 1, got 0"),
        (box(12), {"seq_len": 2.0}, r"seq_len .*integer.*got 2\.0"),
        (box(12), {"d_model": 30}, "d_model must be a multiple of n_heads, got d_model=30 and n_heads=4"),
        (box(12), {"d_model": -4}, "d_model .*got -4"),
        (box(12), {"n_heads": 0}, "n_heads .*got 0"),
        (box(12), {"n_layers": 0}, "n_layers .*got 0"),
        (box(12), {"n_layers": True}, "n_layers .*got True"),
        (box(12), {"d_feedforward": 0}, "d_feedforward .*got 0"),
        (box(12), {"pooling": "max"}, "pooling must be one of mean, last, cls, got 'max'"),
        (box(12), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
        (box(12), {"dropout": -0.1}, r"dropout .*got -0\.1"),
        (box(12), {"dropout": float("nan")}, "dropout .*got nan"),
        (box(2, 3, 4), {}, r"observation_space must be a Box .*\(2, 3, 4\)"),
        (spaces.Discrete(3), {}, r"observation_space must be a Box .*Discrete\(3\)"),
        (dict_space(), {}, "observation_space must be a Box .*Dict"),
    ],
)
def test_transformer_refuses_arguments_that_do_not_fit(space, kwargs, message):
    with pytest.raises(ValueError, match=message):
        TransformerExtractor(space, **kwargs)


@pytest.mark.parametrize(
    ("space", "kwargs", "message"),
    [
        (image(3, 6, 7), {}, r"observation_space .*7x7.*\(3, 6, 7\)"),
        (image(84, 84, 3), {}, r"channel-first .*\(84, 84, 3\)"),
        (box(3, 9, 9), {}, "observation_space must be an image"),
        (box(9), {"normalized_image": True}, "observation_space must be an image"),
        (image(3, 9, 9), {"features_dim": 0}, "features_dim .*got 0"),
        (image(3, 9, 9), {"channels": (16, 0)}, "channels .*got 0"),
        (image(3, 9, 9), {"channels": ()}, r"channels .*got \(\)"),
    ],
)
def test_impala_refuses_arguments_that_do_not_fit(space, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImpalaCNN(space, **kwargs)


@pytest.mark.parametrize(
    ("extractors", "error", "message"),
    [
        ({"sound": "transformer"}, ValueError, "extractors must name keys .*history, image, vector.*sound"),
        ({"history": "resnet"}, ValueError, "one of transformer.*got 'resnet'"),
        ({"history": {"d_model": 16}}, ValueError, r"extractors\['history'\] must have a 'class'"),
        ({"history": "combined"}, ValueError, r"extractors\['history'\] must be an extractor of one observation"),
        ({"history": 3}, TypeError, "got 3"),
        ({"image": "transformer"}, ValueError, "observation_space must be a Box"),
        ({"vector": "impala_cnn"}, ValueError, "observation_space must be an image"),
    ],
)
def test_multi_input_refuses_extractors_that_do_not_fit(extractors, error, message):
    with pytest.raises(error, match=message):
        MultiInputExtractor(dict_space(), extractors=extractors)


# The order of VecFrameStack and VecNormalize


def stacked_env() -> VecFrameStack:
    return VecFrameStack(DummyVecEnv([lambda: RandomEnv(box(3))]), 4)


@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor])
def test_normalising_a_frame_stack_warns(wrap):
    with pytest.warns(UserWarning, match=r"VecFrameStack\(VecNormalize\(env\)\)"):
        check_frames(wrap(VecNormalize(wrap(stacked_env()))), transformer(box(12), seq_len=4), is_new=True)


@pytest.mark.parametrize(
    "build",
    [
        stacked_env,
        lambda: VecFrameStack(VecNormalize(stacked_env().venv), 4),
        lambda: VecNormalize(stacked_env(), norm_obs=False),
        lambda: VecNormalize(stacked_env().venv),
        lambda: VecNormalize(VecFrameStack(VecNormalize(stacked_env().venv), 4), norm_obs=False),
    ],
)
def test_any_other_order_does_not_warn(build):
    env = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_frames(env, transformer(box(12), seq_len=4), is_new=True)
