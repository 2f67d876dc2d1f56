"""LSTM, GRU and GTrXL compute one function of the episode, step by step and in sequences."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_ppo_plus.policies.gtrxl import GRUGate, GTrXLMemory, by_key, sinusoidal_encoding, steps_before, visible_keys
from sb3_ppo_plus.policies.memory import GRUMemory, LSTMMemory, reset
from sb3_ppo_plus.policies.recurrences import Recurrence, _run_segments
from sb3_ppo_plus.policies.rounding import may_round
from sb3_ppo_plus.policies.segments import Segments

FEATURES = 5
MAKE = {
    "lstm": lambda: LSTMMemory(FEATURES, 8),
    "lstm, 2 layers, no bias": lambda: LSTMMemory(FEATURES, 8, 2, bias=False),
    "gru": lambda: GRUMemory(FEATURES, 8),
    "gru, 2 layers, no bias": lambda: GRUMemory(FEATURES, 8, 2, bias=False),
    "gtrxl": lambda: GTrXLMemory(FEATURES, 8, 2, n_heads=2, memory_length=6),
    "gtrxl, long memory": lambda: GTrXLMemory(FEATURES, 8, 1, n_heads=1, memory_length=40),
    "gtrxl, memory of 1": lambda: GTrXLMemory(FEATURES, 8, 3, n_heads=4, memory_length=1),
}
KINDS = list(MAKE)


@pytest.fixture(params=KINDS)
def memory(request):
    th.manual_seed(0)
    return MAKE[request.param]()


def random_state(memory, n_envs):
    """A state after some steps, whose number differs from env to env."""
    state = memory.initial_state(n_envs)
    for step in range(5):
        starts = th.arange(n_envs) == step
        _, state = memory.step(th.randn(n_envs, FEATURES), state, starts)
    return tuple(part.detach() for part in state)


def step_by_step(memory, features, state, episode_starts):
    outputs = []
    for t in range(features.shape[1]):
        output, state = memory.step(features[:, t], state, episode_starts[:, t])
        outputs.append(output)
    return th.stack(outputs, dim=1), state


STARTS = {
    "none": lambda n, length: th.zeros(n, length, dtype=th.bool),
    "first step": lambda n, length: th.arange(length).expand(n, length) == 0,
    "every step": lambda n, length: th.ones(n, length, dtype=th.bool),
    "random": lambda n, length: th.rand(n, length) < 0.2,
}


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize(("n_sequences", "length"), [(1, 1), (1, 17), (4, 1), (4, 6), (3, 12), (5, 13)])
def test_a_sequence_equals_its_steps(memory, starts, n_sequences, length):
    features = th.randn(n_sequences, length, FEATURES)
    state, episode_starts = random_state(memory, n_sequences), STARTS[starts](n_sequences, length)
    expected, _ = step_by_step(memory, features, state, episode_starts)
    actual = memory.sequence(features, state, episode_starts)
    assert actual.shape == (n_sequences, length, memory.output_dim)
    th.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 5, 6, 12])
def test_a_sequence_may_be_cut_anywhere_and_continued_from_the_stored_state(memory, cut):
    features, episode_starts = th.randn(3, 13, FEATURES), th.rand(3, 13) < 0.1
    state = random_state(memory, 3)
    whole = memory.sequence(features, state, episode_starts)
    _, at_cut = step_by_step(memory, features[:, :cut], state, episode_starts[:, :cut])
    rest = memory.sequence(features[:, cut:], at_cut, episode_starts[:, cut:])
    th.testing.assert_close(rest, whole[:, cut:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 5, 9])
@pytest.mark.parametrize("perturbation", [1.0, 1e15])
def test_nothing_crosses_an_episode_start(memory, start, perturbation):
    """The previous episode changes no output, and gets no gradient."""
    features, state = th.randn(2, 12, FEATURES), random_state(memory, 2)
    episode_starts = th.zeros(2, 12, dtype=th.bool)
    episode_starts[0, start] = True

    def outputs_and_gradients(features, state):
        features = features.clone().requires_grad_()
        state = tuple(part.clone().requires_grad_() for part in state)
        output = memory.sequence(features, state, episode_starts)[0, start:]
        inputs = [features, *state, *memory.parameters()]
        gradients = th.autograd.grad((output**2).sum(), inputs, allow_unused=True)
        return output.detach(), gradients

    before, gradients = outputs_and_gradients(features, state)
    assert gradients[0][0, start:].abs().sum() > 0
    assert th.count_nonzero(gradients[0][0, :start]) == 0
    assert all(part is None or th.count_nonzero(part[:, 0]) == 0 for part in gradients[1 : len(state) + 1])

    perturbed = features.clone()
    perturbed[0, :start] += perturbation * th.randn(start, FEATURES)
    # GTrXL's number of remembered steps must stay a number of steps
    state_after = tuple(part + perturbation * (th.arange(2) == 0).view(1, 2, *[1] * (part.dim() - 2)) for part in state)
    after, gradients_after = outputs_and_gradients(perturbed, state_after)
    assert th.equal(after, before)
    for parameter, expected, actual in zip(
        memory.parameters(), gradients[len(state) + 1 :], gradients_after[len(state) + 1 :], strict=True
    ):
        assert th.equal(actual, expected), parameter.shape


def test_without_an_episode_start_the_past_is_remembered(memory):
    features, state = th.randn(1, 12, FEATURES), random_state(memory, 1)
    none = th.zeros(1, 12, dtype=th.bool)
    before = memory.sequence(features, state, none)
    perturbed = features.clone()
    perturbed[0, 3] += 1
    after = memory.sequence(perturbed, state, none)
    assert th.equal(after[0, :3], before[0, :3]), "the future changes nothing"
    assert not th.allclose(after[0, 4], before[0, 4], atol=1e-4)
    other_state = (th.randn_like(state[0]), *state[1:])
    assert not th.allclose(memory.sequence(features, other_state, none)[0, 0], before[0, 0], atol=1e-4)


def test_reset_is_exact_whatever_the_state_was(memory):
    state = tuple(th.full_like(part, th.nan) for part in memory.initial_state(3))
    starts = th.tensor([True, False, True])
    for was_reset, initial in zip(reset(state, starts), memory.initial_state(3), strict=True):
        assert th.equal(was_reset[:, starts], initial[:, starts])
        assert was_reset[:, ~starts].isnan().all()
    features = th.randn(3, FEATURES)
    outputs, new_state = memory.step(features, state, starts)
    expected, expected_state = memory.step(features, memory.initial_state(3), th.zeros(3, dtype=th.bool))
    assert th.equal(outputs[starts], expected[starts])
    for part, expected_part in zip(new_state, expected_state, strict=True):
        assert th.equal(part[:, starts], expected_part[:, starts])


def test_envs_do_not_see_each_other(memory):
    features, state, episode_starts = th.randn(6, 9, FEATURES), random_state(memory, 6), th.rand(6, 9) < 0.2
    outputs = memory.sequence(features, state, episode_starts)
    order = th.randperm(6)
    permuted = memory.sequence(features[order], tuple(part[:, order] for part in state), episode_starts[order])
    th.testing.assert_close(permuted, outputs[order], rtol=0, atol=1e-6)
    alone = memory.sequence(features[2:3], tuple(part[:, 2:3] for part in state), episode_starts[2:3])
    th.testing.assert_close(alone, outputs[2:3], rtol=0, atol=1e-6)


def test_padding_after_a_sequence_changes_no_earlier_output(memory):
    """Padding may therefore follow a shorter sequence."""
    features, state, episode_starts = th.randn(2, 9, FEATURES), random_state(memory, 2), th.rand(2, 9) < 0.2
    outputs = memory.sequence(features, state, episode_starts)
    longer = th.cat([features, th.full((2, 4, FEATURES), 1e3)], dim=1)
    more_starts = th.cat([episode_starts, th.rand(2, 4) < 0.5], dim=1)
    padded = memory.sequence(longer, state, more_starts)
    th.testing.assert_close(padded[:, :9], outputs, rtol=0, atol=1e-6)


def test_the_initial_state_is_zero_and_its_second_dimension_is_that_of_the_envs(memory):
    for part in memory.initial_state(3):
        assert part.shape[1] == 3
        assert th.count_nonzero(part) == 0


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_lstm_and_gru_equal_pytorchs(kind):
    memory = MAKE[f"{kind}, 2 layers, no bias"]()
    reference = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](FEATURES, 8, 2, bias=False)
    reference.load_state_dict(memory.state_dict())
    features, state = th.randn(3, 9, FEATURES), random_state(memory, 3)
    expected, _ = reference(features.transpose(0, 1), state if kind == "lstm" else state[0])
    actual = memory.sequence(features, state, th.zeros(3, 9, dtype=th.bool))
    th.testing.assert_close(actual, expected.transpose(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("length", [1, 7, 12])
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("gtrxl")])
def test_gradients_of_lstm_and_gru_equal_those_of_their_steps(kind, starts, length, in_graph):
    th.manual_seed(0)
    memory = MAKE[kind]()
    state = tuple(part.double() for part in random_state(memory, 3))
    memory, episode_starts = memory.double(), STARTS[starts](3, length)
    features = th.randn(3, length, FEATURES, dtype=th.float64, requires_grad=True)
    weights, inputs = th.randn(3, length, 8, dtype=th.float64), [features, *memory.parameters()]
    expected, _ = step_by_step(memory, features, state, episode_starts)
    with may_round() if in_graph else nullcontext():
        actual = memory.sequence(features, state, episode_starts)
    th.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    of_steps, of_sequence = (th.autograd.grad((each * weights).sum(), inputs) for each in (expected, actual))
    for one, other in zip(of_steps, of_sequence, strict=True):
        th.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_kernels_are_told_whether_the_policy_trains(kind, training, monkeypatch):
    """On a GPU they differentiate only what was computed for training."""
    memory, told, kernel = MAKE[kind]().train(training), [], getattr(th, kind)

    def telling(*arguments):
        told.append(arguments[6])
        return kernel(*arguments)

    monkeypatch.setattr(th, kind, telling)
    weights = [getattr(memory, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    arguments = (th.randn(2, 5, FEATURES), memory.initial_state(2), th.zeros(2, 5, dtype=th.bool), weights)
    recurrence = Recurrence(memory.mode, 1, True, 0.0, memory.training)
    _run_segments(recurrence, *arguments, None)
    assert told == [training]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_hooks_of_the_memory_are_called(kind):
    memory, calls = MAKE[kind](), []
    arguments = (th.randn(2, 9, FEATURES), memory.initial_state(2), th.rand(2, 9) < 0.3)
    expected = memory.sequence(*arguments)
    memory.register_forward_hook(lambda *_: calls.append(1))
    th.testing.assert_close(memory.sequence(*arguments), expected, rtol=0, atol=1e-6)
    assert calls


def test_a_graph_refuses_dropout():
    memory = LSTMMemory(FEATURES, 8, 2, dropout=0.5)
    with may_round(), pytest.raises(RuntimeError, match="no dropout"):
        memory.sequence(th.randn(2, 9, FEATURES), memory.initial_state(2), th.zeros(2, 9, dtype=th.bool))


@pytest.mark.parametrize("p_start", [0.0, 0.05, 0.5, 1.0])
def test_segments_cover_every_step_once_and_buckets_every_segment(p_start):
    starts = np.random.default_rng(0).random((7, 33)) < p_start
    segments = Segments.between(starts)
    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(segments.starts, segments.lengths, strict=True)])
    assert np.array_equal(np.sort(covered), np.arange(starts.size))
    assert (np.diff(segments.lengths) <= 0).all()
    assert np.array_equal(segments.continues, ~starts.flatten()[segments.starts])
    in_buckets = [index for bucket in segments.buckets() for index in range(bucket.start, bucket.stop)]
    assert in_buckets == list(range(len(segments.starts)))


def test_forget_bias_is_added_to_the_forget_gates_only():
    th.manual_seed(0)
    plain = LSTMMemory(FEATURES, 8, 2)
    th.manual_seed(0)
    biased = LSTMMemory(FEATURES, 8, 2, forget_bias=1.0)
    for name, value in biased.state_dict().items():
        difference = value - plain.state_dict()[name]
        is_forget = (th.arange(32) // 8 == 1).float() if name.startswith("bias_hh") else th.zeros(())
        th.testing.assert_close(difference, is_forget.expand_as(difference))
    with pytest.raises(ValueError, match=r"forget_bias=1\.0 needs bias=True"):
        LSTMMemory(FEATURES, 8, bias=False, forget_bias=1.0)


# GTrXL's parts


def test_relative_scores_reach_the_key_at_their_distance():
    block_size, memory_length = 3, 4
    distance_scores = th.arange(block_size).view(-1, 1) * 100.0 + th.arange(memory_length + 1) + 1
    shifted = by_key(distance_scores)
    assert shifted.shape == (block_size, memory_length + block_size)
    for query in range(block_size):
        for key in range(memory_length + block_size):
            distance = query + memory_length - key
            expected = distance_scores[query, distance] if 0 <= distance <= memory_length else 0.0
            assert shifted[query, key] == expected


def test_steps_before_count_from_the_episode_start_or_the_memory():
    episode_starts = th.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    counted = steps_before(episode_starts, th.tensor([[3.0], [9.0], [0.0]]))
    assert counted.tolist() == [[3, 4, 0, 1, 2], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]


def test_a_step_sees_itself_and_its_episode_as_far_as_the_memory_reaches():
    visible = visible_keys(th.tensor([[[0, 1, 9]]]), memory_length=2)[0, 0]
    # The keys are two of the memory, then the block's own three
    assert visible.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_gtrxl_looks_back_as_far_as_its_memory_and_no_further():
    th.manual_seed(0)
    memory = GTrXLMemory(FEATURES, 8, 1, n_heads=2, memory_length=6)
    features, none = th.randn(1, 20, FEATURES), th.zeros(1, 20, dtype=th.bool)
    before = memory.sequence(features, memory.initial_state(1), none)
    features[0, 3] += 1
    changed = (memory.sequence(features, memory.initial_state(1), none) - before).abs().amax(dim=2)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_gtrxl_knows_the_order_of_what_it_remembers():
    th.manual_seed(0)
    memory = GTrXLMemory(FEATURES, 8, 1, n_heads=2, memory_length=6)
    features, none = th.randn(1, 4, FEATURES), th.zeros(1, 4, dtype=th.bool)
    swapped = features[:, [1, 0, 2, 3]]
    outputs = [memory.sequence(x, memory.initial_state(1), none)[0, 3] for x in (features, swapped)]
    assert not th.allclose(*outputs, atol=1e-4)


def test_the_gru_gate_equals_the_papers_formulas():
    th.manual_seed(0)
    gate = GRUGate(4, 2.0)
    x, y = th.randn(7, 4), th.randn(7, 4)
    w_r, w_z, w_g = gate.of_y.weight.chunk(3)
    u_r, u_z = gate.of_x.weight.chunk(2)
    r = th.sigmoid(y @ w_r.T + x @ u_r.T)
    z = th.sigmoid(y @ w_z.T + x @ u_z.T - 2.0)
    h = th.tanh(y @ w_g.T + (r * x) @ gate.of_reset_x.weight.T)
    th.testing.assert_close(gate(x, y), (1 - z) * x + z * h)
    th.testing.assert_close(GRUGate(4, 50.0)(x, y), x)


def test_positions_are_encoded_by_sines_and_cosines():
    encoding = sinusoidal_encoding(th.arange(5), 6)
    assert encoding.shape == (5, 6)
    assert encoding[0].tolist() == [0, 0, 0, 1, 1, 1]
    th.testing.assert_close(encoding[3, 1], th.sin(th.tensor(3 * 10_000 ** (-2 / 6))))


def test_the_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="a multiple of n_heads, got hidden_size=10 and n_heads=4"):
        GTrXLMemory(FEATURES, 10, n_heads=4)
