"""What changes a policy during a rollout reaches compiled training as it reaches SB3's PPO."""

import numpy as np
import pytest
import torch as th
from compiled_like_sb3 import ROLLOUT, assert_compiled_follows_sb3, build, changing
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from sb3_ppo_plus import PPOPlus

pytestmark = [
    pytest.mark.usefixtures("graphs_without_code"),
    pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU"),
]


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


def test_values_wait_for_the_end_until_the_policy_changes():
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
def test_steps_before_a_changed_network_keep_the_old_networks_values(change):
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


def test_a_policy_change_at_a_timeout_counts_for_its_value_only_from_that_step():
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
