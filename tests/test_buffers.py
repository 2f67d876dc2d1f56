import copy
import dataclasses

import numpy as np
import pytest
import torch as th
from environments import ACTION_SPACES, BOX, IMAGE, SMALL_DICT
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_ppo_plus import PPOPlusDictRolloutBuffer, PPOPlusRolloutBuffer, RolloutBatch
from sb3_ppo_plus.buffers import minibatches

SIZE, N_ENVS = 7, 3
TRANSITIONS = SIZE * N_ENVS
FIELDS = ("actions", "old_values", "old_log_prob", "advantages", "returns")


def fill(buffer, seed=0):
    """Fill with numbers that tell step, env and field apart."""
    rng = np.random.default_rng(seed)
    buffer.observation_space.seed(seed)
    buffer.action_space.seed(seed)
    buffer.reset()
    for _ in range(SIZE):
        samples = [buffer.observation_space.sample() for _ in range(N_ENVS)]
        if isinstance(buffer.observation_space, spaces.Dict):
            observation = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        else:
            observation = np.stack(samples)
        actions = np.stack([buffer.action_space.sample() for _ in range(N_ENVS)]).reshape(N_ENVS, -1)
        values, log_prob = th.as_tensor(rng.normal(size=(2, N_ENVS, 1)), dtype=th.float32)
        rewards = rng.normal(size=N_ENVS)
        buffer.add(observation, actions, rewards, rng.random(N_ENVS) < 0.2, values, log_prob.flatten())
    buffer.compute_returns_and_advantage(th.ones(N_ENVS), np.zeros(N_ENVS))
    return buffer


def make(buffer_class=PPOPlusRolloutBuffer, observation_space=BOX, action_space=ACTION_SPACES["box"]):
    spaces_ = copy.deepcopy(observation_space), copy.deepcopy(action_space)
    return buffer_class(SIZE, *spaces_, device="cpu", gamma=0.9, gae_lambda=0.8, n_envs=N_ENVS)


def batches_of(buffer, batch_size):
    return [minibatch.batch() for minibatch in minibatches(buffer, batch_size)]


def assert_same_observations(actual, expected):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        pairs = [(actual[key], expected[key]) for key in expected]
    else:
        pairs = [(actual, expected)]
    for ours, sb3s in pairs:
        assert ours.dtype == sb3s.dtype
        assert th.equal(ours, sb3s)


@pytest.mark.parametrize("batch_size", [4, 7, TRANSITIONS, 100])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
@pytest.mark.parametrize(
    "observation_space",
    [BOX, IMAGE, spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(4), spaces.MultiBinary(3), SMALL_DICT],
    ids=["float32", "image", "float64", "discrete", "multi_binary", "dict"],
)
def test_minibatches_are_those_of_sb3s_buffer_with_the_same_random_numbers(observation_space, action_space, batch_size):
    is_dict = isinstance(observation_space, spaces.Dict)
    sb3 = fill(make(DictRolloutBuffer if is_dict else RolloutBuffer, observation_space, action_space))
    ours = fill(make(PPOPlusDictRolloutBuffer if is_dict else PPOPlusRolloutBuffer, observation_space, action_space))
    np.random.seed(1)
    expected = [batch for _ in range(2) for batch in sb3.get(batch_size)]
    np.random.seed(1)
    actual = [batch for _ in range(2) for batch in batches_of(ours, batch_size)]
    assert len(actual) == len(expected)
    for batch, sb3s in zip(actual, expected, strict=True):
        assert_same_observations(batch.observations, sb3s.observations)
        for name in FIELDS:
            sb3s_field = getattr(sb3s, name)
            if name == "actions" and isinstance(action_space, spaces.Discrete):
                # As SB3's PPO.train hands them to the policy
                sb3s_field = sb3s_field.long().flatten()
            assert getattr(batch, name).dtype == sb3s_field.dtype, name
            assert th.equal(getattr(batch, name), sb3s_field), name
        assert batch.valid is None
        assert batch.context == {}


def test_every_transition_comes_once_per_pass_in_an_order_of_its_own():
    buffer = fill(make())
    orders = []
    for _ in range(2):
        batches = batches_of(buffer, 8)
        assert [len(batch.returns) for batch in batches] == [8, 8, 5]
        orders.append(th.cat([batch.old_values for batch in batches]))
    assert th.equal(orders[0].sort().values, buffer.rollout().old_values.sort().values)
    assert th.equal(orders[0].sort().values, orders[1].sort().values)
    assert not th.equal(*orders)


def test_fields_of_one_transition_stay_together():
    buffer = make()
    fill(buffer)
    whole = buffer.rollout()
    position = {value.item(): index for index, value in enumerate(whole.old_values)}
    for batch in batches_of(buffer, 4):
        indices = th.tensor([position[value.item()] for value in batch.old_values])
        assert_same_observations(batch.observations, whole.observations[indices])
        for name in FIELDS:
            assert th.equal(getattr(batch, name), getattr(whole, name)[indices]), name


