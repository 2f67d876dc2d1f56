"""Changes that users and callbacks make in a policy have the effect on compiled training that they have on SB3's."""

import copy

import numpy as np
import pytest
import torch as th
from compiled_like_sb3 import ROLLOUT, assert_close, assert_compiled_follows_sb3, build, changing
from environments import IMAGE
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from states import assert_same_training
from torch import nn

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import replays
from sb3_ppo_plus.fast.compiled_step import CompiledGradientStep
from sb3_ppo_plus.fast.graphs import MAX_COMPILATIONS
from sb3_ppo_plus.fast.policy_changes import hindrance
from sb3_ppo_plus.fast.replayed_actor import ReplayedActor
from sb3_ppo_plus.fast.tracing import trace

pytestmark = [
    pytest.mark.usefixtures("graphs_without_code"),
    pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU"),
]


# Parts that do something else at each call


class Noise(FlattenExtractor):
    def forward(self, observations):
        return super().forward(observations) + 0.5 * th.randn_like(observations)


class RunningMean(BaseFeaturesExtractor):
    """Subtracts the mean of its inputs in evaluation mode."""

    def __init__(self, observation_space):
        super().__init__(observation_space, observation_space.shape[0])
        self.register_buffer("mean", th.zeros(observation_space.shape[0]))
        self.register_buffer("n", th.tensor(1e-4))

    def forward(self, observations):
        if not self.training:
            with th.no_grad():
                self.n.add_(len(observations))
                self.mean.add_((observations - self.mean).sum(0) / self.n)
        return observations - self.mean


@pytest.mark.parametrize("extractor", [Noise, RunningMean])
def test_parts_with_noise_or_a_state_are_called_as_often_as_with_sb3(extractor):
    model = assert_compiled_follows_sb3(policy_kwargs={"features_extractor_class": extractor})
    assert model._execution.compiled_actor.n_compilations == 1


