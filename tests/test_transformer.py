"""The Transformer: shapes, positions, pooling, padding, rollout and update."""

from functools import partial

import numpy as np
import pytest
import torch as th
from extractor_cases import POOLINGS, RandomEnv, box, image, ortho_init, transformer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from torch import nn

from sb3_ppo_plus.extractors import ImpalaCNN, TransformerExtractor, real_frames

# Shapes, layout, positions, pooling


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


# Padding


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


# Rollout and update, gradients, compile, initialisation


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
