"""The constructor, coefficients, logging, callbacks and errors of PPOPlus."""

import inspect
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import (
    ACTION_SPACES,
    SMALL_DICT,
    SMALL_NET,
    ToyEnv,
    logs_of_updates,
    make_env,
    record_logs,
    toy_envs,
)
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EventCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

import sb3_ppo_plus
from sb3_ppo_plus import Constant, Cosine, PPOPlus
from sb3_ppo_plus.callbacks import iterate_callbacks, notify_update_end

NAN, INF = float("nan"), float("inf")
STEPS = 32
SETTINGS = {"n_steps": STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
COEFFICIENTS = ["learning_rate", "critic_learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef"]


def build(env=None, policy="MlpPolicy", policy_kwargs=SMALL_NET, **settings):
    return PPOPlus(policy, make_env() if env is None else env, policy_kwargs=policy_kwargs, **SETTINGS | settings)


# The constructor


def test_sb3s_parameters_come_first_with_their_names_order_and_defaults():
    sb3 = list(inspect.signature(PPO.__init__).parameters.values())
    ours = list(inspect.signature(PPOPlus.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(sb3)]] == [(p.name, p.default, p.kind) for p in sb3]


def test_our_parameters_are_keyword_only_with_the_documented_defaults():
    n_sb3 = len(inspect.signature(PPO.__init__).parameters)
    ours = list(inspect.signature(PPOPlus.__init__).parameters.values())[n_sb3:]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours)
    defaults = {parameter.name: parameter.default for parameter in ours}
    assert defaults.items() >= {"critic_learning_rate": None, "pessimistic_value_clip": True, "amp": False}.items()


@pytest.mark.parametrize("method", ["learn", "load", "predict", "save", "set_parameters", "get_parameters", "set_env"])
def test_methods_keep_sb3s_parameters(method):
    parameters = [inspect.signature(getattr(cls, method)).parameters.values() for cls in (PPO, PPOPlus)]
    # Keyword arguments of our own come before **kwargs
    sb3, ours = ([(p.name, p.kind) for p in each if p.kind != p.VAR_KEYWORD] for each in parameters)
    assert ours[: len(sb3)] == sb3
    learn = inspect.signature(PPOPlus.learn).parameters
    assert learn["tb_log_name"].default == "PPOPlus"


def test_arguments_are_documented():
    for name in ("critic_learning_rate", "pessimistic_value_clip", "amp"):
        assert f":param {name}:" in PPOPlus.__doc__


def test_the_environment_may_be_a_registered_id():
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(16)
    assert model.num_timesteps == 16
    env = gym.make("CartPole-v1")
    assert model.predict(env.reset(seed=0)[0])[0] in (0, 1)


def test_public_names_are_importable():
    for name in sb3_ppo_plus.__all__:
        assert getattr(sb3_ppo_plus, name) is not None
    extractors = ("Mlp", "Cnn", "MultiInput")
    assert set(PPOPlus.policy_aliases) == {f"{name}{memory}Policy" for name in extractors for memory in ("", "Lstm")}


# Coefficients: numbers, schedules, callables and strings

FORMS = {
    "number": (0.25, 0.25, 0.25),
    "integer": (1, 1.0, 1.0),
    "numeric string": ("2.5e-1", 0.25, 0.25),
    "schedule": (Cosine(0.4, 0.2), 0.3, 0.2),
    "lin": ("lin_0.5_0.3", 0.4, 0.3),
    "cos": ("cos_0.4_0.2", 0.3, 0.2),
    "warmup_cos": ("warmup_cos_0.5_0.1", 0.1 + 0.4 * (1 + np.cos(np.pi * 0.4 / 0.9)) / 2, 0.1),
    "exp": ("exp_0.4_0.1", 0.2, 0.1),
    "callable": (lambda progress: 0.1 + progress, 0.6, 0.1),
    "SB3's": (LinearSchedule(0.5, 0.3, 1.0), 0.4, 0.3),
    "numpy": (np.float32(0.25), 0.25, 0.25),
}


