"""When users change something between updates or during one, PPOPlus goes on as SB3's PPO does, bit for bit."""

import copy
from collections import defaultdict

import pytest
import torch as th
from environments import make_env
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_training
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import replays

SETTINGS = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
ROLLOUTS = 5
OPTIMIZERS = {
    "Adam": (Adam, {}),
    "AdamW": (AdamW, {}),
    "SGD": (SGD, {}),
    "SGD with momentum": (SGD, {"momentum": 0.9, "dampening": 0.1}),
    "RMSprop": (RMSprop, {}),
}


@pytest.fixture(autouse=True)
def replayed_after_a_while(monkeypatch):
    """Make the first minibatches eager, and replay the others if that is possible."""
    monkeypatch.setattr(replays, "REPLAY_AFTER", 3)


def build(algorithm, optimizer="Adam", **settings):
    optimizer_class, optimizer_kwargs = OPTIMIZERS[optimizer]
    kwargs = {"net_arch": [8, 8], "optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    rates = {"learning_rate": lambda progress: 0.02 * progress + 1e-3}
    return algorithm("MlpPolicy", make_env(), policy_kwargs=kwargs, **SETTINGS | rates | settings)


class Change(BaseCallback):
    """Changes the model before some rollouts.

    :param change: takes the model
    :param before: indices of the rollouts, from 0
    """

    def __init__(self, change, before):
        super().__init__()
        self.change, self.before, self.n_rollouts = change, before, 0

    def _on_rollout_start(self):
        if self.n_rollouts in self.before:
            self.change(self.model)
        self.n_rollouts += 1

    def _on_step(self):
        return True


def trained(algorithm, change, before=(1, 3), **settings):
    model = build(algorithm, **settings)
    return model.learn(ROLLOUTS * 16, Change(change, before))


def assert_has_an_effect(changed, **settings):
    unchanged = build(PPO, **settings).learn(ROLLOUTS * 16)
    pairs = zip(changed.policy.parameters(), unchanged.policy.parameters(), strict=True)
    assert any(not th.equal(*pair) for pair in pairs), "the change changed nothing: the case proves nothing"


def assert_changes_alike(change, *, has_an_effect=True, **settings):
    sb3, ours = (trained(algorithm, change, **settings) for algorithm in (PPO, PPOPlus))
    assert_same_training(sb3, ours)
    if has_an_effect:
        settings.pop("before", None)
        assert_has_an_effect(sb3, **settings)
    return sb3, ours


# The optimiser's state and groups, loaded or replaced


def load_its_own_state(model):
    model.policy.optimizer.load_state_dict(model.policy.optimizer.state_dict())


def load_a_copy_of_its_state(model):
    model.policy.optimizer.load_state_dict(copy.deepcopy(model.policy.optimizer.state_dict()))


def set_its_own_parameters(model):
    model.set_parameters(model.get_parameters())


def set_a_copy_of_its_parameters(model):
    model.set_parameters(copy.deepcopy(model.get_parameters()))


def replace_the_list_of_groups(model):
    model.policy.optimizer.param_groups = [dict(group) for group in model.policy.optimizer.param_groups]


def replace_a_group(model):
    groups = model.policy.optimizer.param_groups
    groups[0] = dict(groups[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "change",
    [
        load_its_own_state,
        load_a_copy_of_its_state,
        set_its_own_parameters,
        set_a_copy_of_its_parameters,
        replace_the_list_of_groups,
        replace_a_group,
    ],
)
def test_the_learning_rate_follows_its_schedule_after_groups_are_replaced(change, optimizer):
    sb3, ours = assert_changes_alike(change, optimizer=optimizer, has_an_effect=False)
    assert len({group["lr"] for group in ours.policy.optimizer.param_groups}) == 1
    assert ours.logger.name_to_value["train/learning_rate"] == sb3.logger.name_to_value["train/learning_rate"]


def clear_the_state(model):
    model.policy.optimizer.state.clear()


def replace_the_state(model):
    model.policy.optimizer.state = defaultdict(dict)


def forget_one_parameter(model):
    del model.policy.optimizer.state[model.policy.log_std]


def replace_an_entry(model):
    state = model.policy.optimizer.state
    state[model.policy.log_std] = {name: value.clone() for name, value in state[model.policy.log_std].items()}


def replace_a_moment(model):
    for entry in model.policy.optimizer.state.values():
        for name in entry.keys() - {"step"}:
            entry[name] = entry[name] * 0.5


def halve_a_moment_in_place(model):
    for entry in model.policy.optimizer.state.values():
        for name in entry.keys() - {"step"}:
            entry[name] *= 0.5


def reset_the_counters(model):
    for entry in model.policy.optimizer.state.values():
        entry["step"].zero_()


def reset_one_counter(model):
    model.policy.optimizer.state[model.policy.log_std]["step"] = th.tensor(1.0)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD with momentum", "RMSprop"])
@pytest.mark.parametrize(
    "change",
    [clear_the_state, replace_the_state, forget_one_parameter, replace_a_moment, halve_a_moment_in_place],
)
def test_changes_of_the_optimizers_state_take_effect(change, optimizer):
    assert_changes_alike(change, optimizer=optimizer)


@pytest.mark.parametrize("change", [reset_the_counters, reset_one_counter])
def test_changes_of_the_step_counters_take_effect(change):
    assert_changes_alike(change, optimizer="Adam")


def test_training_uses_an_entry_of_the_state_that_replaced_an_equal_one():
    assert_changes_alike(replace_an_entry, has_an_effect=False)


# Settings of the groups


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("Adam", {"betas": (0.5, 0.9)}),
        ("Adam", {"eps": 0.1}),
        ("Adam", {"weight_decay": 0.1}),
        ("Adam", {"maximize": True}),
        ("AdamW", {"weight_decay": 0.3}),
        ("AdamW", {"decoupled_weight_decay": False}),
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"weight_decay": 0.1}),
        ("SGD with momentum", {"momentum": 0}),
        ("SGD with momentum", {"nesterov": True, "dampening": 0}),
        ("RMSprop", {"alpha": 0.5}),
    ],
)
def test_changes_of_a_groups_settings_take_effect(optimizer, settings):
    def change(model):
        for group in model.policy.optimizer.param_groups:
            group.update(settings)

    assert_changes_alike(change, optimizer=optimizer)


