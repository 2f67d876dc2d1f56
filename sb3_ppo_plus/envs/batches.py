"""What environments that step in batches share, on arrays and on tensors: spaces, infos, counts of episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_ppo_plus.trees import tree_map

SINGLE_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_SINGLE = "Box, Discrete, MultiDiscrete or MultiBinary"
_KINDS = {"returns": "f", "lengths": "i", "is_last": "b", "seconds": "f"}


def observation_parts(space: spaces.Space[Any]) -> list[tuple[str | None, spaces.Space[Any]]]:
    """Return the spaces of an observation's arrays by key; one that is no Dict has the key None.

    :param space: the observation space of a single environment
    """
    return list(space.spaces.items()) if isinstance(space, spaces.Dict) else [(None, space)]


def check_spaces(
    owner: object, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], *, takes_hybrid: bool
) -> None:
    """Check the spaces of a single environment.

    :param owner: what has them, for errors
    :param observation_space: its observation space
    :param action_space: its action space
    :param takes_hybrid: whether the action space may be a Tuple or Dict
    :raises ValueError: for a space that SB3, or ``owner``, does not know
    """
    for key, part in observation_parts(observation_space):
        if not isinstance(part, SINGLE_SPACES):
            where = "" if key is None else f"[{key!r}]"
            raise ValueError(f"{owner}: observation_space{where} must be {_SINGLE}, got {part}")
    allowed = (*SINGLE_SPACES, spaces.Tuple, spaces.Dict) if takes_hybrid else SINGLE_SPACES
    if not isinstance(action_space, allowed):
        names = "Box, Discrete, MultiDiscrete, MultiBinary, Tuple or Dict" if takes_hybrid else _SINGLE
        raise ValueError(f"{owner}: action_space must be {names}, got {action_space}")


def row_of(observations: Any, index: int) -> Any:  # noqa: ANN401  # array or dict
    """Copy the observation of one environment.

    :param observations: arrays of shape (n_envs, *observation shape), or a dict of them
    :param index: its index
    """
    return tree_map(lambda array: array[index].copy(), observations)


def episode_info(returns: float, length: int, seconds: float) -> dict[str, Any]:
    """Return what SB3's ``Monitor`` puts into the info of an episode that has ended, rounded as there.

    :param returns: undiscounted return of the episode
    :param length: its number of steps
    :param seconds: time since the environments began
    """
    return {"r": round(returns, 6), "l": length, "t": round(seconds, 6)}


def checked_counts(owner: object, counts: object, num_envs: int, names: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """Check what a checkpoint says of the episodes that go on.

    :param owner: what counts them, for errors
    :param counts: the counts, which may be hostile
    :param num_envs: number of environments
    :param names: those that are needed: "returns", "lengths" and "is_last" for each environment, and "seconds"
    :return: arrays by name
    :raises ValueError: if they are not those of so many environments
    """
    found = counts if isinstance(counts, dict) else {}
    arrays = {name: np.asarray(found.get(name)) for name in names}
    for name, array in arrays.items():
        shape = () if name == "seconds" else (num_envs,)
        if array.shape != shape or array.dtype.kind != _KINDS[name]:
            raise ValueError(f"the episodes of {owner} have no {name} of {num_envs} environments")
    return arrays
