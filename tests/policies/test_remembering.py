"""Policies with a memory: their options, their equality with sb3-contrib's, and ``predict``."""

import copy

import models
import numpy as np
import pytest
import torch as th
from environments import BOX, CHANNEL_FIRST, DICT, SMALL_NET, make_env
from gymnasium import spaces
from models import build
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_ppo_plus import CnnPolicy, MlpLstmPolicy, MlpPolicy, MultiInputPolicy, PPOPlus
from sb3_ppo_plus.policies.remembering import MemoryOptions, resolve_sequence_length

MEMORIES = ["lstm", "gru", "gtrxl"]
SIZES = {"hidden_size": 8, "n_layers": 2}
SETTINGS = models.SETTINGS | {"n_steps": 16}
DISCRETE = spaces.Discrete(3)


def make(policy_class=MlpPolicy, observation_space=BOX, **kwargs):
    th.manual_seed(0)
    return policy_class(observation_space, DISCRETE, lambda progress: 1e-3, **SMALL_NET | kwargs)


def make_model(env=None, policy="MlpPolicy", **policy_kwargs):
    env = env or make_env(2, action_space=DISCRETE)
    return build(env, policy, SMALL_NET | policy_kwargs, **SETTINGS)


# Options


@pytest.mark.parametrize(
    ("policy_kwargs", "message"),
    [
        ({"memory": "rnn"}, r"memory must be None or one of \['gru', 'gtrxl', 'lstm'\], got 'rnn'"),
        ({"memory_kwargs": {"hidden_size": 8}}, "need a memory, got memory=None"),
        ({"memory": "lstm", "memory_kwargs": {"memory_length": 8}}, r"\['memory_length'\]; allowed for memory='lstm'"),
        ({"memory": "gtrxl", "memory_kwargs": {"bias": True}}, r"\['bias'\]; allowed for memory='gtrxl'"),
        ({"memory": "gru", "memory_kwargs": {"hidden_size": 0}}, "hidden_size must be an integer of at least 1, got 0"),
        ({"memory": "gru", "memory_kwargs": {"n_layers": True}}, "n_layers must be an integer of at least 1, got True"),
        ({"memory": "gru", "memory_kwargs": {"dropout": 1.0}}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"memory": "gru", "memory_kwargs": {"shared": "critic"}}, "shared must be True, False or 'actor'"),
        ({"memory": "gru", "memory_kwargs": {"critic": None}}, "critic must be True or False, got None"),
        ({"memory": "gru", "memory_kwargs": {"sequence_length": 0}}, "sequence_length must be None, -1 or an integer"),
        ({"memory": "gtrxl", "memory_kwargs": {"hidden_size": 10}}, "multiple of n_heads"),
        ({"memory": "gru", "lstm_hidden_size": 8}, r"\['lstm_hidden_size'\] need memory='lstm', got memory='gru'"),
        ({"memory": "lstm", "lstm_kwargs": {"proj_size": 2}}, r"memory_kwargs has \['proj_size'\]"),
        ({"memory": "lstm", "shared_lstm": True, "enable_critic_lstm": True}, "exclude each other"),
        ({"memory": "lstm", "memory_kwargs": {"shared": True}, "share_features_extractor": False}, "shared=True needs"),
    ],
)
def test_bad_options_are_value_errors_that_say_what_is_allowed(policy_kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**policy_kwargs)


@pytest.mark.parametrize(
    ("contrib", "ours"),
    [
        ({"lstm_hidden_size": 8, "n_lstm_layers": 2}, {"hidden_size": 8, "n_layers": 2}),
        ({"shared_lstm": True, "enable_critic_lstm": False}, {"shared": "actor"}),
        ({"enable_critic_lstm": False}, {"critic": False}),
        ({"lstm_kwargs": {"dropout": 0.1, "bias": False}}, {"dropout": 0.1, "bias": False}),
        ({"lstm_kwargs": None, "enable_critic_lstm": True}, {}),
    ],
)
def test_sb3_contribs_arguments_are_understood(contrib, ours):
    assert MemoryOptions.resolve("lstm", None, contrib) == MemoryOptions.resolve("lstm", ours, {})


def test_a_policy_class_without_a_memory_says_so():
    with pytest.raises(TypeError, match="CustomPolicy has no memory or memory_kwargs"):
        PPOPlus(
            type("CustomPolicy", (ActorCriticPolicy,), {}),
            make_env(),
            policy_kwargs={"memory": "lstm", "memory_kwargs": {"hidden_size": 4}},
        )


