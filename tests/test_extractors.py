import math
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

from sb3_ppo_plus.envs.frames import check_frames
from sb3_ppo_plus.extractors import (
    FEATURES_EXTRACTORS,
    ImpalaCNN,
    MultiInputExtractor,
    TransformerExtractor,
    real_frames,
    resolve_features_extractor,
)

POOLINGS = ["mean", "last", "cls"]


class RandomEnv(gym.Env):
    """Observations drawn from its space (never zero), three-step episodes, actions of two."""

    def __init__(self, observation_space: spaces.Space):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 3, False, {}


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-1.0, 1.0, shape, np.float32)


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def transformer(space: spaces.Space, **kwargs) -> TransformerExtractor:
    th.manual_seed(0)
    return TransformerExtractor(space, **{"d_model": 16, "n_heads": 2, **kwargs})


def dict_space() -> spaces.Dict:
    return spaces.Dict({"history": box(5, 3), "image": image(3, 7, 7), "vector": box(4)})


DICT_EXTRACTORS = {
    "history": {"class": "transformer", "d_model": 16, "n_heads": 2},
    "image": {"class": ImpalaCNN, "features_dim": 24},
}


# --- Transformer: shapes, layout, positions, pooling


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("shape", "seq_len"), [((6, 3), None), ((6, 3), 6), ((18,), 6), ((3,), None), ((3,), 1)])
def test_transformer_maps_every_kind_of_observation_to_d_model_features(shape, seq_len, pooling):
    extractor = transformer(box(*shape), seq_len=seq_len, pooling=pooling)
    assert extractor.features_dim == 16
    assert extractor(th.randn(7, *shape)).shape == (7, 16)


def test_defaults_are_mean_pooling_64_features_4_heads_2_layers_no_dropout():
    extractor = TransformerExtractor(box(8))
    assert extractor.features_dim == 64
    assert extractor.pooling == "mean"
    assert len(extractor.blocks) == 2
    assert all(block.n_heads == 4 and block.dropout.p == 0.0 for block in extractor.blocks)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_flat_stack_and_the_sequence_in_it_give_equal_features(pooling):
    flat, sequence = transformer(box(18), seq_len=6, pooling=pooling), transformer(box(6, 3), pooling=pooling)
    frames = th.randn(4, 6, 3)
    th.testing.assert_close(flat(frames.reshape(4, 18)), sequence(frames), rtol=0, atol=0)


