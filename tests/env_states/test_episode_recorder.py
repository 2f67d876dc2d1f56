"""ResumableEnv by replay: episodes of environments that cannot be saved are played again."""

import json
import random
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, RescaleAction, StickyAction, TimeLimit
from replayed_environments import (
    HIDDEN_STEPS,
    Counting,
    Drawing,
    Global,
    Hidden,
    Nested,
    Simulated,
    assert_goes_on_in_another,
    drawn,
    outputs,
    replayed,
)
from stable_baselines3.common.monitor import Monitor
from states import encoded, written_and_read

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.env_states import episode_recorder
from sb3_ppo_plus.env_states.generator_state import GLOBAL_GENERATORS
from sb3_ppo_plus.envs.restarting_env import RestartingEnv
from sb3_ppo_plus.errors import PlainStateError, ReplayError


@pytest.mark.parametrize("n_before", [0, 1, 8, 9, 30])
@pytest.mark.parametrize("env_class", [Simulated, Counting, Nested])
def test_another_environment_goes_on_as_the_saved_one(env_class, n_before):
    assert_goes_on_in_another(lambda: replayed(env_class()), n_before)


@pytest.mark.parametrize(
    "wrap",
    [
        Monitor,
        Drawing,
        lambda env: StickyAction(env, 0.3),
        lambda env: RescaleAction(env, -3.0, 3.0),
        lambda env: FrameStackObservation(NormalizeObservation(env), 3),
        lambda env: TimeLimit(env, 4),
    ],
)
def test_wrappers_go_on_too(wrap):
    assert_goes_on_in_another(lambda: replayed(Monitor(wrap(Simulated()))))


def test_by_state_the_error_names_replay():
    env = ResumableEnv(Simulated())
    env.reset(seed=0)
    with pytest.raises(PlainStateError, match=r'Simulated\.body is a .*Body.*ResumableEnv\(env, by="replay"\)'):
        env.get_resume_state()


def test_another_word_for_by_is_an_error():
    with pytest.raises(ValueError, match="by must be one of 'state', 'replay', 'auto', got 'reply'"):
        ResumableEnv(Simulated(), by="reply")


def test_environments_that_share_the_global_generators_go_on():
    envs, others = ([replayed(Global()) for _ in range(2)] for _ in range(2))
    for index, env in enumerate((*envs, *others)):
        env.reset(seed=index)

    def in_turns(envs, seed):
        seen = []
        for actions in zip(drawn(envs[0], 6, seed), drawn(envs[1], 6, seed + 1), strict=True):
            seen += [outputs(env, [action]) for env, action in zip(envs, actions, strict=True)]
            # As SB3 does when it shuffles a rollout
            seen.append(np.random.permutation(5))
        return seen

    in_turns(envs, 0)
    states = [written_and_read(env.get_resume_state()) for env in envs]
    expected = in_turns(envs, 2)
    for env, state in zip(others, states, strict=True):
        env.set_resume_state(state)
    np.testing.assert_equal(in_turns(others, 2), expected)


def after_many_steps():
    """An environment that uses global generators, in mid-episode."""
    env = replayed(Global())
    env.reset(seed=0)
    outputs(env, drawn(env, 74))
    return env


def test_draws_of_others_from_a_global_generator_are_noticed_after_many_steps():
    env, other = after_many_steps(), replayed(Global())
    # As SB3 does after a rollout
    np.random.permutation(5)
    outputs(env, drawn(env, 2))
    state = env.get_resume_state()
    expected = outputs(env, drawn(env, 2))
    other.set_resume_state(state)
    np.testing.assert_equal(outputs(other, drawn(env, 2)), expected)


def test_after_many_steps_only_global_generators_that_the_environment_uses_are_read(monkeypatch):
    env = after_many_steps()
    read = []
    monkeypatch.setitem(GLOBAL_GENERATORS, "torch", lambda: read.append(1))
    outputs(env, drawn(env, 2))
    assert not read


def test_a_replay_leaves_the_global_generators_as_they_were_saved():
    env = replayed(Global())
    env.reset(seed=0)
    outputs(env, drawn(env, 5))
    state = env.get_resume_state()
    expected = (random.random(), np.random.random())
    env.set_resume_state(state)
    assert (random.random(), np.random.random()) == expected


def test_an_attribute_that_was_changed_during_the_episode_has_its_last_value():
    env, other = replayed(Counting()), replayed(Counting())
    env.reset(seed=0)
    other.reset(seed=1)
    outputs(env, drawn(env, 4))
    env.unwrapped.n_episodes = 40
    state = written_and_read(env.get_resume_state())
    other.set_resume_state(state)
    assert other.unwrapped.n_episodes == 40
    np.testing.assert_equal(outputs(other, drawn(env, 20)), outputs(env, drawn(env, 20)))