@pytest.mark.parametrize("memory", MEMORIES)
def test_sizes_may_be_integers_of_numpy(memory):
    sizes = {name: np.int64(size) for name, size in {**SIZES, "sequence_length": 4}.items()}
    options = MemoryOptions.resolve(memory, sizes, {})
    assert options == MemoryOptions.resolve(memory, {**SIZES, "sequence_length": 4}, {})
    assert {type(size) for size in (*options.sizes.values(), options.sequence_length)} == {int}
    make(memory=memory, memory_kwargs=sizes)


@pytest.mark.parametrize(
    ("given", "n_steps", "batch_size", "expected"),
    [(None, 128, 64, 64), (None, 32, 64, 32), (16, 128, 64, 16), (-1, 64, 64, 64), (-1, 32, 256, 32), (64, 64, 64, 64)],
)
def test_sequence_length_stands_for_a_number_of_steps(given, n_steps, batch_size, expected):
    assert resolve_sequence_length(given, n_steps, batch_size) == expected


@pytest.mark.parametrize(
    ("sequence_length", "message"),
    [
        (17, "at most n_steps=16 and batch_size=8, got 17"),
        (9, "batch_size=8, got 9"),
        (-1, "batch_size must be at least n_steps"),
    ],
)
def test_a_sequence_must_fit_into_rollout_and_minibatch(sequence_length, message):
    with pytest.raises(ValueError, match=message):
        PPOPlus(
            "MlpLstmPolicy",
            make_env(2),
            n_steps=16,
            batch_size=8,
            policy_kwargs={"memory_kwargs": {"sequence_length": sequence_length}},
        )


@pytest.mark.parametrize("memory", MEMORIES)
def test_constructor_parameters_rebuild_the_policy(memory, tmp_path):
    policy = make(memory=memory, memory_kwargs={**SIZES, "n_layers": 1, "critic": False, "sequence_length": 4})
    policy.save(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy")
    assert loaded.memory_options == policy.memory_options
    observations = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32)
    expected, state = policy.predict(observations, deterministic=True)
    actual, loaded_state = loaded.predict(observations, deterministic=True)
    assert np.array_equal(actual, expected)
    assert all(np.array_equal(*pair) for pair in zip(loaded_state, state, strict=True))


# Shared and separate memories


def gradient_names(policy, part):
    values, log_prob, _ = policy.evaluate_actions(th.randn(4, 3), th.zeros(4, dtype=th.long))
    policy.zero_grad()
    {"actor": log_prob, "critic": values}[part].sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().sum() > 0}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    ("kwargs", "actors", "critics"),
    [
        ({}, "{}_actor", "{}_critic"),
        ({"shared": True}, "{}_actor", "{}_actor"),
        ({"shared": "actor"}, "{}_actor", None),
        ({"critic": False}, "{}_actor", "critic"),
    ],
)
def test_actor_and_critic_train_the_memories_that_they_use(memory, kwargs, actors, critics):
    policy = make(memory=memory, memory_kwargs={"hidden_size": 8, **kwargs})
    heads = {"mlp_extractor", "action_net", "value_net"}
    assert gradient_names(policy, "actor") - heads == {actors.format(memory)}
    assert gradient_names(policy, "critic") - heads == ({critics.format(memory)} if critics else set())


@pytest.mark.parametrize("kwargs", [{}, {"shared": True}, {"critic": False}])
def test_values_and_distributions_computed_apart_equal_those_computed_together(kwargs):
    policy = make(memory="lstm", memory_kwargs={"hidden_size": 8, **kwargs})
    observations, states = th.randn(3, 3), policy.initial_states(3)
    for _ in range(3):
        context = {"states": states, "episode_starts": th.tensor([True, False, False])}
        actions, values, log_prob, states = policy.forward_step(observations, **context)
        assert th.equal(policy.predict_values(observations, **context), values)
        assert th.equal(policy.get_distribution(observations, **context).log_prob(actions), log_prob)


# Beside sb3-contrib

CONTRIB = {
    "default": {},
    "layers": {"n_lstm_layers": 2, "lstm_kwargs": {"bias": False}},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "no critic lstm": {"enable_critic_lstm": False},
    "separate extractors": {"share_features_extractor": False},
}