def test_a_buffer_that_is_not_full_is_refused():
    buffer = make()
    buffer.reset()
    with pytest.raises(AssertionError, match="full"):
        batches_of(buffer, 4)


@pytest.mark.parametrize(
    ("buffer_class", "observation_space"),
    [(PPOPlusRolloutBuffer, BOX), (PPOPlusDictRolloutBuffer, SMALL_DICT)],
    ids=["box", "dict"],
)
def test_a_new_rollout_does_not_overwrite_the_previous_batch(buffer_class, observation_space):
    buffer = make(buffer_class, observation_space)
    first = fill(buffer, seed=0).rollout()
    kept = {name: getattr(first, name).clone() for name in FIELDS}
    second = fill(buffer, seed=1).rollout()
    fresh = fill(make(buffer_class, observation_space), seed=1).rollout()
    for name in FIELDS:
        assert th.equal(getattr(second, name), getattr(fresh, name)), name
        assert th.equal(getattr(first, name), kept[name]), f"{name} of the last rollout was overwritten"
    assert_same_observations(second.observations, fresh.observations)


def test_returns_that_are_computed_again_are_yielded():
    buffer = fill(make())
    before = buffer.rollout().returns.clone()
    buffer.rewards += 1.0
    buffer.compute_returns_and_advantage(th.ones(N_ENVS), np.zeros(N_ENVS))
    (batch,) = batches_of(buffer, TRANSITIONS)
    assert (batch.returns.sort().values > before.sort().values).all()


def test_sb3s_get_works_before_and_after_ours():
    expected = next(fill(make(RolloutBuffer)).get())
    buffer = fill(make())
    np.random.seed(0)
    before = next(buffer.get())
    batches_of(buffer, 4)
    np.random.seed(0)
    after = next(buffer.get())
    for first, second, sb3s in zip(before, after, expected, strict=True):
        assert th.equal(first, second)
        assert th.equal(first.flatten().sort().values, sb3s.flatten().sort().values)


def test_minibatches_of_another_buffer_come_from_its_own_get():
    class Reversed(RolloutBuffer):
        def get(self, batch_size=None):
            samples = next(super().get())
            assert batch_size == 4
            yield type(samples)(*(field.flip(0)[:batch_size] for field in samples))

    buffer = fill(make(Reversed, action_space=ACTION_SPACES["discrete"]))
    (batch,) = batches_of(buffer, 4)
    assert isinstance(batch, RolloutBatch)
    assert batch.actions.dtype == th.int64
    assert batch.actions.shape == (4,)


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_select_returns_the_transitions_asked_for(kind):
    observation_space = BOX if kind == "box" else SMALL_DICT
    rollout = fill(
        make(PPOPlusRolloutBuffer if kind == "box" else PPOPlusDictRolloutBuffer, observation_space)
    ).rollout()
    indices = th.tensor([5, 0, 5])
    selected = rollout.select(indices)
    for name in FIELDS:
        assert th.equal(getattr(selected, name), getattr(rollout, name)[indices])
    if kind == "box":
        assert th.equal(selected.observations, rollout.observations[indices])
    else:
        assert all(th.equal(selected.observations[key], obs[indices]) for key, obs in rollout.observations.items())


def fill_with_context(buffer):
    """Fill with a context that repeats the values and the first number of the observations."""
    buffer.reset()
    rng = np.random.default_rng(0)
    for _ in range(SIZE):
        observation = rng.normal(size=(N_ENVS, 3)).astype(np.float32)
        values = th.as_tensor(rng.normal(size=N_ENVS), dtype=th.float32)
        context = {"value": values, "is_positive": th.as_tensor(observation > 0)}
        zeros = np.zeros(N_ENVS)
        buffer.add(observation, np.zeros((N_ENVS, 2)), zeros, zeros, values, values, context)
    buffer.compute_returns_and_advantage(th.ones(N_ENVS), np.zeros(N_ENVS))
    return buffer


@pytest.mark.parametrize("is_ordered_by_sb3", [False, True])
def test_context_stays_with_its_transition(is_ordered_by_sb3):
    buffer = fill_with_context(make())
    if is_ordered_by_sb3:
        next(buffer.get())
    for batch in batches_of(buffer, 4):
        assert th.equal(batch.context["value"], batch.old_values)
        assert batch.context["is_positive"].dtype == th.bool
        assert th.equal(batch.context["is_positive"], batch.observations > 0)


def test_context_is_the_rollouts_own():
    buffer = fill_with_context(make())
    first = buffer.rollout().context["value"]
    kept = first.clone()
    fill_with_context(buffer)
    assert th.equal(first, kept)
    assert fill(buffer).rollout().context == {}


def test_select_keeps_what_is_valid():
    rollout = dataclasses.replace(fill(make()).rollout(), valid=th.arange(TRANSITIONS) % 2 == 0)
    assert rollout.select(th.tensor([3, 4])).valid.tolist() == [False, True]


def test_a_batch_cannot_be_changed_by_accident():
    batch = fill(make()).rollout()
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.returns = th.zeros(3)