class Appending(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.seen = []

    def forward(self, observations):
        features = super().forward(observations)
        self.seen.append(float(features.detach().mean()) if type(features.detach()) is th.Tensor else features)
        return features


def test_a_part_that_fills_a_list_is_called_eagerly_after_one_warning():
    model = assert_compiled_follows_sb3(policy_kwargs={"features_extractor_class": Appending}, warns=1)
    assert all(isinstance(value, float) for value in model.policy.features_extractor.seen)
    expected = build(PPO, policy_kwargs={"features_extractor_class": Appending}).learn(ROLLOUT * 3)
    np.testing.assert_allclose(model.policy.features_extractor.seen, expected.policy.features_extractor.seen, atol=1e-5)


def test_a_trace_leaves_lists_dicts_and_sets_as_they_were():
    class Filling(nn.Module):
        def __init__(self, owned):
            super().__init__()
            self.owned = owned

        def forward(self, x):
            add = {list: "append", set: "add"}.get(type(self.owned))
            getattr(self.owned, add)(x) if add else self.owned.update(new=x)
            return x

    for owned in ([1], {1}, {"old": 1}):
        before, module = owned.copy(), Filling(owned)
        with pytest.raises(RuntimeError, match="changes a list, dict or set"):
            trace(module, [th.ones(2)], module)
        assert module.owned is owned and owned == before


# Hooks


class CollectActivations(BaseCallback):
    def _on_training_start(self):
        self.model.activations = []
        self.model.policy.mlp_extractor.policy_net.register_forward_hook(
            lambda module, inputs, output: self.model.activations.append(float(output.detach().mean()))
        )

    def _on_step(self):
        return True


def test_a_forward_hook_is_called_as_often_as_with_sb3():
    model = assert_compiled_follows_sb3(callback=CollectActivations, warns=1)
    expected = build(PPO).learn(ROLLOUT * 3, CollectActivations())
    np.testing.assert_allclose(model.activations, expected.activations, atol=1e-5)


@pytest.mark.parametrize("n_calls", [32, 41], ids=["between", "during"])
def test_a_hook_that_is_added_after_compiling_is_called(n_calls):
    def halve(model):
        model.policy.mlp_extractor.policy_net.register_forward_hook(lambda module, inputs, output: output * 0.5)

    callback = changing(halve, when=lambda n: n == n_calls)
    assert_compiled_follows_sb3(callback=callback, learning_rate=1e-4, warns=1)


def test_hooks_of_all_kinds_are_found():
    policy = build().policy
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(policy.value_net, f"register_{register}")(lambda *_: None)
        assert hindrance(policy) is not None, register
        handle.remove()
        assert hindrance(policy) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert hindrance(policy) is not None
    handle.remove()


# Layouts, which graphs compile in


def transpose(model):
    for part in model.policy.modules():
        if isinstance(part, nn.Linear):
            part.weight.data = part.weight.data.t().contiguous().t()


def test_weights_of_another_layout_train_the_same():
    models = [build(PPO), build(), build(compile=True)]
    for model in models:
        model.set_random_seed(0)
        transpose(model)
        assert not model.policy.mlp_extractor.policy_net[2].weight.is_contiguous()
        model.learn(ROLLOUT * 3)
    assert_same_training(*models[:2])
    assert_close(models[0], models[2])


def test_images_in_channels_last_keep_their_layout_and_sb3s_bits():
    models = [build(algorithm, "discrete", "CnnPolicy", observation_space=IMAGE) for algorithm in (PPO, PPOPlus)]
    for model in models:
        model.set_random_seed(0)
        model.policy.to(memory_format=th.channels_last)
        model.learn(ROLLOUT * 2)
    weight = models[1].policy.features_extractor.cnn[0].weight
    assert weight.stride() == models[0].policy.features_extractor.cnn[0].weight.stride()
    assert_same_training(*models)


@pytest.mark.parametrize("net_arch", [[8, 8], [17, 5]])
def test_a_fused_optimiser_has_sb3s_bits(net_arch):
    policy_kwargs = {"net_arch": net_arch, "optimizer_kwargs": {"fused": True}}
    models = [build(algorithm, policy_kwargs=policy_kwargs).learn(ROLLOUT * 3) for algorithm in (PPO, PPOPlus)]
    assert_same_training(*models)
    assert_compiled_follows_sb3(policy_kwargs=policy_kwargs)


# The optimiser's state


def auxiliary_step(model):
    model.policy.optimizer.zero_grad()
    sum(parameter.square().sum() for parameter in model.policy.parameters()).backward()
    model.policy.optimizer.step()


def clear_state(model):
    model.policy.optimizer.state.clear()


@pytest.mark.parametrize("change", [auxiliary_step, clear_state])
def test_steps_and_resets_of_the_users_own_compile_nothing_again(change):
    model = assert_compiled_follows_sb3(5, callback=changing(change, between=True), learning_rate=1e-4)
    assert model._execution.gradient_step.n_compilations == 1


def freeze(model, *, is_frozen):
    model.policy.mlp_extractor.requires_grad_(not is_frozen)
    return model


def test_layers_that_were_frozen_are_stepped_flat_again():
    models = [build(PPO), build(), build(compile=True)]
    for model in models:
        model.set_random_seed(0)
        model.learn(ROLLOUT)
        freeze(model, is_frozen=True).learn(ROLLOUT)
        freeze(model, is_frozen=False).learn(ROLLOUT * 2)
    assert_same_training(*models[:2])
    for model in models[1:]:
        assert sum(model._execution.gradient_step.has_gradient) == len(list(model.policy.parameters()))
        # Adam has counted other numbers of steps for the two parts
        assert len(model._execution.gradient_step._flat.groups) == 2
    assert models[2]._execution.gradient_step.n_compilations == 3
    assert_close(models[0], models[2])


@pytest.mark.filterwarnings("error:compile=True")
def test_training_is_compiled_although_its_first_minibatch_is_nan():
    class Poison(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if self.n_calls <= 32:
                self.model.rollout_buffer.returns[:] = np.nan

    model = build(compile=True, on_non_finite="skip", max_skipped=100).learn(ROLLOUT * 2, Poison())
    assert model._skipped_steps == 12
    assert model._execution.gradient_step.n_compilations == 1


# Again and again


def test_a_policy_that_changes_again_and_again_is_replayed_after_one_warning(monkeypatch):
    monkeypatch.setattr(replays, "REPLAY_AFTER", 5)

    class CountSteps(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            if self.n_calls <= 32 * (MAX_COMPILATIONS + 1):
                self.model.policy.n_seen = self.num_timesteps

    model = assert_compiled_follows_sb3(MAX_COMPILATIONS + 3, callback=CountSteps, warns=1)
    assert model._execution.gradient_step.n_compilations == MAX_COMPILATIONS
    assert isinstance(model._execution.gradient_step, CompiledGradientStep)
    assert model._execution.gradient_step.replays.n_replays == 1
    assert isinstance(model._execution.actor_for(model, model.rollout_buffer), ReplayedActor)


def test_settings_of_the_distribution_reach_the_graphs():
    models = [build(PPO, use_sde=True), build(compile=True, use_sde=True)]
    for model in models:
        model.set_random_seed(0)
        model.learn(ROLLOUT)
        model.policy.action_dist.learn_features = True
        model.learn(ROLLOUT * 2)
    assert_close(models[0], models[1])


class Scaled(FlattenExtractor):
    """Reads settings of every kind at each call."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.number, self.in_dict, self.in_list, self.function = 1.0, {"scale": 1.0}, [1.0], th.tanh
        self._private, self.in_array = 1.0, np.ones(1)

    def forward(self, observations):
        scale = self.number * self.in_dict["scale"] * self.in_list[0] * self._private * float(self.in_array[0])
        return self.function(super().forward(observations) * scale)


def change_number(extractor):
    extractor.number = 3.0


def change_dict(extractor):
    extractor.in_dict["scale"] = 3.0


def change_list(extractor):
    extractor.in_list[0] = 3.0


def change_function(extractor):
    extractor.function = th.sin


def change_private(extractor):
    extractor._private = 3.0


def change_array(extractor):
    extractor.in_array[0] = 3.0


@pytest.mark.parametrize(
    "change", [change_number, change_dict, change_list, change_function, change_private, change_array]
)
def test_settings_of_parts_reach_the_graphs(change):
    models = [
        build(algorithm, policy_kwargs={"features_extractor_class": Scaled}, **kwargs)
        for algorithm, kwargs in ((PPO, {}), (PPOPlus, {"compile": True}))
    ]
    for model in models:
        model.set_random_seed(0)
        model.learn(ROLLOUT)
        change(model.policy.features_extractor)
        model.learn(ROLLOUT * 2)
    assert models[1]._execution.gradient_step.n_compilations == 2
    assert_close(*models)


def put_in_another_policy(model):
    policy = copy.deepcopy(model.policy)
    for parameter in policy.parameters():
        parameter.mul_(0.9)
    model.policy = policy


def lower_gamma(model):
    model.gamma = 0.5


@pytest.mark.parametrize("change", [put_in_another_policy, lower_gamma])
def test_the_models_own_changes_count_from_the_next_step_on(change):
    assert_compiled_follows_sb3(callback=changing(change, when=lambda n_calls: n_calls == 41))