@pytest.mark.parametrize("kwargs", CONTRIB.values(), ids=CONTRIB)
def test_with_equal_seeds_parameters_and_outputs_equal_sb3_contribs(kwargs):
    kwargs = {"lstm_hidden_size": 8, **kwargs}
    contrib = make(RecurrentActorCriticPolicy, **kwargs)
    policy = make(MlpLstmPolicy, **kwargs)
    expected = contrib.state_dict()
    assert list(policy.state_dict()) == list(expected)
    assert all(th.equal(value, expected[name]) for name, value in policy.state_dict().items())

    n_sequences, length = 3, 7
    observations = th.randn(n_sequences * length, 3)
    actions = th.randint(3, (n_sequences * length,))
    episode_starts = th.rand(n_sequences * length) < 0.2
    shape = (kwargs.get("n_lstm_layers", 1), n_sequences, 8)
    states = RNNStates(*((th.randn(shape), th.randn(shape)) for _ in range(2)))
    outputs = contrib.evaluate_actions(observations, actions, states, episode_starts.float())
    # sb3-contrib gives a state also to a critic without an LSTM of its own
    ours = states if policy.critic_memory is not None else RNNStates(states.pi, ())
    for expected, actual in zip(
        outputs, policy.evaluate_actions(observations, actions, states=ours, episode_starts=episode_starts), strict=True
    ):
        th.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kwargs", CONTRIB.values(), ids=CONTRIB)
@pytest.mark.parametrize("max_steps", [5, 100])
def test_the_first_rollout_equals_sb3_contribs(kwargs, max_steps):
    """Actions, values, bootstrapped rewards and returns, with timeouts and the state that is carried on."""
    buffers = []
    for algorithm in (RecurrentPPO, PPOPlus):
        env = make_env(3, action_space=DISCRETE, max_steps=max_steps)
        policy_kwargs = SMALL_NET | {"lstm_hidden_size": 8} | kwargs
        model = algorithm("MlpLstmPolicy", env, policy_kwargs=policy_kwargs, **SETTINGS)
        # No update, so that the second rollout goes on from the first
        model.train = lambda: None
        model.learn(2 * 16 * 3)
        buffers.append(model.rollout_buffer)
    contrib, ours = buffers
    assert np.array_equal(ours.actions.reshape(contrib.actions.shape), contrib.actions)
    assert np.array_equal(ours.episode_starts, contrib.episode_starts)
    for name in ("values", "log_probs", "rewards", "advantages", "returns"):
        np.testing.assert_allclose(getattr(ours, name), getattr(contrib, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_model_of_recurrent_ppo_goes_on_in_ppo_plus(tmp_path):
    env = make_env(2, action_space=DISCRETE)
    contrib = RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=SMALL_NET | {"lstm_hidden_size": 8}, **SETTINGS)
    contrib.learn(64).save(tmp_path / "model")
    model = PPOPlus.load(tmp_path / "model", env)
    assert isinstance(model.policy, MlpLstmPolicy)
    expected = contrib.policy.state_dict()
    assert all(th.equal(value, expected[name]) for name, value in model.policy.state_dict().items())
    moments = contrib.policy.optimizer.state_dict()["state"]
    for index, entries in model.policy.optimizer.state_dict()["state"].items():
        assert all(th.equal(entries[name], value) for name, value in moments[index].items())
    observations = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32)
    state = expected_state = None
    for episode_start in ([True, True], [False, False], [False, True]):
        action, state = model.predict(observations, state, np.array(episode_start), deterministic=True)
        expected_action, expected_state = contrib.predict(
            observations, expected_state, np.array(episode_start), deterministic=True
        )
        assert np.array_equal(action, expected_action)
        for pair in zip(state, expected_state, strict=True):
            np.testing.assert_allclose(*pair, atol=1e-6)
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 128


# predict


@pytest.mark.parametrize("memory", MEMORIES)
def test_predict_carries_the_state_and_resets_it_at_episode_starts(memory):
    model = make_model(memory=memory, memory_kwargs={"hidden_size": 8})
    observations = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32)
    _, first = model.predict(observations, deterministic=True)
    _, second = model.predict(observations, first, np.array([False, True]), deterministic=True)
    assert all(isinstance(part, np.ndarray) and part.shape[1] == 2 for part in second)
    assert not np.allclose(first[0][:, 0], second[0][:, 0], atol=1e-4)
    for begun, again in zip(first, second, strict=True):
        assert np.array_equal(begun[:, 1], again[:, 1]), "an episode begins as the first one did"
    _, alone = model.predict(observations[0], deterministic=True)
    for part, from_all in zip(alone, first, strict=True):
        assert part.shape[1] == 1, "as sb3-contrib: one env without a dimension for envs in its observation"
        np.testing.assert_allclose(part, from_all[:, :1], atol=1e-6)


