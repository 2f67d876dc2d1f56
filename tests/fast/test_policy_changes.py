"""Changes that users and callbacks make in a policy have the effect on compiled training that they have on SB3's."""

import warnings

import numpy as np
import pytest
import torch as th
from environments import ACTION_SPACES, IMAGE, make_env
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

# Several timeouts and terminations in each rollout of 32 steps
SETTINGS = {"n_steps": 32, "batch_size": 16, "n_epochs": 3, "seed": 3, "device": "cpu", "learning_rate": 3e-3}
ROLLOUT = 64


def build(algorithm=PPOPlus, action_space="box", policy="MlpPolicy", observation_space=None, **settings):
    spaces = {} if observation_space is None else {"observation_space": observation_space}
    env = make_env(2, action_space=ACTION_SPACES[action_space], **spaces)
    policy_kwargs = {"net_arch": [8, 8], **settings.pop("policy_kwargs", {})}
    return algorithm(policy, env, policy_kwargs=policy_kwargs, **SETTINGS | settings)


def assert_close(model, other):
    """Check that two models have equal parameters, to rounding."""
    for (name, expected), actual in zip(model.policy.named_parameters(), other.policy.parameters(), strict=True):
        th.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def assert_compiled_follows_sb3(n_rollouts=3, callback=None, warns=0, **settings):
    """Check that compiled training equals SB3's to rounding, and warns ``warns`` times that something is eager."""
    sb3 = build(PPO, **settings).learn(ROLLOUT * n_rollouts, callback and callback())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(compile=True, **settings).learn(ROLLOUT * n_rollouts, callback and callback())
    assert len([one for one in caught if "compile=True" in str(one.message)]) == warns
    assert_close(sb3, model)
    for name in ("approx_kl", "value_loss", "policy_gradient_loss"):
        expected, actual = (one.logger.name_to_value[f"train/{name}"] for one in (sb3, model))
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    return model


def changing(change, *, when=lambda n_calls: True, between=False):
    """A callback that changes the model at some steps, or after each rollout."""

    class Change(BaseCallback):
        def _on_step(self):
            if not between and when(self.n_calls):
                with th.no_grad():
                    change(self.model)
            return True

        def _on_rollout_start(self):
            if between:
                change(self.model)

    return Change


# During a rollout


def fill(model):
    model.policy.log_std.fill_(-0.01 * (model.num_timesteps % 100))


def assign_data(model):
    model.policy.log_std.data = th.full_like(model.policy.log_std, -0.01 * (model.num_timesteps % 100))


def scale_all(model):
    for parameter in model.policy.parameters():
        parameter.mul_(1.001)


def assign_parameter(model):
    # The optimiser does not hold the new parameter, as in SB3
    model.policy.value_net.bias = nn.Parameter(th.full_like(model.policy.value_net.bias, 0.5))


@pytest.mark.parametrize("change", [fill, assign_data, scale_all, assign_parameter])
@pytest.mark.parametrize("when", [lambda n_calls: True, lambda n_calls: n_calls == 41], ids=["always", "once"])
def test_each_step_has_the_log_prob_and_value_of_the_policy_that_took_it(change, when):
    # The optimiser does not hold a parameter that was added, so that the step stays eager
    assert_compiled_follows_sb3(
        callback=changing(change, when=when), learning_rate=1e-4, warns=int(change is assign_parameter)
    )


def test_values_are_left_to_the_end_until_a_change():
    seen = []

    class Look(BaseCallback):
        def _on_step(self):
            seen.append(self.locals["values"] is None)
            if self.n_calls == 40:
                scale_all_now(self.model)
            return True

    def scale_all_now(model):
        with th.no_grad():
            scale_all(model)

    build(compile=True).learn(ROLLOUT * 4, Look())
    by_rollout = np.array(seen).reshape(4, 32)
    assert by_rollout[0].all()
    assert by_rollout[1, :8].all() and not by_rollout[1, 8:].any()
    assert by_rollout[2:].all()


def hook_value_net(policy):
    policy.value_net.register_forward_hook(lambda module, inputs, output: output * 2.0)


def replace_method(policy):
    policy.value_net.forward = lambda features: features.sum(-1, keepdim=True)


def replace_layer(policy):
    policy.mlp_extractor.value_net[2] = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))


def replace_activation(policy):
    policy.mlp_extractor.policy_net[1] = nn.ReLU()


def hook_policy(policy):
    policy.calls = []
    policy.register_forward_hook(lambda module, inputs, output: policy.calls.append(len(output[0])))


@pytest.mark.parametrize("change", [hook_value_net, replace_method, replace_layer, replace_activation, hook_policy])
@pytest.mark.filterwarnings("ignore:compile=True. acting runs eagerly")
def test_steps_before_another_structure_keep_what_the_old_one_said(change):
    class Change(BaseCallback):
        def _on_step(self):
            if self.n_calls == 20:
                th.manual_seed(1)
                change(self.model.policy)
            return True

        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            self.arrays = {name: getattr(buffer, name).copy() for name in ("values", "log_probs", "rewards")}

    models, callbacks = [], []
    for algorithm, settings in ((PPO, {}), (PPOPlus, {"compile": True})):
        callbacks.append(Change())
        models.append(build(algorithm, **settings).learn(ROLLOUT, callbacks[-1]))
    for name, expected in callbacks[0].arrays.items():
        np.testing.assert_allclose(callbacks[1].arrays[name], expected, atol=1e-5, err_msg=name)
    if change is hook_policy:
        assert models[0].policy.calls == models[1].policy.calls == [2] * 12


def test_a_change_at_the_step_of_a_timeout_is_in_its_value_and_not_in_those_before():
    class Change(BaseCallback):
        def _on_step(self):
            timeouts = sum(info.get("TimeLimit.truncated", False) for info in self.locals["infos"])
            self.n_timeouts = getattr(self, "n_timeouts", 0) + timeouts
            if self.n_timeouts >= 3 and timeouts:
                with th.no_grad():
                    self.model.policy.value_net.bias.add_(1.0)
            return True

        def _on_rollout_end(self):
            self.rewards = self.model.rollout_buffer.rewards.copy()

    callbacks = []
    for algorithm, settings in ((PPO, {}), (PPOPlus, {"compile": True})):
        callbacks.append(Change())
        build(algorithm, **settings).learn(ROLLOUT, callbacks[-1])
    assert callbacks[0].n_timeouts >= 5
    np.testing.assert_allclose(callbacks[1].rewards, callbacks[0].rewards, atol=1e-5)


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
def test_a_hook_that_comes_late_counts(n_calls):
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
def test_a_first_minibatch_that_is_not_finite_keeps_nothing_from_being_compiled():
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
