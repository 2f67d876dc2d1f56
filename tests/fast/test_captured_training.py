"""Compiled graphs that are replayed in fixed memory, as on a GPU, train as those that are called, bit for bit."""

import copy
import gc
import weakref

import cloudpickle
import pytest
import torch as th
from gpu_checks.capture import PretendedReplay, replays_of
from gpu_checks.cases import CASES, N_STEPS, ROLLOUT, make_toys, parameters_of
from stable_baselines3.common.callbacks import BaseCallback
from states import assert_same_training

from sb3_ppo_plus import PPOPlus, ResumableEnv, TrainingCheckpoint
from sb3_ppo_plus.fast import captured

# Their gradient step is compiled; "cnn bf16" is "bf16" and "cnn"
NAMES = [name for name, case in CASES.items() if not case.runs_eagerly and name not in ("cnn bf16", "reduce-overhead")]
# The others are for `make test-all`: they differ in what they compute, not in what is captured
QUICK = ("box", "masks", "critic_lr, clip_vf")


@pytest.fixture
def both(monkeypatch, graphs_without_code):
    """Run something without and with capture, and return both results."""

    def run(function):
        called = function()
        with monkeypatch.context() as patch:
            patch.setitem(captured.REPLAYS, "cpu", PretendedReplay)
            return called, function()

    return run


def build(name="box", **settings):
    return CASES[name].build("cpu", compile=True, **settings)


def assert_same(models, is_acting=True):
    assert_same_training(*models)
    in_update, in_rollout = replays_of(models[1])
    assert in_update > 3 and (in_rollout > 3) is is_acting
    assert replays_of(models[0]) == [0, 0]


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in NAMES]
)
def test_every_kind_of_policy_trains_alike(both, name):
    def run():
        model = build(name).learn(ROLLOUT * 3)
        return model.learn(ROLLOUT * 2, reset_num_timesteps=False), th.get_rng_state()

    (called, numbers), (replayed, same_numbers) = both(run)
    assert_same((called, replayed))
    assert th.equal(numbers, same_numbers)
    assert called.logger.name_to_value["train/loss"] == replayed.logger.name_to_value["train/loss"]


@pytest.mark.filterwarnings("error:compile=True")
def test_minibatches_of_two_sizes_have_a_graph_each(both):
    models = both(lambda: build(batch_size=12).learn(ROLLOUT * 4))
    assert_same(models)
    assert len(models[1]._execution.gradient_step._graphs.captured) == 2


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.heavy
def test_code_of_inductor_is_replayed(monkeypatch):
    models = [build().learn(ROLLOUT * 3)]
    monkeypatch.setitem(captured.REPLAYS, "cpu", PretendedReplay)
    models.append(build().learn(ROLLOUT * 3))
    assert_same(models)


def bias(model):
    return model.policy.mlp_extractor.policy_net[0].bias


class Changes(BaseCallback):
    """Makes one change after the other, each between two rollouts or during one, and notes what the parameters are.

    :param at: the step of the rollout before which it changes; None: between rollouts
    """

    def __init__(self, changes, *, at=None):
        super().__init__()
        # Twice each, because the second may find what the first has left
        self.changes = [change for change in changes for _ in range(2)]
        self.at, self.kept, self.seen = at, [], []

    def _on_step(self):
        if self.at is not None and self.n_calls % N_STEPS == self.at:
            self._change()
        return True

    def _on_rollout_start(self):
        if self.at is None:
            self._change()

    def _change(self):
        self.seen.append(parameters_of(self.model))
        # The first rollouts capture
        n_changed = len(self.seen) - 3
        if 0 <= n_changed < len(self.changes):
            self.changes[n_changed](self.model, self.kept)


@th.no_grad()
def add_in_place(model, kept):
    for parameter in model.policy.parameters():
        parameter.add_(0.01)


def add_to_data(model, kept):
    bias(model).data.add_(0.01)


def replace_data(model, kept):
    # Freed at once, so that the next tensor may get its memory
    bias(model).data = bias(model).data * 0.9 + 0.01


def replace_all(model, kept):
    for parameter in model.policy.parameters():
        parameter.data = parameter.data * 0.99 + 0.001


def swap(model, kept):
    """Puts the average of former parameters in and takes it out again, as in an evaluation of it."""
    parameter = bias(model)
    if kept:
        parameter.data = kept.pop()
    else:
        kept.append(parameter.data)
        parameter.data = parameter.data * 0.5


def swap_and_look(model, kept):
    """What was taken out keeps its values."""
    if not kept:
        kept += [bias(model).data, bias(model).data.clone()]
        bias(model).data = bias(model).data * 0.5
    assert th.equal(kept[0], kept[1])


def replace_parameter(model, kept):
    layer = model.policy.mlp_extractor.policy_net[0]
    model.policy.log_std.data = model.policy.log_std.data.clone()
    layer.bias.data = layer.bias.data.clone()
    layer.weight.data = layer.weight.data.clone()


def set_parameters(model, kept):
    parameters = copy.deepcopy(model.get_parameters())
    for value in parameters["policy"].values():
        value.mul_(0.99)
    model.set_parameters(parameters)


def load_optimizer(model, kept):
    state = copy.deepcopy(model.policy.optimizer.state_dict())
    for entry in state["state"].values():
        entry["exp_avg"].mul_(0.5)
    model.policy.optimizer.load_state_dict(state)


