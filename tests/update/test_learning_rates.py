import copy

import pytest
import torch as th
from environments import ASYMMETRIC, BOX, CHANNEL_FIRST, DICT, IMAGE, SMALL_DICT, logs_of_updates, make_env
from gymnasium import spaces
from models import SETTINGS
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_plus import CnnPolicy, MlpPolicy, MultiInputPolicy, PPOPlus
from sb3_ppo_plus.update.learning_rates import critic_only_parameters


class Extractor(BaseFeaturesExtractor):
    """An extractor that has parameters, and statistics that a pass in training mode would change."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.layers = nn.Sequential(nn.Linear(observation_space.shape[0], 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


class Crossed(nn.Module):
    """Names that mislead: the actor's layers are called critic."""

    latent_dim_pi = latent_dim_vf = 4

    def __init__(self, features_dim):
        super().__init__()
        self.critic = nn.Linear(features_dim, 4)
        self.actor = nn.Linear(features_dim, 4)
        self.trunk = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return self.trunk(self.critic(features))

    def forward_critic(self, features):
        return self.trunk(self.actor(features))


class CrossedPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = Crossed(self.features_dim)


class TwoRates(ActorCriticPolicy):
    """The action net's group has ten times the learning rate, and its own weight decay."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        fast = {id(parameter) for parameter in self.action_net.parameters()}
        groups = [
            {"params": [parameter for parameter in self.parameters() if id(parameter) not in fast]},
            {"params": list(self.action_net.parameters()), "lr": 10 * lr_schedule(1), "weight_decay": 0.1},
        ]
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)


def names_of_critic(policy):
    ids = {id(parameter) for parameter in critic_only_parameters(policy)}
    return {name for name, parameter in policy.named_parameters() if id(parameter) in ids}


def make_policy(policy_class=MlpPolicy, observation_space=BOX, action_space=ASYMMETRIC, **kwargs):
    return policy_class(observation_space, action_space, lambda progress: 1e-3, **{"net_arch": [8]} | kwargs)


def layer(name):
    return {f"{name}.weight", f"{name}.bias"}


VALUE = layer("mlp_extractor.value_net.0") | layer("value_net")

# Which parameters are the critic's alone


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_sde": True},
        {"use_sde": True, "squash_output": True},
        {"action_dist": "beta"},
        {"action_dist": "squashed_gaussian"},
        {"action_space": spaces.Discrete(3)},
        {"action_space": spaces.MultiDiscrete([2, 3])},
        {"action_space": spaces.MultiBinary(2)},
        {"observation_space": spaces.Discrete(3)},
        {"observation_space": spaces.MultiBinary(3)},
        {"share_features_extractor": False},
        {"features_extractor_class": Extractor},
        {"policy_class": MultiInputPolicy, "observation_space": SMALL_DICT},
    ],
    ids=str,
)
def test_without_an_extractor_of_its_own_the_critic_has_only_its_layers_and_its_head(kwargs):
    assert names_of_critic(make_policy(**kwargs)) == VALUE


@pytest.mark.parametrize(
    "kwargs",
    [
        {"features_extractor_class": Extractor},
        {"policy_class": CnnPolicy, "observation_space": CHANNEL_FIRST},
        {"policy_class": MultiInputPolicy, "observation_space": spaces.Dict({"v": BOX, "image": CHANNEL_FIRST})},
    ],
    ids=["vector", "image", "dict"],
)
def test_a_separate_extractor_belongs_to_the_critic_and_a_shared_one_to_both(kwargs):
    separate = make_policy(**kwargs, share_features_extractor=False)
    own = {name for name, _ in separate.named_parameters() if name.startswith("vf_features_extractor.")}
    assert own
    assert names_of_critic(separate) == VALUE | own
    assert names_of_critic(make_policy(**kwargs)) == VALUE


def test_autograd_not_names_finds_the_critics_parameters():
    # Actor and critic both use the trunk, and neither uses the spare layer
    assert names_of_critic(make_policy(CrossedPolicy)) == layer("mlp_extractor.actor") | layer("value_net")


def test_frozen_parameters_are_not_the_critics():
    policy = make_policy()
    policy.value_net.weight.requires_grad_(False)
    policy.action_net.weight.requires_grad_(False)
    assert names_of_critic(policy) == VALUE - {"value_net.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_finding_the_critics_parameters_changes_no_statistics_mode_gradients_or_random_numbers(training):
    policy = make_policy(features_extractor_class=Extractor)
    policy.set_training_mode(training)
    before, random_state = copy.deepcopy(policy.state_dict()), th.get_rng_state()
    critic_only_parameters(policy)
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert policy.training is training
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert th.equal(th.get_rng_state(), random_state)


# The critic's learning rate


POLICIES = {
    "shared": ("MlpPolicy", {}, {}),
    "separate": ("MlpPolicy", {}, {"features_extractor_class": Extractor, "share_features_extractor": False}),
    "shared extractor": ("MlpPolicy", {}, {"features_extractor_class": Extractor}),
    "dict": ("MultiInputPolicy", {"observation_space": SMALL_DICT}, {}),
    "dict, separate": (
        "MultiInputPolicy",
        {"observation_space": DICT},
        {"share_features_extractor": False, "features_extractor_kwargs": {"cnn_output_dim": 4}},
    ),
    "image": ("CnnPolicy", {"observation_space": IMAGE}, {"features_extractor_kwargs": {"features_dim": 4}}),
    "custom": (CrossedPolicy, {}, {}),
    "sgd": ("MlpPolicy", {}, {"optimizer_class": "sgd"}),
    "rmsprop": ("MlpPolicy", {}, {"optimizer_class": "rmsprop"}),
    "adamw": ("MlpPolicy", {}, {"optimizer_class": "adamw", "optimizer_kwargs": {"weight_decay": 0.1}}),
    "beta": ("MlpPolicy", {}, {"action_dist": "beta"}),
    "gSDE": ("MlpPolicy", {}, {}),
    "own groups": (TwoRates, {}, {}),
}


def build(case, **settings):
    policy, env_kwargs, policy_kwargs = POLICIES[case]
    if case in ("image", "dict, separate"):
        settings = {"n_steps": 8, "batch_size": 8} | settings
    settings = SETTINGS | {"ent_coef": 0.01, "use_sde": case == "gSDE"} | settings
    return PPOPlus(policy, make_env(**env_kwargs), policy_kwargs={"net_arch": [8]} | policy_kwargs, **settings)


def moved_by_training(model):
    """Names of the parameters that training changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    model.learn(2 * model.n_steps)
    return {name for name, parameter in model.policy.named_parameters() if not th.equal(parameter, before[name])}