@pytest.mark.parametrize(("given", "halfway", "end"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_each_coefficient_takes_each_form_and_logs_its_value(name, given, halfway, end):
    logs = logs_of_updates(build(**{name: given}), 2 * STEPS)
    assert [update[f"train/{name}"] for update in logs] == pytest.approx([halfway, end])


def test_coefficients_do_what_they_say():
    """Every coefficient moves the parameters in its own way."""
    reached = []
    for changed in (
        {},
        *({name: 0.01} for name in COEFFICIENTS),
        {"clip_range_vf": 0.01, "pessimistic_value_clip": False},
    ):
        model = build(**{"learning_rate": 3e-3, "n_epochs": 4} | changed)
        reached.append(model.learn(2 * STEPS).policy.parameters_to_vector())
    for i, first in enumerate(reached):
        assert not any(np.array_equal(first, second) for second in reached[:i])


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.125, 0.125), ("lin_0.5_0.3", 0.3), (lambda progress: 0.125 + progress, 0.125)],
    ids=["number", "string", "callable"],
)
def test_an_assigned_coefficient_takes_effect_at_the_next_update(name, value, expected):
    initial = {"clip_range_vf": 0.2, "critic_learning_rate": 1e-3}
    model = build(**initial)
    model.learn(STEPS)
    setattr(model, name, value)
    (logs,) = logs_of_updates(model, STEPS)
    assert logs[f"train/{name}"] == pytest.approx(expected)


def test_value_clipping_can_be_switched_on_and_off_between_updates():
    model = build()
    assert "train/clip_range_vf" not in logs_of_updates(model, STEPS)[0]
    model.clip_range_vf = "0.1"
    assert logs_of_updates(model, STEPS)[0]["train/clip_range_vf"] == 0.1
    model.clip_range_vf = None
    assert "train/clip_range_vf" not in logs_of_updates(model, STEPS)[0]


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate", "ent_coef", "vf_coef"])
def test_attributes_keep_what_was_given(name):
    for given in ("lin_0.1", 0.1, Constant(0.1)):
        model = build(**{name: given})
        assert getattr(model, name) == given
        model.learn(STEPS)
        assert getattr(model, name) == given


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_an_assigned_value_that_is_not_allowed_stops_the_update(name):
    model = build(clip_range_vf=0.2, critic_learning_rate=1e-3)
    model.learn(STEPS)
    setattr(model, name, -1.0)
    with pytest.raises(ValueError, match=name):
        model.learn(STEPS)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("later", [-0.1, NAN, INF])
def test_a_schedule_that_turns_bad_on_its_way_is_caught(name, later):
    model = build(**{name: lambda progress: 0.1 if progress > 0.1 else later})
    with pytest.raises(ValueError, match=rf"{name}.*(finite|negative)"):
        model.learn(STEPS)


# Logging

SB3_NAMES = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/fps",
    "time/iterations",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/approx_kl",
    "train/clip_fraction",
    "train/clip_range",
    "train/entropy_loss",
    "train/explained_variance",
    "train/learning_rate",
    "train/loss",
    "train/n_updates",
    "train/policy_gradient_loss",
    "train/std",
    "train/value_loss",
}
OUR_NAMES = {
    "train/ent_coef",
    "train/vf_coef",
    "train/critic_learning_rate",
    "train/grad_norm",
    "train/value_clip_fraction",
    "train/early_stopped",
    "train/n_epochs_done",
    "time/rollout_seconds",
    "time/update_seconds",
}


def test_every_update_logs_sb3s_names_and_ours():
    model = build(make_env(2))
    recorder = record_logs(model)
    model.learn(4 * 2 * STEPS)
    assert len(recorder.dumps) == 4
    for dump in recorder.dumps[1:]:
        assert dump.keys() == SB3_NAMES | OUR_NAMES
    assert SB3_NAMES - set(recorder.dumps[0]) == {name for name in SB3_NAMES if name.startswith("train/")}