def test_without_a_memory_predict_returns_the_state_that_it_was_given():
    model, state = make_model(), (np.ones(3),)
    assert model.predict(np.zeros((2, 3), np.float32), state)[1] is state
    assert model.predict(np.zeros((2, 3), np.float32))[1] is None


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_state_of_the_wrong_shape_is_refused_with_the_expected_shapes(memory):
    model = make_model(memory=memory, memory_kwargs={"hidden_size": 8})
    observations = np.zeros((2, 3), np.float32)
    _, state = model.predict(observations)
    for wrong in (tuple(part[:, :1] for part in state), state[0][..., :1], (*state, state[0]), "state", 0):
        with pytest.raises(ValueError, match=r"predict: state must be None or .* for 2 environment\(s\)"):
            model.predict(observations, wrong)


@pytest.mark.parametrize("memory", MEMORIES)
def test_evaluate_policy_keeps_each_episodes_memory_apart(memory):
    """SB3's evaluate_policy passes on states and episode starts, so an agent remembers only its own episode."""
    env = make_env(2, action_space=DISCRETE, p_terminate=0.0)
    model = make_model(env, memory=memory, memory_kwargs={"hidden_size": 8})
    seen = []
    predict = model.policy._distribution_and_state

    def look(observation, masks, state, episode_starts):
        seen.append((observation.clone(), episode_starts.clone()))
        return predict(observation, masks, state, episode_starts)

    model.policy._distribution_and_state = look
    evaluate_policy(model, env, n_eval_episodes=4, deterministic=True)
    starts = th.stack([episode_starts for _, episode_starts in seen])
    assert starts[0].all() and starts[7].all() and not starts[1:7].any()


@pytest.mark.parametrize(
    ("policy_class", "space", "kwargs"),
    [
        (MlpPolicy, BOX, {}),
        (CnnPolicy, CHANNEL_FIRST, {}),
        (CnnPolicy, CHANNEL_FIRST, {"features_extractor_class": "impala_cnn"}),
        (MultiInputPolicy, DICT, {}),
        (MlpPolicy, spaces.Box(-1, 1, (4, 3)), {"features_extractor_class": "transformer"}),
        (MlpPolicy, BOX, {"share_features_extractor": False}),
    ],
)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_memory_works_behind_any_extractor(policy_class, space, kwargs, memory):
    policy_kwargs = {"memory": memory, "memory_kwargs": {"hidden_size": 8}, **kwargs}
    env = make_env(2, observation_space=space, action_space=DISCRETE)
    before = PPOPlus(policy_class, env, policy_kwargs=SMALL_NET | policy_kwargs, **SETTINGS)
    parameters = copy.deepcopy(before.policy.state_dict())
    before.learn(32)
    changed = {name for name, value in before.policy.state_dict().items() if not th.equal(value, parameters[name])}
    # All parameters change, except buffers and, with so little data, the row of a dead ReLU
    assert {name.split(".")[0] for name in changed} >= {f"{memory}_actor", f"{memory}_critic", "action_net"}


COUNTED = {
    "discrete": spaces.Discrete(np.int64(4)),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary((2, 2)),
}
COUNTED["dict"] = spaces.Dict(COUNTED | {"vector": BOX})


class SizedByNumPy(FlattenExtractor):
    """Its size is a product that NumPy computes, as users often write it."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self._features_dim = np.prod(observation_space.shape)


@pytest.mark.parametrize("memory", [None, *MEMORIES])
@pytest.mark.parametrize("kind", COUNTED)
def test_observations_whose_sizes_numpy_sums_are_trained_on(kind, memory):
    env = make_env(2, observation_space=COUNTED[kind], action_space=DISCRETE)
    model = make_model(env, "MultiInputPolicy" if kind == "dict" else "MlpPolicy", memory=memory)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(32)
    assert type(model.policy.features_dim) is int
    after = list(model.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any((old != new).any() for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_extractor_of_the_users_may_have_a_size_of_numpy(memory):
    make(memory=memory, features_extractor_class=SizedByNumPy)