def test_the_schedule_overwrites_a_learning_rate_that_a_callback_sets_as_in_sb3():
    def change(model):
        model.policy.optimizer.param_groups[0]["lr"] = 1.0

    assert_changes_alike(change, has_an_effect=False)


def test_momentum_can_be_switched_off_and_on_again():
    def change(model):
        group = model.policy.optimizer.param_groups[0]
        group["momentum"] = 0.9 - group["momentum"]

    assert_changes_alike(change, optimizer="SGD with momentum", before=(1, 3))


def test_changed_defaults_affect_new_groups_only():
    def change(model):
        model.policy.optimizer.defaults["lr"] = 1.0
        model.policy.optimizer.defaults["weight_decay"] = 1.0

    assert_changes_alike(change, has_an_effect=False)


def add_a_group(model):
    model.policy.optimizer.add_param_group({"params": [th.nn.Parameter(th.ones(3))]})


def test_a_group_of_a_parameter_outside_the_policy_is_no_obstacle():
    # SB3 gives it the schedule's rate, PPOPlus leaves it alone
    sb3, ours = (trained(algorithm, add_a_group, before=(1,)) for algorithm in (PPO, PPOPlus))
    assert_same_training(sb3, ours, learning_rates=False)


def test_parameters_that_change_their_group_are_followed():
    def change(model):
        (group,) = model.policy.optimizer.param_groups
        moved = group["params"].pop()
        model.policy.optimizer.add_param_group({**group, "params": [moved], "weight_decay": 0.5})

    assert_changes_alike(change, before=(1,), learning_rate=1e-2)


def test_a_new_order_of_the_parameters_takes_effect():
    def change(model):
        model.policy.optimizer.param_groups[0]["params"].reverse()

    assert_changes_alike(change, has_an_effect=False)


def test_a_parameter_that_is_removed_from_the_optimizer_does_not_change():
    def change(model):
        optimizer = model.policy.optimizer
        del optimizer.state[optimizer.param_groups[0]["params"].pop(0)]

    assert_changes_alike(change, before=(2,))


# The optimiser and its methods


@pytest.mark.parametrize("optimizer_class", [Adam, RMSprop, th.optim.NAdam])
def test_a_new_optimizer_is_used(optimizer_class):
    def change(model):
        model.policy.optimizer = optimizer_class(model.policy.parameters(), lr=1e-2)

    assert_changes_alike(change)