def test_value_clipping_logs_its_range():
    logs = logs_of_updates(build(clip_range_vf=0.1), 2 * STEPS)
    assert all(update["train/clip_range_vf"] == 0.1 for update in logs)


def test_logged_values_of_an_update():
    n_updates = 3
    logs = logs_of_updates(build(ent_coef=0.01, vf_coef=0.4, learning_rate=1e-3, n_epochs=4), n_updates * STEPS)
    for update in logs:
        assert update["train/ent_coef"] == 0.01
        assert update["train/vf_coef"] == 0.4
        assert update["train/learning_rate"] == update["train/critic_learning_rate"] == 1e-3
        assert update["train/grad_norm"] > 0.0
        assert update["train/value_clip_fraction"] == 0.0
        assert update["train/early_stopped"] == 0
        assert update["train/n_epochs_done"] == 4
    assert [update["train/n_updates"] for update in logs] == [4, 8, 12]


def test_value_clip_fraction_is_the_share_of_values_that_left_the_range():
    # Before the first step nothing has moved; after it, everything by more than next to nothing
    settings = {"clip_range_vf": 1e-6, "batch_size": STEPS, "learning_rate": 1e-2}
    (first,), (both,) = (logs_of_updates(build(**settings, n_epochs=n_epochs), STEPS) for n_epochs in (1, 2))
    assert first["train/value_clip_fraction"] == 0.0
    assert both["train/value_clip_fraction"] == 0.5


def test_durations_are_those_of_the_clock():
    class Slow(ToyEnv):
        def step(self, action):
            time.sleep(0.002)
            return super().step(action)

    model = build(Slow())
    recorder = record_logs(model)
    started = time.perf_counter()
    model.learn(3 * STEPS)
    total = time.perf_counter() - started
    assert len(recorder.dumps) == 3
    assert all(dump["time/rollout_seconds"] > 0.002 * STEPS for dump in recorder.dumps)
    assert all(dump["time/update_seconds"] > 0.0 for dump in recorder.dumps[1:])
    logged = [
        dump.get(name, 0.0) for dump in recorder.dumps for name in ("time/rollout_seconds", "time/update_seconds")
    ]
    assert sum(logged) < total


@pytest.mark.parametrize("file_format", ["csv", "json", "tensorboard"])
def test_sb3s_loggers_write_what_is_logged(file_format, tmp_path):
    model = build()
    model.set_logger(configure(str(tmp_path), [file_format]))
    model.learn(3 * STEPS)
    model.logger.close()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes().decode(errors="ignore")
    assert all(name in content for name in OUR_NAMES)