def forget_optimizer_state(model, kept):
    model.policy.optimizer.state.clear()


def freeze_and_thaw(model, kept):
    parameter = bias(model)
    parameter.requires_grad_(not parameter.requires_grad)


CHANGES = (
    add_in_place,
    add_to_data,
    replace_data,
    replace_all,
    swap,
    swap_and_look,
    replace_parameter,
    set_parameters,
    load_optimizer,
    forget_optimizer_state,
    # What was replaced is copied in each step
    add_to_data,
)


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize(
    "at",
    [None, 5, *(pytest.param(at, marks=pytest.mark.heavy) for at in (0, 15))],
    ids=["between", "during", "first", "last"],
)
def test_what_callbacks_change_is_followed(both, at):
    def run():
        callback = Changes(CHANGES, at=at)
        model = build(n_epochs=2).learn(ROLLOUT * (2 * len(CHANGES) + 6), callback)
        return model, callback.seen

    (called, expected), (replayed, seen) = both(run)
    different = [index for index, pair in enumerate(zip(expected, seen, strict=True)) if not th.equal(*pair)]
    assert not different, f"since {CHANGES[max(0, different[0] - 4) // 2].__name__}"
    assert_same((called, replayed))


@pytest.mark.filterwarnings("ignore:compile=True")
@pytest.mark.heavy
def test_parameters_that_are_frozen_and_thawed_are_followed(both):
    assert_same(both(lambda: build().learn(ROLLOUT * 7, Changes([freeze_and_thaw]))))


@pytest.mark.filterwarnings("error:compile=True")
def test_changes_between_calls_of_learn_are_followed(both):
    def run():
        model, other = build().learn(ROLLOUT * 3), build(seed=1)
        model.set_parameters(other.get_parameters())
        model.learn(ROLLOUT * 3, reset_num_timesteps=False)
        model.policy.load_state_dict(other.policy.state_dict())
        model.policy.double().float()
        return model.learn(ROLLOUT * 3, reset_num_timesteps=False)

    assert_same(both(run))


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.heavy
def test_two_models_train_in_turns(both):
    def run():
        models = [build(seed=0), build(seed=1)]
        for _ in range(3):
            for model in models:
                model.learn(ROLLOUT * 2, reset_num_timesteps=False)
        return models

    called, replayed = both(run)
    for pair in zip(called, replayed, strict=True):
        assert_same(pair)


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.heavy
def test_saved_loaded_and_pickled_models_capture_anew(both, tmp_path):
    def run():
        model = build().learn(ROLLOUT * 3)
        model.save(tmp_path / "model")
        loaded = PPOPlus.load(tmp_path / "model", env=model.env, device="cpu")
        twin = cloudpickle.loads(cloudpickle.dumps(loaded))
        for one in (loaded, twin):
            one.set_random_seed(3)
            one.learn(ROLLOUT * 3, reset_num_timesteps=False)
        return loaded, twin

    called, replayed = both(run)
    for pair in zip(called, replayed, strict=True):
        assert_same(pair)


class Killed(Exception):
    pass


class Kill(BaseCallback):
    def _on_step(self):
        if self.num_timesteps > 3 * ROLLOUT + 9:
            raise Killed
        return True


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.heavy
def test_a_run_that_is_killed_and_resumed_draws_the_same_numbers(both, tmp_path_factory):
    def run():
        model, folder = build(wrapper=ResumableEnv), tmp_path_factory.mktemp("run")
        with pytest.raises(Killed):
            model.learn(ROLLOUT * 6, [TrainingCheckpoint(1, folder), Kill()])
        th.manual_seed(5)
        resumed = PPOPlus.resume(folder, make_toys(ResumableEnv), device="cpu")
        resumed.continue_learning()
        return resumed

    models = both(run)
    assert_same(models)
    assert_same_training(build(wrapper=ResumableEnv).learn(ROLLOUT * 6), models[1])


@pytest.mark.filterwarnings("error:compile=True")
def test_a_schedule_moves_the_numbers_of_a_replay(both):
    settings = {"learning_rate": "lin_1e-2", "clip_range": "lin_0.2"}
    assert_same(both(lambda: build(**settings).learn(ROLLOUT * 5)))


def graphs_of(model):
    return [*model._execution.gradient_step._graphs.captured, *model._execution.compiled_actor._graphs.captured]


def test_nothing_moves_while_nobody_moves_it(captures):
    model = build().learn(ROLLOUT * 5)
    # Adam's counter of steps is another tensor in each update
    assert [(graph.n_captures, len(graph._moving)) for graph in graphs_of(model)] == [(2, 1), (1, 0), (1, 0)]


def test_a_rollout_is_copied_once_in_an_update(captures, monkeypatch):
    copied, copy_each = [], captured.copy_each

    def noting(targets, sources):
        copied.extend(target.shape[0] for target in targets if target.dim() and target.shape[0] == ROLLOUT)
        copy_each(targets, sources)

    model = build().learn(ROLLOUT * 3)
    monkeypatch.setattr(captured, "copy_each", noting)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    # Observations and actions for the evaluation of the rollout; for the update also old values, old log-probabilities,
    # advantages and returns
    assert len(copied) == 2 + 6


def test_the_last_rollout_is_not_kept(captures):
    model = build().learn(ROLLOUT * 4)
    observations = weakref.ref(model.rollout_buffer.rollout().observations)
    model.rollout_buffer.reset()
    gc.collect()
    assert observations() is None
