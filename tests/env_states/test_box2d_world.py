"""The order in which a Box2D world gives its free places to fixtures."""

import Box2D
import gymnasium as gym
import pytest
from replayed_environments import drawn, outputs

from sb3_ppo_plus.env_states.box2d_world import emptied_world, free_nodes, set_free_nodes, world_of


def used_world(n_episodes=2):
    """A world of BipedalWalker, after some episodes."""
    env = gym.make("BipedalWalker-v3").unwrapped
    env.reset(seed=0)
    for episode in range(n_episodes):
        outputs(env, drawn(env, 60, episode))
        env.reset()
    # The environment is kept, since its objects are in the world
    return env, emptied_world(env)


def test_a_new_world_gives_its_places_in_order_and_a_used_one_does_not():
    assert free_nodes(Box2D.b2World()) == [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29]
    _env, world = used_world()
    order = free_nodes(world)
    assert len(order) > 200
    assert sorted(order) != order


def test_looking_at_the_order_does_not_change_it():
    _env, world = used_world()
    order = free_nodes(world)
    for at_least in (0, 10, 300):
        assert free_nodes(world, at_least)[: len(order)] == order[: len(free_nodes(world, at_least))]
    assert world.bodyCount == 0


@pytest.mark.parametrize("n_episodes", [0, 1, 3])
def test_a_world_takes_the_order_of_another_one(n_episodes):
    _env, world = used_world()
    order = free_nodes(world)
    _other_env, other = used_world(n_episodes)
    for _ in range(2):
        set_free_nodes(other, order)
        assert free_nodes(other)[: len(order)] == order
    new = Box2D.b2World()
    set_free_nodes(new, order)
    assert free_nodes(new)[: len(order)] == order


def test_a_larger_world_takes_the_order_of_a_smaller_one():
    _env, world = used_world()
    set_free_nodes(world, free_nodes(Box2D.b2World()))
    order = free_nodes(world)
    assert order == sorted(order)


@pytest.mark.parametrize("order", [[0, 2], [5, 5, 5], [-1], [10**9], [0, 1, 3, 5.5], ["a"]])
def test_numbers_that_no_world_has_are_an_error(order):
    with pytest.raises(ValueError, match="are no order of the nodes of a Box2D world"):
        set_free_nodes(Box2D.b2World(), order)


def test_only_worlds_of_gymnasiums_environments_are_emptied():
    class Own(gym.Env):
        world = Box2D.b2World()

    assert world_of(Own()) is None
    assert world_of(gym.make("CartPole-v1").unwrapped) is None
    assert world_of(gym.make("CarRacing-v3").unwrapped) is not None
