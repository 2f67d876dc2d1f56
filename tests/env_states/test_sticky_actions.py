"""Atari with sticky actions: ALE's state lacks the action that the next frames may repeat."""

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.atari_wrappers import AtariWrapper
from states import written_and_read

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.env_states.simulator_state import atari_state, set_atari_state
from sb3_ppo_plus.errors import PlainStateError

gym.register_envs(ale_py)


def played(env, actions):
    """Take steps, reset at the end of episodes, and return all outputs."""
    seen = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append((observation.tobytes(), float(reward), terminated, truncated, info["lives"]))
        if terminated or truncated:
            seen.append(env.reset()[0].tobytes())
    return seen


def without_last_action(state):
    """What ALE itself saves."""
    layer = state["layers"][-1][1]
    kind, saved = layer["ale"]
    layer["ale"] = (kind, saved["state"])


def n_diverging(make_env, n_positions, change=lambda state: None, n_steps=12):
    """Count the positions from which another environment goes on in another way than the saved one.

    The other one has played other actions, so that its last action is another one.
    """
    env, other = ResumableEnv(make_env()), ResumableEnv(make_env())
    random = np.random.default_rng(0)
    env.reset(seed=1)
    other.reset(seed=2)
    n_different = 0
    for _ in range(n_positions):
        played(env, random.integers(env.action_space.n, size=random.integers(1, 12)))
        played(other, random.integers(env.action_space.n, size=3))
        state = env.get_resume_state()
        change(state)
        actions = random.integers(env.action_space.n, size=n_steps)
        expected = played(env, actions)
        other.set_resume_state(written_and_read(state))
        n_different += played(other, actions) != expected
    return n_different


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: gym.make("ALE/Pong-v5", frameskip=1),
        lambda: gym.make("ALE/Pong-v5"),
        lambda: gym.make("ALE/Breakout-v5", frameskip=1, full_action_space=True),
        lambda: gym.make("ALE/Seaquest-v5", repeat_action_probability=0.6),
        lambda: AtariWrapper(gym.make("ALE/SpaceInvaders-v5", frameskip=1)),
    ],
    ids=["pong", "frameskip", "all actions", "stickier", "wrapper"],
)
def test_sticky_actions_go_on_where_the_state_of_ale_alone_does_not(make_env):
    assert n_diverging(make_env, 25, without_last_action) > 0
    assert n_diverging(make_env, 25) == 0


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_actions_that_never_or_always_stick_go_on_too(probability):
    assert n_diverging(lambda: gym.make("ALE/Pong-v5", repeat_action_probability=probability), 5) == 0


def test_a_game_goes_on_after_its_end_and_right_after_a_reset():
    env, other = (ResumableEnv(gym.make("ALE/Breakout-v5", frameskip=8)) for _ in range(2))
    env.reset(seed=1)
    other.reset(seed=2)
    env.action_space.seed(0)
    over = False
    while not over:
        _, _, over, _, _ = env.step(env.action_space.sample())
    state = env.get_resume_state()
    other.set_resume_state(state)
    for _ in range(10):
        assert env.reset()[0].tobytes() == other.reset()[0].tobytes()
        # A reset forgets the last action, so that another one before it changes nothing
        played(other, [2])
        other.set_resume_state(env.get_resume_state())
        assert played(env, [1, 2, 3, 2]) == played(other, [1, 2, 3, 2])


@pytest.mark.parametrize("probability", [0.25, 0.0])
@pytest.mark.parametrize("game", ["Qbert", "Tetris", "Amidar", "Pitfall2", "MiniatureGolf"])
def test_games_whose_reset_leaves_what_their_state_lacks_go_on_too(game, probability):
    env, other = (
        ResumableEnv(
            gym.make(f"ALE/{game}-v5", frameskip=1 if probability == 0 else 4, repeat_action_probability=probability)
        )
        for _ in range(2)
    )
    env.reset(seed=1)
    other.reset(seed=2)
    played(env, [0] * 20)
    for n_steps in range(4):
        env.reset()
        played(env, [0] * n_steps)
        played(other, [1] * 5)
        assert env.prove_resumable() is None
        other.set_resume_state(written_and_read(env.get_resume_state()))
        assert played(env, [0, 1, 0, 2, 1]) == played(other, [0, 1, 0, 2, 1])


def test_saving_changes_nothing_of_a_game():
    env, saved_often = (gym.make("ALE/Pong-v5", frameskip=1) for _ in range(2))
    env.reset(seed=1)
    saved_often.reset(seed=1)
    for action in np.random.default_rng(0).integers(6, size=200):
        atari_state(saved_often.unwrapped.ale)
        assert played(env, [action]) == played(saved_often, [action])


def test_a_game_without_sticky_actions_refuses_the_state_of_one_with_them():
    env, other = gym.make("ALE/Pong-v5"), gym.make("ALE/Pong-v5", repeat_action_probability=0.0)
    env.reset(seed=1)
    state = atari_state(env.unwrapped.ale)
    with pytest.raises(ValueError, match="the saved Atari game has sticky actions, this one has none"):
        set_atari_state(other.unwrapped.ale, state)


def test_sticky_continuous_actions_are_refused():
    env = ResumableEnv(gym.make("ALE/Breakout-v5", continuous=True))
    env.reset(seed=1)
    with pytest.raises(PlainStateError, match=r"AtariEnv\.ale may repeat the strength of a continuous action"):
        env.get_resume_state()
    ResumableEnv(gym.make("ALE/Breakout-v5", continuous=True, repeat_action_probability=0.0)).get_resume_state()