def test_tokens_are_the_frames_of_sb3s_vec_frame_stack_oldest_first():
    single = DummyVecEnv([lambda: RandomEnv(box(3))])
    stack = VecFrameStack(single, n_stack=4)
    extractor = transformer(stack.observation_space, seq_len=4)
    seen = []
    extractor.embedding.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    frames = []
    observation = stack.reset()
    for _ in range(3):
        frames.append(single.buf_obs[None][0].copy())
        extractor(th.as_tensor(observation))
        expected = np.concatenate([np.zeros((4 - len(frames), 3)), frames])
        np.testing.assert_array_equal(seen[-1][0].numpy(), expected)
        np.testing.assert_array_equal(real_frames(seen[-1])[0].numpy(), np.arange(4) >= 4 - len(frames))
        observation, *_ = stack.step(np.array([0]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_the_frames_matters(pooling):
    extractor = transformer(box(6, 3), pooling=pooling)
    frames = th.randn(4, 6, 3)
    swapped = frames[:, [1, 0, 2, 3, 4, 5]]  # the newest stays, so "last" sees only the positions
    assert (extractor(frames) - extractor(swapped)).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_without_positions_the_order_of_the_frames_is_invisible(pooling):
    extractor = transformer(box(6, 3), pooling=pooling)
    nn.init.zeros_(extractor.positions)
    frames = th.randn(4, 6, 3)
    th.testing.assert_close(extractor(frames), extractor(frames.flip(1)), rtol=0, atol=1e-5)


def all_tokens(extractor: TransformerExtractor, frames: th.Tensor) -> th.Tensor:
    """Every token after the final norm, from the blocks themselves."""
    tokens = extractor.embedding(frames) + extractor.positions
    if extractor.cls_token is not None:
        tokens = th.cat([tokens, extractor.cls_token.expand(len(frames), 1, -1)], dim=1)
    for block in extractor.blocks:
        tokens = block(tokens, None, only_last=False)
    return extractor.norm(tokens)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_reads_the_mean_of_the_frames_the_newest_frame_or_the_cls_token(pooling):
    extractor = transformer(box(6, 3), pooling=pooling)
    frames = th.randn(4, 6, 3)
    tokens = all_tokens(extractor, frames)
    expected = {"mean": tokens[:, :6].mean(1), "last": tokens[:, 5], "cls": tokens[:, -1]}[pooling]
    assert tokens.shape[1] == (7 if pooling == "cls" else 6)
    th.testing.assert_close(extractor(frames), expected, rtol=0, atol=1e-6)


def test_encoder_matches_torchs_pre_norm_gelu_encoder():
    extractor = transformer(box(6, 3), n_layers=2, d_feedforward=40)
    layer = nn.TransformerEncoderLayer(16, 2, 40, 0.0, "gelu", batch_first=True, norm_first=True)
    reference = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    pairs = {
        "self_attn.in_proj_": "query_key_value.",
        "self_attn.out_proj.": "attention_out.",
        "linear1.": "mlp_in.",
        "linear2.": "mlp_out.",
        "norm1.": "attention_norm.",
        "norm2.": "mlp_norm.",
    }
    state = {f"norm.{name}": value for name, value in extractor.norm.state_dict().items()}
    for index, block in enumerate(extractor.blocks):
        for theirs, ours in pairs.items():
            for kind in ("weight", "bias"):
                state[f"layers.{index}.{theirs}{kind}"] = block.state_dict()[f"{ours}{kind}"]
    reference.load_state_dict(state)
    frames = th.randn(5, 6, 3)
    frames[0, :4] = 0
    frames[1, :1] = 0
    is_real = real_frames(frames)
    encoded = reference(extractor.embedding(frames) + extractor.positions, src_key_padding_mask=~is_real)
    expected = th.stack([tokens[real].mean(0) for tokens, real in zip(encoded, is_real, strict=True)])
    th.testing.assert_close(extractor(frames), expected, rtol=0, atol=1e-5)


# --- Transformer: padding


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([0, 0, 3, 4], [False, False, True, True]),
        ([0, 2, 0, 4], [False, True, True, True]),  # a zero frame after a non-zero one is real
        ([1, 0, 0, 0], [True, True, True, True]),
        ([0, 0, 0, 0], [False, False, False, True]),  # the newest is always real
    ],
)
def test_only_leading_zero_frames_are_padding_and_never_the_newest(frames, expected):
    values = th.tensor(frames, dtype=th.float32)
    for frame in (th.stack([values, th.zeros(4)], dim=1), th.stack([th.zeros(4), -values], dim=1)):
        assert real_frames(frame[None])[0].tolist() == expected


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_frames_change_nothing(pooling):
    extractor = transformer(box(18), seq_len=6, pooling=pooling)
    frames = th.randn(4, 6, 3)
    frames[:, :3] = 0
    is_real = real_frames(frames)
    perturbed = frames.clone()
    perturbed[:, :3] = 100 * th.randn(4, 3, 3)
    th.testing.assert_close(extractor.encode(perturbed, is_real), extractor(frames.flatten(1)), rtol=0, atol=1e-6)
    assert (extractor(perturbed.flatten(1)) - extractor(frames.flatten(1))).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("n_real", [1, 2, 5])