def test_the_environment_gets_its_saved_spaces_generators():
    env, other = replayed(Simulated()), replayed(Simulated())
    env.reset(seed=0)
    env.unwrapped.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64, seed=5)
    other.unwrapped.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64, seed=6)
    other.reset(seed=0)
    env.action_space.sample()
    other.set_resume_state(written_and_read(env.get_resume_state()))
    assert (other.action_space.sample() == env.action_space.sample()).all()


class Changed(Simulated):
    """Does something else from a step on."""

    change = 0

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.n_steps >= 3:
            observation = observation + (self.change == "observation")
            reward += self.change == "reward"
            terminated = terminated or self.change == "end"
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("observation", "at step 3 of 5 the observation is another one"),
        ("reward", r"at step 3 of 5 the reward is [-\d.]+, it was [-\d.]+"),
        ("end", "at step 3 of 5 the episode was terminated, it went on"),
    ],
)
def test_an_environment_that_does_something_else_is_an_error_that_names_the_step(monkeypatch, change, text):
    env, other = replayed(Changed()), replayed(Changed())
    env.reset(seed=0)
    other.reset(seed=0)
    outputs(env, drawn(env, 5))
    state = env.get_resume_state()
    monkeypatch.setattr(Changed, "step", lambda self, action, step=Changed.step: step(changed(self, change), action))
    with pytest.raises(ReplayError, match=f"the episode of Changed was replayed, and {text}"):
        other.set_resume_state(state)


def changed(env, change):
    object.__setattr__(env, "change", change)
    return env


def test_another_start_is_an_error_too(monkeypatch):
    env, other = replayed(Simulated()), replayed(Simulated())
    env.reset(seed=0)
    other.reset(seed=0)
    monkeypatch.setattr(Simulated, "start", lambda self: np.zeros(2))
    with pytest.raises(ReplayError, match="was replayed, and at the reset the observation is another one"):
        other.set_resume_state(env.get_resume_state())


@pytest.mark.parametrize(
    "action",
    [
        *(3, True, 0.5, None, np.int64(3), np.int32(3), np.bool_(True), np.float32(0.3), 2**70, "up", (1, 2)),
        *(np.array(3), np.ones(2, np.float32), np.ones((2, 1)), {"a": np.ones(2), "b": 1}, [np.float32(0.5)]),
    ],
)
def test_actions_come_back_with_their_types(action):
    class Keeps(gym.Env):
        observation_space = action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.iterator = iter(())
            return 0, {}

        def step(self, action):
            SEEN.append(action)
            return 0, 0.0, False, False, {}

    env, other = replayed(Keeps()), replayed(Keeps())
    env.reset(seed=0)
    other.reset(seed=0)
    actions = [action, action, 1, action, np.ones(3), np.ones(2), action, *([2] * 200), action]
    outputs(env, actions)
    SEEN.clear()
    other.set_resume_state(written_and_read(env.get_resume_state()))
    assert len(SEEN) == len(actions)
    for seen, expected in zip(SEEN, actions, strict=True):
        assert type(seen) is type(expected)
        assert encoded(seen) == encoded(expected)


SEEN = []


def test_an_action_that_the_environment_changes_in_place_is_recorded_as_it_was():
    class InPlace(Simulated):
        def step(self, action):
            output = super().step(action)
            action += 1
            return output

    assert_goes_on_in_another(lambda: replayed(InPlace()), 5, 4)


def test_options_and_seed_of_the_reset_are_done_again():
    class WithOptions(Simulated):
        def reset(self, *, seed=None, options=None):
            _, info = super().reset(seed=seed)
            self.body.position += (options or {}).get("offset", 0)
            return self.body.position.copy(), info

    env, other = replayed(WithOptions()), replayed(WithOptions())
    other.reset(seed=9)
    env.reset(seed=7, options={"offset": 3})
    outputs(env, drawn(env, 3))
    other.set_resume_state(written_and_read(env.get_resume_state()))
    np.testing.assert_equal(outputs(other, drawn(env, 20)), outputs(env, drawn(env, 20)))


def test_an_environment_that_nobody_has_seeded_goes_on():
    env, other = replayed(Simulated()), replayed(Simulated())
    env.reset()
    other.reset()
    outputs(env, drawn(env, 3))
    other.set_resume_state(written_and_read(env.get_resume_state()))
    np.testing.assert_equal(outputs(other, drawn(env, 20)), outputs(env, drawn(env, 20)))


