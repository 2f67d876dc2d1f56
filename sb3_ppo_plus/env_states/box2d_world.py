"""What a Box2D world keeps of earlier episodes: the order in which it gives free places to fixtures.

BipedalWalker and CarRacing have one world for all episodes. A reset empties it and fills it again. The world keeps
fixtures in the nodes of a tree, and takes a free node for each new one: the node that was freed last comes first. The
numbers of the nodes decide in which order contacts are solved, and so the last bits of every position.

Box2D tells no node's number. Here fixtures are put at places where nothing else is, and the node that has such a place
is the fixture's. Destroyed in the opposite order, they leave the order as it was.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from typing import Any

PACKAGE = "gymnasium.envs.box2d."
# Nodes that were never used, by which is known that there are no others that were
N_UNUSED = 16
# More fixtures than a world ever held at once
MOST = 2**16
# The side of a square that belongs to one fixture, and the radius of the fixture in it
DISTANCE, RADIUS = 8.0, 0.25
# A node's box is larger than its fixture by 0.1 on each side, a box of several fixtures is at least as wide as this
LARGEST_BOX = DISTANCE / 2
# Positions are float32, and exact up to here
N_ROWS = 2**18
_rows = itertools.cycle(range(1, N_ROWS))


def world_of(env: Any) -> Any:  # noqa: ANN401  # any environment; Box2D is an optional dependency
    """Return the Box2D world of one of Gymnasium's environments, whose resets begin with emptying it.

    :param env: the environment
    :return: the ``b2World``; None if it has none, or is of another package
    """
    # The module is an optional dependency. While it is not imported, there is no world
    if "Box2D" not in sys.modules or not any(cls.__module__.startswith(PACKAGE) for cls in type(env).__mro__):
        return None
    world = getattr(env, "world", None)
    return world if isinstance(world, sys.modules["Box2D"].b2World) else None


def emptied_world(env: Any) -> Any:  # noqa: ANN401  # as above
    """Let an environment empty its world, which its next reset would begin with.

    :param env: the environment
    :return: the ``b2World``; None if there is none, or it is not empty then
    """
    world = world_of(env)
    if world is None:
        return None
    env._destroy()
    return world if world.bodyCount == 0 else None


def free_nodes(world: Any, at_least: int = 0) -> list[int]:  # noqa: ANN401  # a b2World
    """Return the numbers of the free nodes for fixtures, in the order in which the world gives them away.

    :param world: an empty world. It is as before afterwards
    :param at_least: how many fixtures the world has had at once, if that is known
    :raises ValueError: if the world has had too many fixtures at once
    """
    n_fixtures = at_least + N_UNUSED
    while n_fixtures <= MOST:
        order = _order(world, n_fixtures, None)
        # Nodes that were never used come last, and in order
        if order is not None and order[-N_UNUSED:] == _unused(n_fixtures)[-N_UNUSED:]:
            return order
        n_fixtures *= 2
    raise ValueError(f"the Box2D world has had more than {MOST} fixtures at once")


def set_free_nodes(world: Any, order: list[int]) -> None:  # noqa: ANN401  # a b2World
    """Make the world give away its free nodes in an order.

    :param world: an empty world
    :param order: what :func:`free_nodes` has returned, of this world or another one
    :raises ValueError: for numbers that no world has
    """
    n_here = len(free_nodes(world, len(order)))
    order = [*order, *_unused(n_here)[len(order) :]]
    if _order(world, n_here, order) != order:
        raise ValueError(f"{len(order)} numbers are no order of the nodes of a Box2D world")


def _unused(n_fixtures: int) -> list[int]:
    """Return the order in which a new world gives away its nodes: the first, and then each time one is the parent's."""
    return [0, *range(1, 2 * n_fixtures - 1, 2)]


def _order(world: Any, n_fixtures: int, wanted: list[int] | None) -> list[int] | None:  # noqa: ANN401  # a b2World
    """Fill the world with fixtures and empty it again. Return in which order it gives away nodes then.

    :param wanted: the order to make; None: the order stays
    :return: None if there are nodes with higher numbers
    """
    box2d = importlib.import_module("Box2D")
    # A row of its own for each trial: a free node still has the place of its last fixture
    y = DISTANCE * next(_rows)
    shape = box2d.b2CircleShape(radius=RADIUS)
    # Bodies are of use only to give back their nodes one by one
    bodies = [world.CreateStaticBody() for _ in range(1 if wanted is None else n_fixtures)]
    for k in range(n_fixtures):
        shape.pos = (DISTANCE * k, y)
        bodies[k % len(bodies)].CreateFixture(shape=shape)
    place_of = _places(world.contactManager.broadPhase, n_fixtures, y)
    order = sorted(place_of, key=lambda node: place_of[node])
    if wanted is not None and len(wanted) == len(order) and set(wanted) == place_of.keys():
        order = wanted
    is_known = len(order) == n_fixtures
    # The node that is freed last is the first to be given away. A body frees that of its last fixture first
    for index in range(len(bodies) - 1, -1, -1):
        world.DestroyBody(bodies[place_of[order[index]] if len(bodies) > 1 and is_known else index])
    return order if is_known else None


def _places(broad_phase: Any, n_fixtures: int, y: float) -> dict[int, int]:  # noqa: ANN401  # a b2BroadPhase
    """Return for each node in a row the number of its place there."""
    place_of = {}
    # So many nodes a tree with these fixtures has
    for node in range(2 * n_fixtures - 1):
        box = broad_phase.GetFatAABB(node)
        lower, upper = box.lowerBound, box.upperBound
        is_single = upper.x - lower.x < LARGEST_BOX and upper.y - lower.y < LARGEST_BOX
        if is_single and abs((lower.y + upper.y) / 2 - y) < LARGEST_BOX:
            place_of[node] = round((lower.x + upper.x) / (2 * DISTANCE))
    return place_of
