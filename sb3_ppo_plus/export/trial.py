"""Observations to try an exported policy with, the model's own answers, and the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus.export.contract import TensorSpec
from sb3_ppo_plus.export.graph import PolicyGraph
from sb3_ppo_plus.export.observations import ObservationPart, as_policy_reads, statistics_of
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.masks import MASK_KEY

TOLERANCE = 1e-5
"""Largest error of an exported action, as a part of the range of actions."""
MIN_MARGIN = 1e-4
"""Choices whose logits differ by less may be exchanged by rounding."""
# Bounds beyond this one are a way to say that there are none
_LARGEST_BOUND = 1e6


def draw_inputs(
    graph: PolicyGraph, normalize: VecNormalize | None, batch: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw an array for each input of a graph.

    :param graph: the graph
    :param normalize: the normaliser, whose statistics say how large observations are
    :param batch: number of observations
    :param rng: the generator
    """
    inputs: dict[str, np.ndarray] = {}
    for spec, part in zip(graph.inputs, graph.parts, strict=False):
        assert isinstance(part, ObservationPart)
        inputs[spec.name] = _draw_part(part, statistics_of(normalize, spec.key), batch, rng)
        if graph.has_mask_key and spec.key == MASK_KEY:
            inputs[spec.name] = _draw_masks(spec, graph, batch, rng).astype(spec.dtype)
    for spec in graph.inputs[len(graph.parts) :]:
        shape = spec.shape_for(batch)
        if spec.role == "action_masks":
            inputs[spec.name] = _draw_masks(spec, graph, batch, rng)
        elif spec.role == "episode_start":
            inputs[spec.name] = np.arange(batch) % 3 == 2
        elif spec.role == "state":
            inputs[spec.name] = np.zeros(shape, spec.dtype)
        else:
            inputs[spec.name] = spec.draw(batch, rng)
    return inputs


def _draw_masks(spec: TensorSpec, graph: PolicyGraph, batch: int, rng: np.random.Generator) -> np.ndarray:
    sizes = [size for of_head in graph.heads.mask_sizes for size in of_head]
    masks = rng.random((batch, sum(sizes))) < 0.5
    begin = 0
    for size in sizes:
        masks[np.arange(batch), begin + rng.integers(size, size=batch)] = True
        begin += size
    return masks.reshape(spec.shape_for(batch))


def _draw_part(part: ObservationPart, statistics: Any, batch: int, rng: np.random.Generator) -> np.ndarray:  # noqa: ANN401  # SB3's
    space = part.space
    shape = (batch, *(space.shape or ()))
    if isinstance(space, spaces.Discrete):
        return rng.integers(int(space.n), size=shape).astype(space.dtype)
    if isinstance(space, spaces.MultiDiscrete):
        return rng.integers(space.nvec, size=shape).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return rng.integers(2, size=shape).astype(space.dtype)
    assert isinstance(space, spaces.Box)
    low, high = (
        np.clip(bound.astype(np.float64), -_LARGEST_BOUND, _LARGEST_BOUND) for bound in (space.low, space.high)
    )
    if statistics is not None and part.frames is not None:
        mean, std = (
            np.concatenate([array] * part.frames.number, axis=part.frames.axis) if array.ndim else array
            for array in (np.asarray(statistics.mean), np.sqrt(statistics.var))
        )
        drawn = mean + std * rng.standard_normal(shape)
    else:
        is_bounded = (low > -_LARGEST_BOUND) & (high < _LARGEST_BOUND)
        uniform = low + (high - low) * rng.random(shape)
        drawn = np.where(is_bounded, uniform, rng.standard_normal(shape))
    if not np.issubdtype(space.dtype or np.float32, np.floating):
        drawn = np.rint(drawn)
    return np.clip(drawn, low, high).astype(space.dtype)