def with_gradient(model):
    return {name for name, _ in model.policy.named_parameters() if "spare" not in name}


@pytest.mark.parametrize("case", POLICIES)
def test_a_critic_learning_rate_of_zero_freezes_exactly_the_critics_parameters(case):
    model = build(case, learning_rate=1e-2, critic_learning_rate=0.0)
    assert moved_by_training(model) == with_gradient(model) - names_of_critic(model.policy)


@pytest.mark.parametrize("case", POLICIES)
def test_an_actor_learning_rate_of_zero_freezes_all_the_others(case):
    model = build(case, learning_rate=0.0, critic_learning_rate=1e-2)
    assert moved_by_training(model) == names_of_critic(model.policy)


@pytest.mark.parametrize("case", POLICIES)
def test_a_critic_learning_rate_equal_to_the_actors_changes_no_bit(case):
    states = []
    for critic_learning_rate in (None, 1e-3):
        model = build(case, learning_rate=1e-3, critic_learning_rate=critic_learning_rate)
        model.learn(3 * model.n_steps)
        states.append(model.policy.state_dict())
    for name, value in states[0].items():
        assert th.equal(states[1][name], value), name


def test_both_learning_rates_are_logged():
    logs = logs_of_updates(build("shared", learning_rate="lin_1e-3", critic_learning_rate="lin_1e-2_5e-3"), 64)
    assert [update["train/learning_rate"] for update in logs] == pytest.approx([5e-4, 0.0])
    assert [update["train/critic_learning_rate"] for update in logs] == pytest.approx([7.5e-3, 5e-3])
    logs = logs_of_updates(build("shared", learning_rate="lin_1e-3"), 64)
    assert [update["train/critic_learning_rate"] for update in logs] == pytest.approx([5e-4, 0.0])


def test_each_group_gets_its_own_step():
    """With plain SGD and one step per update, a parameter's step is its learning rate times its gradient."""
    steps = {}
    for rates in ((1e-2, 1e-2), (1e-2, 3e-2), (2e-2, 1e-2)):
        model = build("sgd", learning_rate=rates[0], critic_learning_rate=rates[1], n_epochs=1, batch_size=32)
        before = copy.deepcopy(model.policy.state_dict())
        model.learn(32)
        steps[rates] = {name: value - before[name] for name, value in model.policy.state_dict().items()}
    critic = names_of_critic(model.policy)
    for name, step in steps[1e-2, 1e-2].items():
        is_critic = name in critic
        tolerances = {"rtol": 1e-3, "atol": 1e-6}
        th.testing.assert_close(steps[1e-2, 3e-2][name], step * (3.0 if is_critic else 1.0), **tolerances)
        th.testing.assert_close(steps[2e-2, 1e-2][name], step * (1.0 if is_critic else 2.0), **tolerances)


def test_a_warm_up_from_zero_reaches_both_groups():
    model = build("shared", learning_rate="warmup_cos_1e-2", critic_learning_rate="warmup_cos_2e-2")
    logs = logs_of_updates(model, 64)
    assert logs[0]["train/learning_rate"] > 0.0
    for group, name in zip(model.policy.optimizer.param_groups, ("learning_rate", "critic_learning_rate"), strict=True):
        assert group["lr"] == logs[-1][f"train/{name}"]
    assert moved_by_training(model) == with_gradient(model)