def test_an_episode_without_an_end_is_warned_of_and_then_an_error(monkeypatch):
    monkeypatch.setattr(episode_recorder, "MANY_STEPS", 5)
    monkeypatch.setattr(episode_recorder, "MOST_STEPS", 8)
    monkeypatch.setattr(Simulated, "length", 100)
    env = replayed(Simulated())
    env.reset(seed=0)
    outputs(env, drawn(env, 5))
    with pytest.warns(UserWarning, match=r"an episode of Simulated has 5 steps.*TimeLimit"):
        env.get_resume_state()
    outputs(env, drawn(env, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.get_resume_state()
        outputs(env, drawn(env, 1))
    with pytest.raises(PlainStateError, match=r"has more than 8 steps.*TimeLimit"):
        env.get_resume_state()
    env.reset()
    env.get_resume_state()


def test_an_episode_that_began_without_the_recorder_is_an_error():
    inner = Simulated()
    inner.reset(seed=0)
    env = replayed(inner)
    outputs(env, drawn(env, 1))
    with pytest.raises(PlainStateError, match="the episode of Simulated was not recorded"):
        env.get_resume_state()


def test_the_record_takes_few_bytes():
    env = replayed(Simulated())
    env.reset(seed=0)
    env.unwrapped.length = 10**6
    sizes = []
    for _ in range(2):
        outputs(env, drawn(env, 1000))
        text, arrays = encoded(env.get_resume_state())
        sizes.append(len(json.dumps(text)) + len(arrays))
    # Two numbers of an action, and what tells observation, reward and end
    assert sizes[1] - sizes[0] <= 1000 * (2 * 8 + 13) + 100


def test_large_attributes_are_not_copied_at_each_reset():
    env = replayed(Simulated())
    env.unwrapped.data = np.zeros(2**20)
    env.reset(seed=0)
    env.reset()
    _, episode = env.get_resume_state()["layers"][-1]
    assert len(encoded(episode["start"])[1]) < 2**16
    assert len(encoded(episode["now"])[1]) >= 2**23


def test_constant_attributes_stay():
    env, other = (replayed(Counting(), constant=["n_episodes"]) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    env.reset()
    other.unwrapped.n_episodes = 7
    env.unwrapped.n_episodes = 50
    with pytest.raises(ReplayError, match="at the reset"):
        other.set_resume_state(env.get_resume_state())


def test_an_environment_with_methods_of_its_own_is_saved_by_them():
    class WithMethods(Simulated):
        def get_resume_state(self):
            return {"position": self.body.position}

        def set_resume_state(self, state):
            self.body.position = state["position"].copy()

    env, other = replayed(WithMethods()), replayed(WithMethods())
    env.reset(seed=0)
    other.reset(seed=1)
    assert [name for name, _ in env.get_resume_state()["layers"]] == ["WithMethods"]
    other.set_resume_state(env.get_resume_state())
    assert (other.unwrapped.body.position == env.unwrapped.body.position).all()


def test_a_state_that_was_saved_in_the_other_way_is_an_error_that_names_both():
    class Plain(Simulated):
        def reset(self, *, seed=None, options=None):
            observation, info = super().reset(seed=seed)
            self.body = 0
            return observation, info

    by_state, by_replay = ResumableEnv(Plain()), replayed(Plain())
    by_state.reset(seed=0)
    by_replay.reset(seed=0)
    with pytest.raises(ValueError, match="the saved state is of Plain, the environment is EpisodeRecorder"):
        by_replay.set_resume_state(by_state.get_resume_state())


def test_an_environment_that_restarts_is_recorded_again():
    class Fails(Simulated):
        def step(self, action):
            if self.np_random.random() < 0.2:
                raise RuntimeError("broken")
            return super().step(action)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_goes_on_in_another(lambda: replayed(RestartingEnv(Fails, max_restarts=10**6)), 60, 4)


def test_after_a_restart_an_environment_is_reset_once():
    class Counts(Simulated):
        n_resets = 0

        def reset(self, *, seed=None, options=None):
            Counts.n_resets += 1
            return super().reset(seed=seed)

        def step(self, action):
            raise RuntimeError("broken")

    env = replayed(RestartingEnv(Counts), constant=["make_env"])
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="is built anew"):
        env.step(np.zeros(2))
    env.reset()
    assert Counts.n_resets == 2


def test_a_wrapper_may_refer_to_the_environment():
    class Refers(gym.Wrapper):
        def __init__(self, env):
            super().__init__(env)
            self.inner = env.unwrapped

    assert_goes_on_in_another(lambda: replayed(Refers(Simulated())))


def test_the_spec_is_the_environments():
    assert replayed(gym.make("CartPole-v1")).spec.id == "CartPole-v1"
    assert gym.make(ResumableEnv(gym.make("CartPole-v1"), by="replay").spec).unwrapped is not None


def test_a_hidden_dependence_is_found_by_the_proof():
    env = replayed(Hidden())
    env.reset(seed=0)
    finding = env.prove_resumable()
    assert finding.is_error
    assert "the episode of Hidden was replayed" in finding.text or "goes on in another way" in finding.text
    assert HIDDEN_STEPS


@pytest.mark.parametrize("env_class", [Simulated, Counting, Global, Nested])
def test_the_proof_leaves_no_trace(env_class):
    env, twin = Monitor(env_class()), Monitor(env_class())
    proven = replayed(env)
    seen = []
    for each, does_prove in ((proven, True), (twin, False)):
        np.random.seed(0)
        random.seed(0)
        each.reset(seed=3)
        first = outputs(each, drawn(each, 4))
        if does_prove:
            assert each.prove_resumable() is None
        seen.append((first, outputs(each, drawn(each, 30)), np.random.random(), random.random()))
    np.testing.assert_equal(seen[0], seen[1])
