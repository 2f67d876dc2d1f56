import numpy as np
import pytest
from environments import SMALL_NET, ToyEnv
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env
from states import written_and_read

from sb3_ppo_plus import PPOPlus, ResumableEnv
from sb3_ppo_plus.resuming.callback_state import callback_states, set_callback_states


class Counts(BaseCallback):
    """Has a state, and the methods that save it."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def _on_step(self):
        self.total += self.n_calls
        return True

    def get_state(self):
        return {"total": self.total}

    def set_state(self, state):
        self.total = state["total"]


def make_callbacks(folder):
    evaluation = EvalCallback(
        make_vec_env(ToyEnv, wrapper_class=ResumableEnv),
        callback_after_eval=StopTrainingOnNoModelImprovement(50),
        n_eval_episodes=2,
        eval_freq=5,
        log_path=str(folder),
        verbose=0,
    )
    return CallbackList(
        [
            evaluation,
            Counts(),
            EveryNTimesteps(7, Counts()),
            StopTrainingOnMaxEpisodes(1000),
            CheckpointCallback(1000, folder),
        ]
    )


def learn(callback):
    env = make_vec_env(ToyEnv, n_envs=2, seed=0)
    PPOPlus("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0, policy_kwargs=SMALL_NET).learn(
        64, callback
    )


def attributes(callbacks):
    evaluation, counts, every, episodes, checkpoints = callbacks.callbacks
    return {
        "best": evaluation.best_mean_reward,
        "last": evaluation.last_mean_reward,
        "results": evaluation.evaluations_results,
        "timesteps": evaluation.evaluations_timesteps,
        "lengths": evaluation.evaluations_length,
        "improvement": vars(evaluation.callback)["no_improvement_evals"],
        "best_so_far": evaluation.callback.last_best_mean_reward,
        "counts": (counts.total, every.callback.total),
        "trigger": every.last_time_trigger,
        "episodes": episodes.n_episodes,
        "n_calls": [one.n_calls for one in (evaluation, evaluation.callback, every.callback, checkpoints)],
    }


def test_new_callbacks_take_over_from_the_old_ones(tmp_path):
    old, new = make_callbacks(tmp_path), make_callbacks(tmp_path)
    learn(old)
    before = attributes(old)
    assert before["best"] > -np.inf and before["counts"][0] > 0 and before["trigger"] > 0 and before["episodes"] > 0
    set_callback_states(new, written_and_read(callback_states(old)))
    assert attributes(new) == before


def test_the_environments_of_an_evaluation_go_on(tmp_path):
    old, new = make_callbacks(tmp_path), make_callbacks(tmp_path)
    learn(old)
    set_callback_states(new, written_and_read(callback_states(old)))
    observations = [callbacks.callbacks[0].eval_env.reset() for callbacks in (old, new)]
    assert np.array_equal(*observations)


def test_an_evaluation_that_cannot_go_on_is_warned_of():
    old, new = (EvalCallback(make_vec_env(ToyEnv), log_path=str(name)) for name in ("old", "new"))
    states = callback_states(old)
    with pytest.warns(UserWarning, match="the environments of EvalCallback have no get_resume_state"):
        set_callback_states(new, states)


def test_only_what_an_evaluation_counts_is_restored(tmp_path):
    new = make_callbacks(tmp_path)
    states = callback_states(make_callbacks(tmp_path))
    states["EvalCallback 1"]["attributes"]["log_path"] = "elsewhere"
    set_callback_states(new, states)
    assert new.callbacks[0].log_path.startswith(str(tmp_path))


def test_a_list_around_callbacks_changes_nothing(tmp_path):
    old, new = Counts(), Counts()
    learn(old)
    set_callback_states(CallbackList([CallbackList([new])]), callback_states(CallbackList([old])))
    assert new.total == old.total > 0


def test_callbacks_of_one_class_are_told_apart_by_their_order():
    old, new = [Counts(), Counts()], [Counts(), Counts()]
    old[0].total, old[1].total = 3, 4
    set_callback_states(CallbackList(new), callback_states(CallbackList(old)))
    assert [one.total for one in new] == [3, 4]


def test_a_saved_state_without_its_callback_is_warned_of_unless_it_only_counts_calls():
    states = callback_states(CallbackList([Counts(), CheckpointCallback(1, ".")]))
    with pytest.warns(UserWarning, match=r"callbacks that were not given; it is dropped: \['Counts 1'\]"):
        set_callback_states(CallbackList([]), states)