def test_a_padded_stack_equals_the_shorter_sequence_at_the_same_positions(pooling, n_real):
    long, short = transformer(box(6, 3), pooling=pooling), transformer(box(n_real, 3), pooling=pooling)
    state = long.state_dict()
    short.load_state_dict({**state, "positions": state["positions"][-n_real:]})
    frames = th.randn(4, n_real, 3)
    padded = th.cat([th.zeros(4, 6 - n_real, 3), frames], dim=1)
    th.testing.assert_close(long(padded), short(frames), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_zero_frame_between_real_ones_and_a_zero_newest_frame_count(pooling):
    extractor = transformer(box(6, 3), pooling=pooling)
    frames = th.randn(4, 6, 3)
    for index in (3, 5):
        changed = frames.clone()
        changed[:, index] = 0
        hidden = real_frames(frames)
        hidden[:, index] = False
        assert (extractor(changed) - extractor.encode(changed, hidden)).abs().max() > 1e-3


def test_each_sample_of_a_batch_has_its_own_padding():
    extractor = transformer(box(6, 3))
    frames = th.randn(6, 6, 3)
    for sample in range(6):
        frames[sample, :sample] = 0
    one_by_one = th.cat([extractor(frame[None]) for frame in frames])
    th.testing.assert_close(extractor(frames), one_by_one, rtol=0, atol=1e-6)


def test_an_all_zero_observation_has_finite_features_and_gradients():
    extractor = transformer(box(6, 3))
    extractor(th.zeros(2, 6, 3)).sum().backward()
    assert all(th.isfinite(p.grad).all() for p in extractor.parameters())


# --- Transformer: rollout and update, gradients, compile, initialisation


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("d_model", [16, 64])
def test_rollout_and_update_compute_the_same_features(pooling, d_model):
    extractor = transformer(box(24), seq_len=8, pooling=pooling, d_model=d_model)
    frames = th.randn(64, 8, 3)
    frames[:20, :5] = 0
    observations = frames.flatten(1)
    extractor.eval()
    with th.no_grad():
        rollout = th.cat([extractor(part) for part in observations.split(8)])
    extractor.train()
    update = extractor(observations)
    assert update.requires_grad
    th.testing.assert_close(rollout, update, rtol=0, atol=2e-6)
    with th.no_grad():
        extractor.eval()
        assert (extractor(observations) - update).abs().max() < 1e-6


def test_dropout_acts_only_in_training():
    extractor = transformer(box(6, 3), dropout=0.5)
    frames = th.randn(4, 6, 3)
    assert not th.equal(extractor(frames), extractor(frames))
    extractor.eval()
    assert th.equal(extractor(frames), extractor(frames))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        *((partial(transformer, box(18), seq_len=6, pooling=pooling), (18,)) for pooling in POOLINGS),
        (partial(ImpalaCNN, image(3, 7, 7)), (3, 7, 7)),
        (partial(ImpalaCNN, image(4, 20, 13), features_dim=8, channels=(4, 8)), (4, 20, 13)),
    ],
)
def test_the_gradient_reaches_every_parameter(build, shape):
    extractor = build()
    (extractor(th.rand(8, *shape)) * th.randn(extractor.features_dim)).sum().backward()
    untouched = [name for name, p in extractor.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert untouched == []


@pytest.mark.parametrize("pooling", POOLINGS)
def test_traced_in_one_graph_gives_the_eager_features_and_gradients(pooling):
    extractor = transformer(box(18), seq_len=6, pooling=pooling)
    traced = th.compile(extractor, fullgraph=True, backend="aot_eager")
    frames = th.randn(8, 6, 3)
    frames[:4, :2] = 0
    observations, weights = frames.flatten(1), th.randn(16)
    expected = th.autograd.grad((extractor(observations) * weights).sum(), extractor.parameters())
    gradients = th.autograd.grad((traced(observations) * weights).sum(), extractor.parameters())
    th.testing.assert_close(traced(observations), extractor(observations), rtol=0, atol=1e-5)
    for ours, eager in zip(gradients, expected, strict=True):
        th.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_compiled_by_inductor_in_one_graph_equals_eager():
    extractor = transformer(box(18), seq_len=6, n_layers=1)
    frames = th.randn(8, 6, 3)
    frames[:4, :2] = 0
    with th.no_grad():
        compiled = th.compile(extractor, fullgraph=True)(frames.flatten(1))
        th.testing.assert_close(compiled, extractor(frames.flatten(1)), rtol=0, atol=1e-5)


def test_dict_extractor_traces_without_graph_breaks():
    extractor = MultiInputExtractor(dict_space(), extractors=DICT_EXTRACTORS)
    observations = {"history": th.randn(2, 5, 3), "image": th.rand(2, 3, 7, 7), "vector": th.randn(2, 4)}
    traced = th.compile(extractor, fullgraph=True, backend="eager")
    th.testing.assert_close(traced(observations), extractor(observations), rtol=0, atol=1e-6)


def ortho_init(extractor: BaseFeaturesExtractor) -> None:
    """SB3's orthogonal initialisation of a features extractor."""
    extractor.apply(partial(ActorCriticPolicy.init_weights, gain=math.sqrt(2)))


@pytest.mark.parametrize(("pooling", "ortho"), [("mean", True), ("mean", False), ("last", True), ("cls", True)])
def test_transformer_learns_the_difference_of_the_two_newest_frames(pooling, ortho):
    extractor = transformer(box(4), seq_len=4, pooling=pooling, d_model=32, n_layers=1)
    if ortho:
        ortho_init(extractor)
    head = nn.Linear(32, 1)
    optimizer = th.optim.Adam([*extractor.parameters(), *head.parameters()], lr=5e-3)
    for _ in range(200):
        frames = th.randn(64, 4)
        loss = (head(extractor(frames)).squeeze(1) - (frames[:, 3] - frames[:, 2])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frames = th.randn(1024, 4)
    error = (head(extractor(frames)).squeeze(1) - (frames[:, 3] - frames[:, 2])).square().mean()
    assert error < 0.3  # the target's variance is 2; without positions, 2/3 is the best possible


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


# --- ImpalaCNN


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


# --- Dict observations


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


# --- With SB3's PPO


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


# --- Names and errors


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


# --- The order of VecFrameStack and VecNormalize


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