@pytest.mark.parametrize(
    ("learning_rate", "expected"),
    [("lin_1e-3", 0.0), (lambda progress: 1e-3, 1e-3), (2e-3, 2e-3)],
    ids=["string", "callable", "number"],
)
def test_assigning_a_learning_rate_takes_effect_at_the_next_update(learning_rate, expected):
    model = build("shared", critic_learning_rate=1e-3)
    model.learn(32)
    model.learning_rate = learning_rate
    model.critic_learning_rate = "lin_4e-3_2e-3"
    (logs,) = logs_of_updates(model, 32)
    assert logs["train/learning_rate"] == pytest.approx(expected)
    assert logs["train/critic_learning_rate"] == pytest.approx(2e-3)
    assert {group["lr"] for group in model.policy.optimizer.param_groups} == {
        logs["train/learning_rate"],
        logs["train/critic_learning_rate"],
    }


def test_a_critic_learning_rate_can_be_assigned_to_a_model_without_one():
    model = build("shared", learning_rate=1e-2)
    model.learn(32)
    model.critic_learning_rate = 0.0
    assert moved_by_training(model) == with_gradient(model) - names_of_critic(model.policy)


def test_a_critic_learning_rate_can_be_removed():
    model = build("shared", learning_rate=1e-2, critic_learning_rate=0.0)
    model.learn(32)
    model.critic_learning_rate = None
    (logs,) = logs_of_updates(model, 32)
    assert logs["train/critic_learning_rate"] == 1e-2
    assert moved_by_training(model) == with_gradient(model)


# Groups of the user's own


def rates_by_name(model):
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    return {
        names[id(parameter)]: group["lr"]
        for group in model.policy.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("critic_learning_rate", [None, "lin_4e-3_2e-3"])
def test_groups_of_a_custom_policy_keep_their_ratio(critic_learning_rate):
    model = build("own groups", learning_rate="lin_1e-3", critic_learning_rate=critic_learning_rate)
    model.learn(64)
    model.learning_rate = 5e-4
    model.learn(32)
    expected = {"others": 5e-4, "fast": 5e-3, "critic": 5e-4 if critic_learning_rate is None else 2e-3}
    critic = names_of_critic(model.policy)
    for name, rate in rates_by_name(model).items():
        kind = "fast" if name.startswith("action_net") else "critic" if name in critic else "others"
        assert rate == pytest.approx(expected[kind]), name
    assert {group["weight_decay"] for group in model.policy.optimizer.param_groups} == {0, 0.1}


def test_a_group_that_is_added_later_keeps_its_learning_rate():
    added = nn.Parameter(th.ones(3))

    class Add(BaseCallback):
        def _on_step(self):
            return True

        def on_update_end(self):
            if len(self.model.policy.optimizer.param_groups) == 1:
                self.model.policy.optimizer.add_param_group({"params": [added], "lr": 0.123})
            return True

    model = build("shared", learning_rate="lin_1e-3")
    model.learn(96, Add())
    first, second = model.policy.optimizer.param_groups
    assert first["lr"] == 0.0
    assert second["lr"] == 0.123


def test_a_critic_learning_rate_does_not_change_a_group_that_is_added_later():
    model = build("shared", learning_rate=1e-3)
    model.policy.optimizer.add_param_group({"params": [nn.Parameter(th.ones(3))], "lr": 0.123})
    model.critic_learning_rate = 1e-2
    model.learn(32)
    critic = {id(parameter) for parameter in critic_only_parameters(model.policy)}
    for group in model.policy.optimizer.param_groups:
        ids = {id(parameter) for parameter in group["params"]}
        is_of_policy = ids <= {id(parameter) for parameter in model.policy.parameters()}
        assert group["lr"] == (1e-2 if ids <= critic else 1e-3 if is_of_policy else 0.123)


def test_a_group_without_a_ratio_to_the_schedule_keeps_its_rate():
    """The policy gave it a rate of its own, while the schedule starts at 0."""

    class OwnRate(ActorCriticPolicy):
        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            critic = {id(parameter) for parameter in critic_only_parameters(self)}
            groups = [
                {"params": [parameter for parameter in self.parameters() if id(parameter) in critic], "lr": 0.5},
                {"params": [parameter for parameter in self.parameters() if id(parameter) not in critic]},
            ]
            self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1))

    model = PPOPlus(OwnRate, make_env(), learning_rate="warmup_cos_1e-2", **SETTINGS)
    (first, last) = logs_of_updates(model, 64)
    assert first["train/learning_rate"] > 0.0
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [0.5, last["train/learning_rate"]]


@pytest.mark.parametrize("critic_learning_rate", [None, "lin_1e-2_1e-3"])
def test_the_copy_of_a_policy_in_training_goes_on_at_its_rates(critic_learning_rate):
    class PutInCopy(BaseCallback):
        def _on_step(self):
            if self.num_timesteps >= 64:
                self.model.policy = copy.deepcopy(self.model.policy)
            return True

    rates = []
    for callback in (None, PutInCopy()):
        model = build("own groups", learning_rate="lin_1e-3_2e-4", critic_learning_rate=critic_learning_rate)
        rates.append(rates_by_name(model.learn(160, callback)))
    assert rates[1] == pytest.approx(rates[0])