class HalfGradients(Adam):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5 if parameter.dim() == 1 else 2.0)
        return super().step(closure)


def test_a_new_class_of_the_optimizer_is_used():
    def change(model):
        model.policy.optimizer.__class__ = HalfGradients

    assert_changes_alike(change, before=(2,))


def invert_gradients(optimizer, *_):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.neg_()


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_the_optimizers_step_run(when):
    def change(model):
        def hook(optimizer, *_):
            for parameter in model.policy.parameters():
                (parameter.grad if when == "pre" else parameter.data).mul_(0.5)

        getattr(model.policy.optimizer, f"register_step_{when}_hook")(hook)

    # Not Adam: scaling all gradients would change nothing
    assert_changes_alike(change, before=(2,), optimizer="SGD")


def test_hooks_of_every_optimizers_step_run():
    handles = []

    def change(model):
        handles.append(register_optimizer_step_pre_hook(invert_gradients))

    try:
        models = []
        for algorithm in (PPO, PPOPlus):
            models.append(trained(algorithm, change, before=(2,)))
            handles.pop().remove()
    finally:
        for handle in handles:
            handle.remove()
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_a_learning_rate_scheduler_of_torch_takes_effect():
    def change(model):
        LambdaLR(model.policy.optimizer, lambda _: 0.5)

    assert_changes_alike(change, before=(2,), has_an_effect=False)


@pytest.mark.parametrize("owner", ["instance", "class"])
def test_a_wrapped_step_is_called(owner, monkeypatch):
    step = Adam.step

    def change(model):
        import functools

        optimizer = model.policy.optimizer

        @functools.wraps(step)
        def inverted(self, *arguments):
            invert_gradients(self)
            return step(self, *arguments)

        if owner == "class":
            monkeypatch.setattr(Adam, "step", inverted)
        else:
            optimizer.step = inverted.__get__(optimizer)

    models = []
    for algorithm in (PPO, PPOPlus):
        models.append(trained(algorithm, change, before=(2,)))
        monkeypatch.undo()
        monkeypatch.setattr(replays, "REPLAY_AFTER", 3)
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_a_replaced_clipping_function_is_called(monkeypatch):
    def clip_by_value(parameters, max_norm):
        th.nn.utils.clip_grad_value_(parameters, 1e-3)
        return th.tensor(0.0)

    def change(model):
        monkeypatch.setattr(th.nn.utils, "clip_grad_norm_", clip_by_value)

    models = []
    for algorithm in (PPO, PPOPlus):
        models.append(trained(algorithm, change, before=(2,), optimizer="SGD"))
        monkeypatch.undo()
        monkeypatch.setattr(replays, "REPLAY_AFTER", 3)
    assert_same_training(*models)
    assert_has_an_effect(models[0], optimizer="SGD")


# Parameters


def layer(model):
    return model.policy.mlp_extractor.policy_net[2]


def freeze(model):
    layer(model).requires_grad_(not layer(model).weight.requires_grad)


def copy_data(model):
    for parameter in model.policy.parameters():
        parameter.data = parameter.data.clone()


def transpose_data(model):
    layer(model).weight.data = layer(model).weight.data.t()


def transpose_memory(model):
    # Its memory is read in another order
    weight = layer(model).weight
    weight.data = weight.data.as_strided((8, 8), (1, 8))


def shift_memory(model):
    vector = th.nn.utils.parameters_to_vector(model.policy.parameters())
    th.nn.utils.vector_to_parameters(vector * 0.5, model.policy.parameters())


def replace_a_parameter(model):
    # SB3's optimiser keeps the old parameter, which gets no gradient any more
    layer(model).weight = th.nn.Parameter(layer(model).weight.detach() * 0.5)


def clamp_in_place(model):
    # By ``data``, since autograd refuses a change that it sees before the backward pass
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.data.clamp_(-0.1, 0.1)


def tie_parameters(model):
    model.policy.mlp_extractor.value_net[2].weight = layer(model).weight


def share_memory_of_parameters(model):
    model.policy.mlp_extractor.value_net[2].weight.data = layer(model).weight.data


def share_memory_with_a_buffer(model):
    model.policy.register_buffer("spare", model.policy.log_std.data)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("before", [(0, 2), (2, 3)], ids=["first", "later"])
