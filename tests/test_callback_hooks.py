"""Callbacks: the hook at the end of each update, and what SB3's own hooks see and may do."""

import numpy as np
import pytest
import torch as th
from environments import SMALL_NET, make_env, toy_envs
from models import SETTINGS, STEPS, build
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EventCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.callback_hooks import iterate_callbacks, notify_update_end


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


def test_callbacks_without_on_update_end_are_passed_over():
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