def test_tensorboard_runs_are_called_ppo_plus(tmp_path):
    build(tensorboard_log=str(tmp_path)).learn(STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["PPOPlus_1"]


# Callbacks


class Recorder(BaseCallback):
    """Writes down when it was called, and stops training at the end of an update if told to."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.events = []
        self.stop_at = stop_at
        self.n_updates = 0

    def _on_step(self):
        self.events.append("step")
        return True

    def _on_rollout_start(self):
        self.events.append("rollout start")

    def _on_rollout_end(self):
        self.events.append("rollout end")

    def _on_training_end(self):
        self.events.append("training end")

    def on_update_end(self):
        self.n_updates += 1
        self.events.append(f"update end {self.model._n_updates}")
        return self.n_updates != self.stop_at


def test_on_update_end_comes_after_each_update():
    callback = Recorder()
    build(n_epochs=2).learn(2 * STEPS, callback)
    events = [event for event in callback.events if event != "step"]
    update = ["rollout start", "rollout end"]
    assert events == [*update, "update end 2", *update, "update end 4", "training end"]
    assert callback.events.count("step") == 2 * STEPS


def test_on_update_end_sees_the_updated_parameters_and_the_logged_values():
    class Look(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.before = self.model.policy.parameters_to_vector()

        def on_update_end(self):
            self.moved = not np.array_equal(self.model.policy.parameters_to_vector(), self.before)
            self.names = set(self.logger.name_to_value)
            return True

    callback = Look()
    build().learn(STEPS, callback)
    assert callback.moved
    assert callback.names >= {"train/loss", "train/grad_norm", "time/update_seconds"}


def test_on_update_end_comes_before_new_gsde_noise_is_drawn():
    class Noise(BaseCallback):
        seen = None

        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.seen = self.model.policy.action_dist.exploration_mat.clone()

        def on_update_end(self):
            self.same = th.equal(self.model.policy.action_dist.exploration_mat, self.seen)
            return True

    callback = Noise()
    build(use_sde=True).learn(STEPS, callback)
    assert callback.same


@pytest.mark.parametrize("stop_at", [1, 2])
def test_false_from_on_update_end_stops_training(stop_at):
    callback = Recorder(stop_at)
    env = make_env()
    model = build(env)
    model.learn(5 * STEPS, callback)
    assert callback.n_updates == stop_at
    assert model.num_timesteps == stop_at * STEPS
    assert toy_envs(env)[0].calls["step"] == stop_at * STEPS
    assert callback.events[-2:] == [f"update end {2 * stop_at}", "training end"]
    # The next learn is not stopped by it
    model.learn(2 * STEPS, reset_num_timesteps=False)
    assert model.num_timesteps == (stop_at + 2) * STEPS


def test_none_from_on_update_end_goes_on():
    class Forgetful(Recorder):
        def on_update_end(self):
            self.n_updates += 1

    callback = Forgetful()
    build().learn(2 * STEPS, callback)
    assert callback.n_updates == 2


@pytest.mark.parametrize(
    "nest",
    [
        lambda inner: [inner],
        lambda inner: CallbackList([CallbackList([inner])]),
        lambda inner: EveryNTimesteps(10, inner),
        lambda inner: EventCallback(CallbackList([StopTrainingOnMaxEpisodes(10**6), inner])),
        lambda inner: EvalCallback(make_env(), callback_after_eval=inner, eval_freq=10, n_eval_episodes=1, verbose=0),
        lambda inner: EvalCallback(make_env(), callback_on_new_best=inner, eval_freq=10, n_eval_episodes=1, verbose=0),
    ],
    ids=["list", "lists in lists", "EveryNTimesteps", "EventCallback", "after_eval", "on_new_best"],
)
def test_nested_callbacks_are_told_of_each_update_and_may_stop_training(nest):
    callback = Recorder(stop_at=2)
    model = build()
    callback.model = model
    model.learn(5 * STEPS, nest(callback))
    assert callback.n_updates == 2
    assert model.num_timesteps == 2 * STEPS


def test_all_callbacks_are_told_even_if_the_first_one_stops():
    first, second = Recorder(stop_at=1), Recorder()
    build().learn(5 * STEPS, [first, second])
    assert (first.n_updates, second.n_updates) == (1, 1)


def test_callbacks_without_the_hook_are_none_of_its_business():
    callbacks = [StopTrainingOnMaxEpisodes(1), Recorder()]
    assert list(iterate_callbacks(CallbackList(callbacks)))[1:] == callbacks
    assert notify_update_end(callbacks[0])


def test_callbacks_see_sb3s_names_in_their_locals():
    class Names(BaseCallback):
        def _on_step(self):
            self.at_step = {key: type(value) for key, value in self.locals.items()}
            return True

        def _on_rollout_end(self):
            self.at_end = {key: type(value) for key, value in self.locals.items()}
            self.advantages = self.locals["rollout_buffer"].advantages.copy()

    seen = []
    for algorithm in (PPO, PPOPlus):
        callback = Names()
        algorithm("MlpPolicy", make_env(2), policy_kwargs=SMALL_NET, **SETTINGS).learn(2 * STEPS, callback)
        seen.append(callback)
    sb3, ours = seen
    assert len(sb3.at_step) > 15
    for expected, actual in ((sb3.at_step, ours.at_step), (sb3.at_end, ours.at_end)):
        # All but what SB3's loop over the timeouts leaves behind
        names = expected.keys() - {"self", "idx", "done", "terminal_obs", "terminal_value"}
        assert names <= actual.keys()
        assert all(issubclass(actual[name], expected[name]) for name in names)
    # GAE is done before on_rollout_end
    assert np.array_equal(sb3.advantages, ours.advantages)
    assert sb3.advantages.any()


def test_rewards_that_a_callback_changes_are_honoured():
    class Double(BaseCallback):
        def _on_step(self):
            self.locals["rewards"] *= 2.0
            return True

        def _on_rollout_end(self):
            self.rewards = self.model.rollout_buffer.rewards.copy()

    results = []
    for algorithm in (PPO, PPOPlus):
        callback = Double()
        model = algorithm("MlpPolicy", make_env(p_terminate=0.2), policy_kwargs=SMALL_NET, **SETTINGS)
        model.learn(2 * STEPS, callback)
        results.append((callback.rewards, model.policy.parameters_to_vector()))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
    plain = build(make_env(p_terminate=0.2)).learn(2 * STEPS)
    assert not np.array_equal(plain.policy.parameters_to_vector(), results[1][1])


def test_false_from_on_step_ends_training_in_mid_rollout():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < STEPS + 5

    model = build()
    model.learn(5 * STEPS, Stop())
    assert model.num_timesteps == STEPS + 5
    assert model._n_updates == 2


def test_a_callback_that_raises_leaves_the_model_usable():
    class Boom(BaseCallback):
        def _on_step(self):
            raise RuntimeError("boom")

    model = build()
    with pytest.raises(RuntimeError, match="boom"):
        model.learn(STEPS, Boom())
    model.learn(STEPS)
    assert model._n_updates == 2


# The rest of SB3's interface


@pytest.mark.parametrize("policy_kwargs", [{}, {"action_dist": "beta"}, {"action_dist": "squashed_gaussian"}], ids=str)
def test_evaluate_policy_runs_it(policy_kwargs):
    model = build(policy_kwargs=SMALL_NET | policy_kwargs)
    mean, std = evaluate_policy(model, make_env(), n_eval_episodes=3)
    assert np.isfinite([mean, std]).all()


def test_the_progress_bar_runs():
    build().learn(STEPS, progress_bar=True)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_total_timesteps_are_sb3s(n_envs):
    models = [
        algorithm("MlpPolicy", make_env(n_envs), policy_kwargs=SMALL_NET, **SETTINGS).learn(50)
        for algorithm in (PPO, PPOPlus)
    ]
    assert models[0].num_timesteps == models[1].num_timesteps
    for model in models:
        model.learn(50, reset_num_timesteps=False)
    assert models[0].num_timesteps == models[1].num_timesteps


@pytest.mark.parametrize("action_dist", ["gaussian", "squashed_gaussian", "beta"])
def test_a_seed_makes_training_repeatable(action_dist):
    vectors = []
    for seed in (4, 4, 5):
        model = build(policy_kwargs=SMALL_NET | {"action_dist": action_dist}, ent_coef=0.01, seed=seed)
        vectors.append(model.learn(2 * STEPS).policy.parameters_to_vector())
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[0], vectors[2])


def test_verbose_early_stopping_is_announced_as_in_sb3(capsys):
    announced = []
    for algorithm in (PPO, PPOPlus):
        model = algorithm(
            "MlpPolicy", make_env(), policy_kwargs=SMALL_NET, **SETTINGS, verbose=1, target_kl=1e-3, learning_rate=1e-2
        )
        model.learn(STEPS)
        lines = capsys.readouterr().out.splitlines()
        announced.append([line for line in lines if line.startswith("Early stopping")])
    assert announced[0]
    assert announced[1] == announced[0]


# Bad input: the argument, its value and what is allowed, before any environment step


def assert_refused(error, *patterns, env_kwargs=None, **arguments):
    """The error's message holds every pattern, and the environment was not stepped."""
    env = make_env(**env_kwargs or {})
    with pytest.raises(error) as caught:
        build(env, **arguments)
    for pattern in patterns:
        assert pattern in str(caught.value), f"{pattern!r} not in {caught.value}"
    assert toy_envs(env)[0].calls["step"] == 0


BAD_VALUES = [-0.1, -1, NAN, INF, -INF, "-0.1", "nan", "lin_-0.1", "lin_0.1_-0.1", "cos_nan"]


@pytest.mark.parametrize("value", BAD_VALUES, ids=str)
@pytest.mark.parametrize("name", [name for name in COEFFICIENTS if name != "clip_range_vf"])
def test_coefficients_that_are_negative_or_not_finite_are_refused(name, value):
    assert_refused(ValueError, name, repr(value), **{name: value})


@pytest.mark.parametrize("value", [INF, "-0.1", "nan", "lin_0.1_-0.1"], ids=str)
def test_value_clip_ranges_that_are_negative_or_not_finite_are_refused(value):
    assert_refused(ValueError, "clip_range_vf", repr(value), clip_range_vf=value)


@pytest.mark.parametrize("value", [0, -1, -0.1, NAN])
def test_sb3s_own_check_of_the_value_clip_range_stays(value):
    assert_refused(AssertionError, "`clip_range_vf` must be positive", clip_range_vf=value)


UNKNOWN_STRINGS = ["linear_1e-3", "lin", "lin_", "lin_a", "exp_1e-3", "cos_1_2_3", "", "1e-3_1e-4", "step_1"]


@pytest.mark.parametrize("value", UNKNOWN_STRINGS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_unknown_schedule_strings_are_refused(name, value):
    assert_refused(ValueError, name, repr(value), "lin_3e-4", "warmup_cos_3e-4", **{name: value})


@pytest.mark.parametrize("value", [[0.1], {"a": 1}, True, object, b"lin_1"], ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_of_another_type_are_refused(name, value):
    assert_refused((TypeError, ValueError), name, **{name: value})


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("schedule", [lambda progress: -1.0, lambda progress: NAN], ids=["negative", "nan"])
def test_callables_that_start_with_a_bad_value_are_refused(name, schedule):
    assert_refused(ValueError, name, **{name: schedule})


@pytest.mark.parametrize("name", ["learning_rate", "ent_coef"])
def test_callables_that_return_no_number_are_refused(name):
    assert_refused(ValueError, name, "progress_remaining", **{name: lambda progress: "fast"})
    assert_refused(TypeError, name, "progress_remaining", **{name: lambda: 1.0})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("action_dist", "gamma", ("gaussian", "squashed_gaussian", "beta")),
        ("features_extractor_class", "vit", ("transformer", "impala_cnn", "nature_cnn", "flatten", "combined")),
        ("optimizer_class", "lion", ("adam", "adamw", "sgd", "rmsprop")),
        ("activation_fn", "swish", ("tanh", "relu", "elu", "gelu", "leaky_relu", "silu")),
    ],
)
def test_unknown_names_are_refused(name, value, allowed):
    assert_refused(ValueError, name, repr(value), *allowed, policy_kwargs={name: value})


def test_unsuitable_arguments_of_distributions_and_extractors_are_refused():
    beta = {"action_dist": "beta"}
    median, mode = {"deterministic": "median"}, {"mode": True}
    allowed = ("deterministic", "'median'", "mean", "mode")
    assert_refused(ValueError, *allowed, policy_kwargs=beta | {"action_dist_kwargs": median})
    allowed = ("action_dist_kwargs", "'mode'", "deterministic")
    assert_refused(TypeError, *allowed, policy_kwargs=beta | {"action_dist_kwargs": mode})
    transformer = {"features_extractor_class": "transformer", "features_extractor_kwargs": {"seq_len": 2}}
    assert_refused(ValueError, "seq_len must divide the observation's size 3, got 2", policy_kwargs=transformer)
    assert_refused(TypeError, "nonsense", policy_kwargs={"nonsense": 1})


@pytest.mark.parametrize("name", ["discrete", "multi_discrete", "multi_binary"])
@pytest.mark.parametrize("action_dist", ["beta", "squashed_gaussian"])
def test_bounded_distributions_need_a_box(action_dist, name):
    env_kwargs = {"action_space": ACTION_SPACES[name]}
    patterns = (f'action_dist="{action_dist}"', "Box", str(ACTION_SPACES[name]), "gaussian")
    assert_refused(ValueError, *patterns, env_kwargs=env_kwargs, policy_kwargs={"action_dist": action_dist})


@pytest.mark.parametrize("low", [-INF, [-1.0, -INF]], ids=["both", "one"])
@pytest.mark.parametrize("action_dist", ["beta", "squashed_gaussian"])
def test_bounded_distributions_need_finite_bounds_and_say_what_to_do(action_dist, low):
    space = spaces.Box(np.broadcast_to(np.float32(low), 2), np.ones(2, np.float32))
    patterns = (f'action_dist="{action_dist}"', "finite bounds", str(space), "TransformAction", '"gaussian"')
    assert_refused(
        ValueError, *patterns, env_kwargs={"action_space": space}, policy_kwargs={"action_dist": action_dist}
    )


@pytest.mark.parametrize("action_dist", ["gamma", "beta", "squashed_gaussian"])
def test_a_bad_distribution_is_refused_for_an_env_given_by_its_id_too(action_dist):
    with pytest.raises(ValueError, match=rf"action_dist.*{action_dist}"):
        PPOPlus("MlpPolicy", "CartPole-v1", policy_kwargs={"action_dist": action_dist}, device="cpu")


def test_infinite_bounds_without_a_bounded_distribution_meet_sb3s_own_check():
    space = spaces.Box(-INF, INF, (2,), np.float32)
    assert_refused(AssertionError, "finite lower and upper bound", env_kwargs={"action_space": space})


@pytest.mark.parametrize("amp", ["fp16", "fp8", 16])
def test_bad_precisions_are_refused(amp):
    assert_refused(ValueError, "amp", repr(amp), "'bf16'", amp=amp)


def test_unknown_arguments_are_refused():
    assert_refused(TypeError, "critic_lr", critic_lr=1e-3)


def test_sb3s_own_checks_stay():
    assert_refused(AssertionError, "`batch_size` must be greater than 1", batch_size=1)
    assert_refused(AssertionError, "`n_steps * n_envs` must be greater than 1", n_steps=1)
    assert_refused(ValueError, "MultiInputPolicy", env_kwargs={"observation_space": SMALL_DICT})
    assert_refused(ValueError, "continuous actions", env_kwargs={"action_space": spaces.Discrete(2)}, use_sde=True)
    assert_refused(ValueError, "unknown", "Policy", policy="LstmPolicy")
    with pytest.warns(UserWarning, match="truncated mini-batch of size 2"):
        build(n_steps=32, batch_size=30)


def test_normalising_outside_the_frame_stack_warns_for_a_transformer_only():
    kwargs = {"features_extractor_class": "transformer", "features_extractor_kwargs": {"seq_len": 2}}
    with pytest.warns(UserWarning, match="VecNormalize wraps VecFrameStack"):
        build(VecNormalize(VecFrameStack(make_env(), 2)), policy_kwargs=kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(VecFrameStack(VecNormalize(make_env()), 2), policy_kwargs=kwargs)
        build(VecNormalize(VecFrameStack(make_env(), 2)))