@pytest.mark.parametrize(
    "change",
    [
        freeze,
        transpose_data,
        transpose_memory,
        shift_memory,
        replace_a_parameter,
        clamp_in_place,
        tie_parameters,
        share_memory_of_parameters,
    ],
)
def test_changes_of_parameters_take_effect(change, before, optimizer):
    assert_changes_alike(change, before=before, optimizer=optimizer)


def test_training_goes_on_with_parameters_in_new_memory():
    assert_changes_alike(copy_data, has_an_effect=False)


def test_a_buffer_keeps_sharing_the_memory_of_a_parameter():
    _, ours = assert_changes_alike(share_memory_with_a_buffer, has_an_effect=False, before=(2,))
    assert th.equal(ours.policy.spare, ours.policy.log_std)


# Tensors that users keep


def test_a_state_dict_taken_before_training_shows_the_policys_present_parameters():
    """It is not a copy, as in SB3, so loading it changes nothing."""
    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm)
        held = model.policy.state_dict()
        model.learn(48)
        assert all(th.equal(value, held[name]) for name, value in model.policy.state_dict().items())
        model.policy.load_state_dict(held)
        models.append(model.learn(32, reset_num_timesteps=False))
    assert_same_training(*models)


def test_parameters_that_were_taken_before_training_can_be_set_after_it():
    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm)
        held = model.get_parameters()
        model.learn(48)
        model.set_parameters(held)
        models.append(model.learn(32, reset_num_timesteps=False))
    assert_same_training(*models)


def test_a_callback_can_change_parameters_through_tensors_that_it_keeps():
    class Clamp(BaseCallback):
        def _on_training_start(self):
            self.held = [parameter.detach() for parameter in self.model.policy.parameters()]
            self.arrays = [tensor.numpy() for tensor in self.held]

        def _on_rollout_start(self):
            self.held[0].clamp_(-0.01, 0.01)
            self.arrays[1][:] *= 0.5

        def _on_step(self):
            return True

    models = [build(algorithm).learn(80, Clamp()) for algorithm in (PPO, PPOPlus)]
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_a_callback_can_change_moments_through_tensors_that_it_keeps():
    class Halve(BaseCallback):
        held = ()

        def _on_rollout_start(self):
            for entry in self.held:
                entry["exp_avg"].mul_(0.5)
            self.held = self.held or list(map(dict, self.model.policy.optimizer.state.values()))

        def _on_step(self):
            return True

    models = [build(algorithm).learn(80, Halve()) for algorithm in (PPO, PPOPlus)]
    assert_same_training(*models)
    assert_has_an_effect(models[0])


def test_two_models_that_share_moments_keep_sharing_them():
    """In SB3 they share moments if set_parameters gets the state of another model without a copy."""
    models = []
    for algorithm in (PPO, PPOPlus):
        first, second = build(algorithm).learn(32), build(algorithm, seed=1)
        second.set_parameters(first.get_parameters())
        for model in (first, second, first):
            model.learn(32, reset_num_timesteps=False)
        models.append((first, second))
    for sb3, ours in zip(*models, strict=True):
        assert_same_training(sb3, ours)


def test_gradients_that_a_callback_keeps_do_not_change():
    class Hold(BaseCallback):
        def __init__(self):
            super().__init__()
            self.held = []

        def _on_rollout_start(self):
            self.held.append([parameter.grad for parameter in self.model.policy.parameters()])

        def _on_step(self):
            return True

    held = []
    for algorithm in (PPO, PPOPlus):
        callback = Hold()
        build(algorithm).learn(80, callback)
        held.append(callback.held)
    assert len(held[0]) == ROLLOUTS
    for sb3, ours in zip(*held, strict=True):
        for expected, actual in zip(sb3, ours, strict=True):
            assert (expected is None and actual is None) or th.equal(expected, actual)


def test_a_frozen_parameter_has_no_gradient():
    sb3, ours = (trained(algorithm, freeze, before=(2,)) for algorithm in (PPO, PPOPlus))
    for model in (sb3, ours):
        assert [p.grad is None for p in model.policy.parameters()] == [
            not p.requires_grad for p in model.policy.parameters()
        ]


