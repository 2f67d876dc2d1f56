"""Action masks among the observations, and what masks must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

MASK_KEY = "action_mask"


def has_mask_key(observation_space: spaces.Space[Any]) -> bool:
    """Whether observations hold masks."""
    return isinstance(observation_space, spaces.Dict) and MASK_KEY in observation_space.spaces


def without_mask_key(observation_space: spaces.Space[Any]) -> spaces.Dict:
    """Return the Dict space of what is left for the features."""
    assert isinstance(observation_space, spaces.Dict)
    return spaces.Dict({key: space for key, space in observation_space.spaces.items() if key != MASK_KEY})


def split_off_mask(observations: PyTorchObs) -> tuple[PyTorchObs, th.Tensor]:
    """Part observations, a dict of tensors, from their masks of shape (batch, mask size)."""
    assert isinstance(observations, dict)
    features = {key: observation for key, observation in observations.items() if key != MASK_KEY}
    return features, observations[MASK_KEY].flatten(1) != 0


def check_masks(
    masks: np.ndarray, sizes: Sequence[int], step: int | None = None, names: Sequence[str] = ()
) -> np.ndarray:
    """Check masks of several environments.

    :param masks: shape (n_envs, sum of sizes), or of that many elements; bool, or numbers 0 and 1
    :param sizes: number of choices of each action, see :func:`mask_sizes`
    :param step: for the message: step of the rollout, None outside one
    :param names: for the message: what each action is called; empty: it has a number
    :return: bool, shape (n_envs, sum of sizes)
    :raises ValueError: for another shape, other numbers, or where an action has no valid choice
    """
    when = "" if step is None else f" at step {step} of the rollout"
    size = sum(sizes)
    if masks.size == 0 or masks.size % size:
        of_names = f" ({', '.join(f'{n} for {name}' for n, name in zip(sizes, names, strict=True))})" if names else ""
        raise ValueError(f"action masks must have the shape (n_envs, {size}){of_names}, got {masks.shape}{when}")
    masks = masks.reshape(-1, size)
    if masks.dtype != np.bool_:
        is_bool = (masks == 0) | (masks == 1)
        if not is_bool.all():
            index = int(np.flatnonzero(~is_bool.all(axis=1))[0])
            raise ValueError(f"action masks must be bool, or 0 and 1, got {masks[index]} of env {index}{when}")
        masks = masks.astype(np.bool_)
    if len(sizes) == 1:
        has_choice = masks.any(axis=1, keepdims=True)
    else:
        has_choice = np.logical_or.reduceat(masks, [0, *accumulate(sizes[:-1])], axis=1)
    if not has_choice.all():
        index, action = (int(position[0]) for position in np.nonzero(~has_choice))
        which = "action" if len(sizes) == 1 else f"choice of {names[action] if names else f'action {action}'}"
        raise ValueError(f"the action mask of env {index} leaves no valid {which}{when}")
    return masks
