"""Replays do what eager mode does, bit for bit. If they could not, everything stays eager."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch as th
from environments import ACTION_SPACES, logs_of_updates, make_env, make_masked_env
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_training
from torch import nn
from torch.distributions import Distribution
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from trained_alike import SETTINGS

from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus
from sb3_ppo_plus.fast import replays
from sb3_ppo_plus.fast.replays import CHECKED_REPLAYS, REPLAY_AFTER, can_replay, make_replay
from sb3_ppo_plus.update.argument_validation import without_argument_validation


@pytest.fixture(autouse=True)
def replayed_early(monkeypatch):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 5)


def build(algorithm=PPOPlus, action_space="discrete", policy="MlpPolicy", **settings):
    return algorithm(policy, make_env(2, action_space=ACTION_SPACES[action_space]), **SETTINGS | settings)


def n_replays(model):
    return (
        model._execution.replayed_actor.replays.n_replays,
        model._execution.gradient_step.replays.n_replays,
    )


# What is replayed


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_the_updates_of_every_action_space_are_replayed(action_space):
    model = build(action_space=action_space).learn(64 * 2)
    assert n_replays(model)[1] == 1
    assert_same_training(build(PPO, action_space).learn(64 * 2), model)


@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_rollouts_are_replayed(action_space):
    model = build(action_space=action_space).learn(64)
    assert n_replays(model)[0] == 1
    expected = build(PPO, action_space).learn(64)
    for name in ("actions", "values", "log_probs", "advantages"):
        # SB3's buffer has flattened its arrays for the update
        replayed = RolloutBuffer.swap_and_flatten(getattr(model.rollout_buffer, name))
        assert np.array_equal(replayed, getattr(expected.rollout_buffer, name)), name


def test_masked_training_is_replayed():
    model = PPOPlus("MlpPolicy", make_masked_env(2), **SETTINGS).learn(64 * 3)
    assert n_replays(model) == (1, 1)
    expected = MaskablePPO("MlpPolicy", make_masked_env(2), **SETTINGS).learn(64 * 3)
    assert_same_training(expected, model)


@pytest.mark.parametrize("short", [0, 4], ids=["whole minibatches", "a short last minibatch"])
def test_schedules_move_what_is_replayed(short):
    settings = {
        "learning_rate": lambda progress: 2e-2 * progress,
        # In float32, 1 - 0.067 and 1 + 0.111 would be rounded differently
        "clip_range": lambda progress: 0.111 if progress > 0.5 else 0.067,
        "clip_range_vf": lambda progress: 0.1 * progress + 1e-3,
        "ent_coef": 0.013,
        "batch_size": 16 + short,
    }
    sb3, model = build(PPO, **settings), build(**settings, pessimistic_value_clip=False)
    expected, logs = ([], [])
    for one, kept in ((sb3, expected), (model, logs)):
        one.set_random_seed(0)
        kept.extend(logs_of_updates(one, 64 * 8))
    assert n_replays(model)[1] == (2 if short else 1)
    assert_same_training(sb3, model)
    # The limits of clipping change only the loss, not its gradient
    for name in ("train/loss", "train/policy_gradient_loss", "train/value_loss", "train/clip_fraction"):
        assert [update[name] for update in logs] == [update[name] for update in expected], name


def test_assigned_coefficients_reach_the_next_replay():
    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm).learn(64 * 2)
        model.ent_coef, model.vf_coef = 0.5, 0.1
        models.append(model.learn(64 * 2, reset_num_timesteps=False))
    # The first replay has no gradient of the entropy, the second has one
    assert n_replays(models[1])[1] == 2
    assert_same_training(*models)


def test_loaded_parameters_reach_the_next_replay():
    models = build(PPO), build()
    for model in models:
        model.learn(64 * 2)
        model.set_parameters(build(PPO, seed=9).get_parameters())
        model.set_random_seed(0)
        model.learn(64 * 2)
    assert_same_training(*models)


def test_target_kl_stops_replayed_updates():
    settings = {"target_kl": 0.01, "learning_rate": 1e-2, "n_epochs": 20}
    model = build(**settings).learn(64 * 3)
    assert model._n_updates < 20 * 3 and n_replays(model)[1] == 1
    assert_same_training(build(PPO, **settings).learn(64 * 3), model)


def test_no_replay_is_made_in_a_short_training(monkeypatch):
    monkeypatch.setattr(replays, "REPLAY_AFTER", REPLAY_AFTER)
    assert REPLAY_AFTER >= 100
    assert n_replays(build().learn(64)) == (0, 0)


def test_a_model_is_copied_without_its_replays():
    model = build().learn(64 * 2)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.set_random_seed(1)
        one.learn(64)
    assert_same_training(model, twin)


def test_replays_that_are_dropped_leave_nothing_behind():
    constants = [th.ones(3)]
    replay = make_replay(lambda x: (x + constants[0],), [th.ones(3)], build().policy)
    for _ in range(CHECKED_REPLAYS):
        assert replay(th.ones(3))[0].tolist() == [2.0] * 3
    weak_reference = StorageWeakRef(constants.pop().untyped_storage())
    gc.collect()
    assert not weak_reference.expired()
    del replay
    gc.collect()
    assert weak_reference.expired()


def test_parameters_that_a_callback_assigns_count_at_the_next_step():
    class Assign(BaseCallback):
        def _on_step(self):
            if self.n_calls == 40:
                for parameter in self.model.policy.parameters():
                    parameter.data = parameter.data * 2.0
            return True

    model = build().learn(64 * 2, Assign())
    assert n_replays(model)[0] == 1
    assert_same_training(build(PPO).learn(64 * 2, Assign()), model)


# What callbacks and users see


class KeepDistribution(BaseCallback):
    """Notes whether callbacks find the probabilities of the step's observations."""

    def _on_step(self):
        policy = self.model.policy
        found = policy.action_dist.distribution.probs.clone()
        distribution = policy.get_distribution(self.locals["obs_tensor"]).distribution
        self.same.append(th.equal(found, distribution.probs))
        return True