def test_parameters_in_shared_memory_stay_there():
    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm)
        model.policy.share_memory()
        memory = [parameter.data_ptr() for parameter in model.policy.parameters()]
        models.append(model.learn(48))
        assert memory == [parameter.data_ptr() for parameter in model.policy.parameters()]
        assert all(parameter.is_shared() for parameter in model.policy.parameters())
    assert_same_training(*models)


def test_parameters_and_moments_stay_in_their_memory_between_updates():
    places = []

    def change(model):
        moments = [value for entry in model.policy.optimizer.state.values() for value in entry.values()]
        places.append([tensor.data_ptr() for tensor in [*model.policy.parameters(), *moments]])

    trained(PPOPlus, change, before=range(1, ROLLOUTS))
    assert len(places) == ROLLOUTS - 1 and all(place == places[0] for place in places)
    assert len({pointer for pointer in places[0]}) == len(places[0])


# Changes during an update


def during_update(change, at=(3, 10)):
    """Return a change that hooks into the policy, so that some minibatches change the model."""

    def hook_in(model):
        calls = []

        def hook(*_):
            if model.policy.training:
                calls.append(1)
                if len(calls) in at:
                    change(model)

        layer(model).register_forward_hook(hook)

    return hook_in


def slow_down(model):
    for group in model.policy.optimizer.param_groups:
        group["lr"] *= 0.1


@pytest.mark.parametrize("optimizer", ["Adam", "SGD with momentum"])
@pytest.mark.parametrize("before", [(0,), (2,)], ids=["first update", "later"])
@pytest.mark.parametrize(
    ("change", "has_an_effect"),
    [
        (slow_down, True),
        (lambda model: [slow_down(model), replace_the_list_of_groups(model)], True),
        (lambda model: [slow_down(model), replace_a_group(model)], True),
        (replace_a_group, False),
        (load_a_copy_of_its_state, False),
        (clear_the_state, True),
        (replace_the_state, True),
        (halve_a_moment_in_place, True),
        (freeze, True),
        (copy_data, False),
        (shift_memory, True),
        (clamp_in_place, True),
        (add_a_group, False),
    ],
    ids=[
        "learning rate",
        "list of groups",
        "group",
        "equal group",
        "loaded state",
        "cleared state",
        "replaced state",
        "moments",
        "frozen",
        "new memory",
        "shifted memory",
        "clamped",
        "added group",
    ],
)
def test_changes_during_an_update_take_effect(change, has_an_effect, before, optimizer):
    settings = {"optimizer": optimizer, "before": before}
    sb3, ours = (trained(algorithm, during_update(change), **settings) for algorithm in (PPO, PPOPlus))
    assert_same_training(sb3, ours, learning_rates=change is not add_a_group)
    if has_an_effect:
        assert_has_an_effect(sb3, optimizer=optimizer)


@pytest.mark.parametrize("before", [(0,), (2,)], ids=["first update", "later"])
@pytest.mark.parametrize("optimizer_class", [Adam, th.optim.NAdam])
def test_an_optimizer_that_is_replaced_during_an_update_is_used(optimizer_class, before):
    def change(model):
        model.policy.optimizer = optimizer_class(model.policy.parameters(), lr=1e-2)

    assert_changes_alike(during_update(change), before=before)


@pytest.mark.parametrize("before", [(0,), (2,)], ids=["first update", "later"])
def test_optimizer_hooks_that_are_added_during_an_update_run_from_the_next_update_on(before):
    def change(model):
        model.policy.optimizer.register_step_pre_hook(invert_gradients)

    sb3, ours = (trained(algorithm, during_update(change, at=(3,)), before=before) for algorithm in (PPO, PPOPlus))
    # PPOPlus looks for hooks only before each update, so these models differ
    with pytest.raises(AssertionError):
        assert_same_training(sb3, ours)


def test_an_error_during_an_update_leaves_parameters_and_moments_in_their_memory():
    class Stop(Exception):
        pass

    def stop(model):
        raise Stop

    models = []
    for algorithm in (PPO, PPOPlus):
        model = build(algorithm).learn(32)
        memory = [parameter.data_ptr() for parameter in model.policy.parameters()]
        with pytest.raises(Stop):
            model.learn(32, Change(during_update(stop), before=(0,)), reset_num_timesteps=False)
        assert memory == [parameter.data_ptr() for parameter in model.policy.parameters()]
        # Only PPOPlus counts the unfinished epoch
        model._n_updates = 0
        models.append(model)
    assert_same_training(*models)