def answer_of_predict(
    policy: ActorCriticPlusPolicy,
    graph: PolicyGraph,
    normalize: VecNormalize | None,
    inputs: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, ...]]:
    """Ask the policy's own ``predict`` for the deterministic actions, after the normaliser's arithmetic.

    :param policy: the policy
    :param graph: its graph, which says what the inputs are
    :param normalize: the normaliser
    :param inputs: an array for each input
    :return: the actions by the names of outputs, and the state of the memory after them
    """
    arrays: dict[Any, np.ndarray] = {spec.key: inputs[spec.name] for spec in graph.inputs if spec.role == "observation"}
    parts: Any = dict(zip(graph.keys, graph.parts, strict=True))
    observation = as_policy_reads(arrays.get(None, arrays), parts, normalize)
    state = tuple(inputs[spec.name] for spec in graph.inputs if spec.role == "state")
    actions, after = policy.predict(
        observation,
        state or None,
        inputs.get("episode_start"),
        deterministic=True,
        action_masks=inputs.get("action_masks"),
    )
    space = policy.action_space
    of_parts: list[Any] = [actions]
    if isinstance(space, FlatActionSpace):
        of_envs = [space.values(action) for action in actions]
        of_parts = [np.stack(values) for values in zip(*of_envs, strict=True)]
    return dict(zip(graph.heads.names, of_parts, strict=True)), after or ()


def largest_error(
    actions: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    graph: PolicyGraph,
    margins: Mapping[str, np.ndarray | None],
) -> float:
    """Compare actions.

    :param actions: some actions, by the names of outputs, shape (n, *action shape)
    :param expected: what they should be
    :param graph: the graph
    :param margins: by how much the logits of discrete actions exceed the second ones, shape (n,); None for a Box.
        Actions whose margin is below ``MIN_MARGIN`` do not count
    :return: the largest difference, as a part of the action range; for discrete actions 1 if any differs
    """
    largest = 0.0
    for name, space in zip(graph.heads.names, graph.heads.spaces, strict=True):
        ours, theirs, margin = actions[name].astype(np.float64), expected[name].astype(np.float64), margins[name]
        # Rounding to the action's dtype may go either way
        difference = np.maximum(0.0, np.abs(ours - theirs) - rounding_unit(expected[name]))
        difference /= action_range(space, theirs)
        if margin is not None:
            difference = (difference[margin >= MIN_MARGIN] > 0).astype(np.float64)
        # np.maximum keeps NaN
        largest = np.maximum(largest, difference.max(initial=0.0))
    return float(largest)


def rounding_unit(actions: np.ndarray) -> np.ndarray:
    """Return by how much actions may differ because they are rounded to a dtype coarser than float32.

    :param actions: some actions of a Box or of choices
    :return: the distance of neighbouring numbers for float16; 0 for finer floats, and for integers
    """
    is_coarse = actions.dtype.kind == "f" and actions.dtype.itemsize < 4
    return np.spacing(np.abs(actions)).astype(np.float64) if is_coarse else np.zeros(actions.shape)


def action_range(space: spaces.Space[Any], actions: np.ndarray) -> np.ndarray:
    """Return the range of each action dimension, by which errors are measured.

    :param space: the action space, or a part of it
    :param actions: some actions, shape (n, *action shape)
    :return: high - low of a Box; where it is infinite, twice the largest of the actions, and at least 1
    """
    if not isinstance(space, spaces.Box):
        return np.ones(space.shape or ())
    with np.errstate(over="ignore"):
        width = space.high.astype(np.float64) - space.low.astype(np.float64)
    largest = np.abs(actions.astype(np.float64)).max(axis=0, initial=0.5)
    return np.where(np.isfinite(width), width, 2.0 * largest)


def margins_of(graph: PolicyGraph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | None]:
    """Return the margins of a graph's discrete actions by the names of outputs, see :meth:`PolicyGraph.margins`.

    :param graph: the graph
    :param inputs: an array for each input
    """
    with th.no_grad():
        margins = graph.margins({name: th.as_tensor(array) for name, array in inputs.items()})
    return {name: None if margin is None else margin.numpy() for name, margin in margins.items()}