def test_callbacks_find_the_distribution_of_each_step():
    callback = KeepDistribution()
    callback.same = []
    model = build(learning_rate=0.05).learn(64 * 2, callback)
    assert n_replays(model)[0] == 1
    assert len(callback.same) == 64 and all(callback.same)


@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_parameters_that_are_nan_raise_what_sb3_raises(action_space):
    errors = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm, action_space).learn(64)
        with th.no_grad():
            model.policy.action_net.bias.fill_(th.nan)
        with pytest.raises(ValueError) as caught:
            model.learn(64)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


# What is not replayed


class Subclass(ActorCriticPlusPolicy):
    def extract_features(self, obs, features_extractor=None):
        return super().extract_features(obs, features_extractor) * 1.0


class Doubled(nn.Tanh):
    def forward(self, x):
        return 2.0 * super().forward(x)


def replace_method(policy):
    whole = policy.mlp_extractor.forward
    policy.mlp_extractor.forward = lambda features: whole(features)


UNKNOWN = {
    "a forward hook": lambda policy: policy.value_net.register_forward_hook(lambda *_: None),
    "a backward hook": lambda policy: policy.value_net.register_full_backward_hook(lambda *_: None),
    "a hook of a parameter": lambda policy: policy.log_std.register_hook(lambda gradient: None),
    "a method of the instance": replace_method,
    "dropout": lambda policy: policy.mlp_extractor.policy_net.append(nn.Dropout(0.1)),
    "a subclass of a module": lambda policy: policy.mlp_extractor.policy_net.append(Doubled()),
    "a parametrization": lambda policy: nn.utils.parametrizations.weight_norm(policy.action_net),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_parts_are_not_replayed(change):
    policy = build(action_space="box").policy
    assert can_replay(policy)
    change(policy)
    assert not can_replay(policy)


def test_policies_of_ones_own_are_not_replayed():
    model = build(policy=Subclass).learn(64 * 2)
    assert not can_replay(model.policy)
    assert n_replays(model) == (0, 0)


@pytest.mark.parametrize(
    "mode",
    [lambda: th.autocast("cpu", dtype=th.bfloat16), lambda: th.autograd.set_detect_anomaly(True)],
    ids=["autocast", "anomalies"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_autocast_and_anomaly_detection_keep_the_policy_eager(mode):
    policy = build().policy
    with mode():
        assert not can_replay(policy)
    assert can_replay(policy)


def test_hooks_between_updates_end_the_replays():
    model = build().learn(64 * 2)
    assert n_replays(model) == (1, 1)
    called = []
    handle = model.policy.value_net.register_forward_hook(lambda *_: called.append(True))
    model.learn(64)
    assert len(called) >= 32 + 3 * 4
    assert n_replays(model) == (0, 0)
    handle.remove()
    model.learn(64 * 2)
    assert n_replays(model) == (1, 1)


@pytest.mark.parametrize("n_good", [0, 2])
def test_replays_end_if_their_bits_differ_from_eager(monkeypatch, n_good):
    calls = []

    def make_badly(*arguments):
        replay = make_replay(*arguments)

        def bad(*inputs):
            calls.append(1)
            first, *others = replay(*inputs)
            # Another last bit
            return (first if len(calls) <= n_good else first + th.finfo().eps * first.abs(), *others)

        return bad

    monkeypatch.setattr(replays, "make_replay", make_badly)
    model = build(action_space="box").learn(64 * 3)
    assert len(calls) >= n_good + 1
    assert n_replays(model)[0] == 0
    assert_same_training(build(PPO, "box").learn(64 * 3), model)


def test_what_cannot_be_replayed_stays_eager(monkeypatch):
    def fail(*arguments):
        raise RuntimeError

    monkeypatch.setattr(replays, "make_replay", fail)
    model = build().learn(64 * 2)
    assert n_replays(model) == (0, 0)
    assert_same_training(build(PPO).learn(64 * 2), model)


def test_making_a_replay_draws_no_random_numbers():
    policy = build().policy
    before = th.get_rng_state()
    replay = make_replay(lambda logits: (th.multinomial(logits, 1),), [th.ones(2, 3)], policy)
    assert th.equal(th.get_rng_state(), before)
    replay(th.ones(2, 3))
    assert not th.equal(th.get_rng_state(), before)


def test_images_are_acted_on_by_a_replay():
    image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    models = [
        algorithm("CnnPolicy", make_env(2, observation_space=image), **SETTINGS).learn(64)
        for algorithm in (PPO, PPOPlus)
    ]
    assert n_replays(models[1])[0] == 1
    assert_same_training(*models)


# What users change


class AtStep(BaseCallback):
    """Changes the model once, during a rollout."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def _on_step(self):
        if self.n_calls == 40:
            self.change(self.model)
        return True


def replace_activation(model):
    model.policy.mlp_extractor.policy_net[1] = nn.ReLU()


def replace_log_std(model):
    model.policy.log_std = nn.Parameter(th.full_like(model.policy.log_std, -1.0))


def add_hook(model):
    model.policy.value_net.register_forward_hook(lambda module, inputs, output: output * 2.0)


@pytest.mark.parametrize("change", [replace_activation, replace_log_std, add_hook])
def test_parts_that_a_callback_changes_count_at_the_next_step(change):
    model = build(action_space="box").learn(64)
    assert n_replays(model)[0] == 1
    model.learn(64 * 2, AtStep(change))
    assert_same_training(build(PPO, "box").learn(64).learn(64 * 2, AtStep(change)), model)


def test_a_module_added_to_an_empty_sequential_is_used_at_the_next_step():
    def append(model):
        model.policy.mlp_extractor.policy_net.append(nn.Tanh())

    settings = {"policy_kwargs": {"net_arch": []}, "action_space": "box"}
    model = build(**settings).learn(64)
    assert n_replays(model)[0] == 1
    model.learn(64 * 2, AtStep(append))
    assert_same_training(build(PPO, **settings).learn(64).learn(64 * 2, AtStep(append)), model)


def test_settings_of_the_distribution_count_at_the_next_update():
    models = [build(algorithm, "box", use_sde=True).learn(64 * 2) for algorithm in (PPO, PPOPlus)]
    assert n_replays(models[1])[1] == 1
    for model in models:
        model.policy.action_dist.use_expln = True
        model.set_random_seed(0)
        model.learn(64)
    assert_same_training(*models)


def test_methods_of_the_distribution_instance_are_not_replayed():
    policy = build().policy
    whole = policy.action_dist.entropy
    policy.action_dist.entropy = lambda: whole()
    assert not can_replay(policy)


def test_the_order_of_dict_observations_does_not_matter():
    box = spaces.Box(-1.0, 1.0, (3,))
    env = make_env(2, observation_space=spaces.Dict({"a": box, "b": box}))
    model = PPOPlus("MultiInputPolicy", env, **SETTINGS).learn(64)
    assert n_replays(model)[0] == 1
    observations = {"a": th.ones(2, 3), "b": -th.ones(2, 3)}
    model.policy.set_training_mode(False)
    actor = model._execution.replayed_actor
    actor.begin_rollout()
    values = [actor.act(dict(order), None, {})[1] for order in (observations.items(), [*observations.items()][::-1])]
    assert th.equal(*values)
    assert not th.equal(values[0], actor.act({"a": -th.ones(2, 3), "b": th.ones(2, 3)}, None, {})[1])


def test_an_observation_out_of_range_raises_what_sb3_raises():
    model = PPOPlus("MlpPolicy", make_env(2, observation_space=spaces.Discrete(5)), **SETTINGS).learn(64)
    actor = model._execution.replayed_actor
    assert n_replays(model)[0] == 1
    model.policy.set_training_mode(False)
    actor.begin_rollout()
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        actor.act(th.tensor([0, 5]), None, {})


def test_changes_at_each_update_do_not_cost_a_replay_each(monkeypatch):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 20)
    model = build()
    for _ in range(3):
        # Twelve minibatches are too few. Those before the change do not count
        model.policy.mlp_extractor.policy_net[1] = nn.Tanh()
        model.learn(64)
        assert n_replays(model)[1] == 0
    assert n_replays(model.learn(64))[1] == 1


def test_tracing_in_several_threads_leaves_torch_as_it_was():
    one_hot, is_validated = F.one_hot, Distribution._validate_args
    inside = threading.Barrier(2)
    left = threading.Event()

    def first():
        with without_argument_validation():
            inside.wait()
            inside.wait()
        left.set()

    def second():
        inside.wait()
        with without_argument_validation():
            inside.wait()
            left.wait()

    def learn():
        PPOPlus("MlpPolicy", make_env(2, observation_space=spaces.Discrete(5)), **SETTINGS).learn(64)

    for targets in ((first, second), (learn, learn, learn)):
        threads = [threading.Thread(target=target) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert F.one_hot is one_hot and Distribution._validate_args is is_validated
