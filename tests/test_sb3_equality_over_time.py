"""Invariant 1 over several calls of learn, with changes by the user in between, and in the log."""

import copy

import pytest
import torch as th
from environments import ASYMMETRIC, logs_of_updates, make_env
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from states import assert_same_training
from trained_alike import SETTINGS, UPDATES, policy_kwargs, train

from sb3_ppo_plus import PPOPlus

pytestmark = pytest.mark.usefixtures("replayed_after_a_while")


def assert_continues_alike(change):
    """Train both, change something, train both on from the same random state."""
    models = [train(algorithm, "MlpPolicy", make_env, updates=2) for algorithm in (PPO, PPOPlus)]
    for model in models:
        set_random_seed(5)
        change(model)
        model.learn(2 * model.n_steps, reset_num_timesteps=False)
        model.learn(model.n_steps)
    assert_same_training(*models)


def copy_the_policy(model):
    # The policy's last distribution must not carry a graph, which nothing can copy
    model.predict(model.env.reset())
    model.policy = copy.deepcopy(model.policy)


def double_the_value_net(model):
    model.policy.value_net.weight.data = model.policy.value_net.weight.data * 2


def freeze_a_bias(model):
    model.policy.action_net.bias.requires_grad_(False)
    model.policy.action_net.bias.grad = None


def freeze_and_thaw(model):
    model.policy.action_net.requires_grad_(False)
    model.policy.action_net.zero_grad()
    model.learn(model.n_steps, reset_num_timesteps=False)
    model.policy.action_net.requires_grad_(True)


def halve_a_gradient(model):
    model.policy.action_net.weight.register_hook(lambda gradient: gradient / 2)


def clip_a_gradient_once_it_is_accumulated(model):
    def clip(parameter):
        parameter.grad.clamp_(-0.01, 0.01)

    model.policy.action_net.weight.register_post_accumulate_grad_hook(clip)


def shrink_after_each_step(model):
    def shrink(*_):
        with th.no_grad():
            model.policy.value_net.weight.mul_(0.99)

    model.policy.optimizer.register_step_post_hook(shrink)


def step_by_hand(model):
    for parameter in model.policy.parameters():
        parameter.grad = th.full_like(parameter, 0.1)
    model.policy.optimizer.step()


def reset_the_optimizer(model):
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        lambda model: model.policy.load_from_vector(model.policy.parameters_to_vector() * 1.5),
        lambda model: model.policy.load_state_dict({k: v + 0.01 for k, v in model.policy.state_dict().items()}),
        lambda model: model.set_parameters(copy.deepcopy(model.get_parameters())),
        copy_the_policy,
        double_the_value_net,
        freeze_a_bias,
        freeze_and_thaw,
        halve_a_gradient,
        clip_a_gradient_once_it_is_accumulated,
        shrink_after_each_step,
        step_by_hand,
        reset_the_optimizer,
        lambda model: model.policy.optimizer.state.clear(),
        lambda model: model.policy.optimizer.param_groups[0].update(betas=(0.5, 0.9), weight_decay=0.1),
        lambda model: setattr(model, "max_grad_norm", 0.01),
        lambda model: setattr(model, "ent_coef", 0.1),
        lambda model: setattr(model, "batch_size", 8),
        lambda model: setattr(model, "clip_range", lambda progress: 0.01),
        lambda model: model.set_env(make_env(action_space=ASYMMETRIC, max_steps=3)),
    ],
    ids=[
        "nothing",
        "load_from_vector",
        "load_state_dict",
        "set_parameters",
        "deepcopy of the policy",
        "a parameter's data",
        "requires_grad",
        "requires_grad and back",
        "a gradient hook",
        "an accumulation hook",
        "a step hook",
        "a step by hand",
        "optimizer",
        "optimizer state",
        "optimizer settings",
        "max_grad_norm",
        "ent_coef",
        "batch_size",
        "clip_range",
        "set_env",
    ],
)
def test_training_goes_on_alike_after_the_user_changes(change):
    assert_continues_alike(change)


def test_training_goes_on_alike_under_another_default_dtype():
    def change(model):
        # So that the flat parameters are made anew
        freeze_a_bias(model)
        th.set_default_dtype(th.float64)

    try:
        assert_continues_alike(change)
    finally:
        th.set_default_dtype(th.float32)


@pytest.mark.parametrize(
    ("env_kwargs", "settings"),
    [
        ({}, {"ent_coef": 0.01, "clip_range_vf": 0.05, "learning_rate": 1e-2}),
        ({"action_space": spaces.Discrete(3)}, {"target_kl": 2e-3, "learning_rate": 1e-2}),
        ({"action_space": spaces.MultiBinary(2)}, {"n_steps": 33}),
        ({}, {"use_sde": True, **policy_kwargs(squash_output=True)}),
        ({"max_steps": 1000, "p_terminate": 0.0}, {"learning_rate": LinearSchedule(1e-3, 0, 1)}),
    ],
    ids=["value clipping", "target_kl", "truncated", "squashed gSDE", "no episode ends"],
)
def test_logged_values_are_sb3s(env_kwargs, settings):
    settings = SETTINGS | settings
    total = UPDATES * 2 * settings["n_steps"]
    sb3 = logs_of_updates(PPO("MlpPolicy", make_env(2, **env_kwargs), **settings), total)
    model = PPOPlus("MlpPolicy", make_env(2, **env_kwargs), **settings, pessimistic_value_clip=False)
    ours = logs_of_updates(model, total)
    assert len(sb3) == len(ours) == UPDATES
    for expected, actual in zip(sb3, ours, strict=True):
        names = expected.keys() - {"time/fps", "time/time_elapsed"}
        assert len(names) >= 9
        assert names <= actual.keys()
        for name in names:
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7, nan_ok=True), name


def test_progress_never_falls_below_zero():
    """The one exception to this file: SB3's schedules overshoot with the last rollout."""
    seen = {PPO: [], PPOPlus: []}
    for algorithm, values in seen.items():

        def learning_rate(progress, values=values):
            values.append(progress)
            return 1e-3 * abs(progress)

        model = algorithm("MlpPolicy", make_env(), **SETTINGS, learning_rate=learning_rate)
        model.learn(40)
    assert min(seen[PPO]) == pytest.approx(1 - 64 / 40), "SB3 has mended it: this exception is no longer needed"
    assert min(seen[PPOPlus]) == 0.0


def test_overshoot_changes_nothing_without_a_schedule():
    models = [algorithm("MlpPolicy", make_env(), **SETTINGS).learn(40) for algorithm in (PPO, PPOPlus)]
    assert_same_training(*models)


def put_in_another_policy(model):
    policy = copy.deepcopy(model.policy)
    policy.load_from_vector(policy.parameters_to_vector() * 0.9)
    model.policy = policy


DURING_A_ROLLOUT = {
    "gamma": lambda model: setattr(model, "gamma", 0.5),
    "gae_lambda of the buffer": lambda model: setattr(model.rollout_buffer, "gae_lambda", 0.5),
    "policy": put_in_another_policy,
}


@pytest.mark.parametrize("change", DURING_A_ROLLOUT.values(), ids=DURING_A_ROLLOUT)
def test_training_goes_on_alike_after_a_callbacks_change_during_a_rollout(change):
    models = []
    for algorithm in (PPO, PPOPlus):

        def change_once(step_locals, _):
            model = step_locals["self"]
            if model.num_timesteps == 40:
                change(model)
            return True

        model = algorithm("MlpPolicy", make_env(), **copy.deepcopy(SETTINGS))
        models.append(model.learn(UPDATES * model.n_steps, change_once))
    assert_same_training(*models)
