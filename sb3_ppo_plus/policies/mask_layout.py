"""How masks of hybrid actions are laid out: one after another, or in the structure of the action space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_ppo_plus.argument_checks import did_you_mean
from sb3_ppo_plus.policies.flat_actions import HYBRID_SPACES, parts_of, space_of_env, subspaces
from sb3_ppo_plus.policies.masked_distributions import flattened_choices, mask_sizes
from sb3_ppo_plus.policies.masks import check_masks


def mask_names(action_space: spaces.Space[Any]) -> list[str]:
    """Return what errors call each choice of a Tuple or Dict, in the order of :func:`mask_sizes`; none for others.

    :param action_space: the action space
    """
    names = []
    for part in parts_of(action_space):
        n_choices = 0 if isinstance(part.space, spaces.Box) else len(mask_sizes(flattened_choices(part.space)))
        is_single = isinstance(part.space, spaces.Discrete)
        names += [f"part {part.path!r}" + ("" if is_single else f"[{index}]") for index in range(n_choices)]
    return names


def masks_of_envs(action_space: spaces.Space[Any], given: Any) -> np.ndarray:  # noqa: ANN401  # an array or structures
    """Check the masks that a user gives for several environments.

    :param action_space: the action space
    :param given: an array of shape (n_envs, mask size) or (mask size,). For a Tuple or Dict also a structure, see
        :func:`flat_mask`, or a list of structures
    :return: bool, shape (n_envs, mask size)
    :raises ValueError: for a space without discrete parts; see also :func:`flat_mask` and :func:`check_masks`
    """
    sizes = mask_sizes(action_space)
    if parts_of(action_space) and not isinstance(given, np.ndarray):
        if isinstance(given, list) and not _is_flat(given):
            given = np.array([_mask_in_list(action_space, given, index, sum(sizes)) for index in range(len(given))])
        given = flat_mask(action_space, given) if isinstance(given, tuple | Mapping) else given
    return check_masks(np.asarray(given), sizes, names=mask_names(action_space))


def _mask_in_list(action_space: spaces.Space[Any], given: list[Any], index: int, size: int) -> np.ndarray:
    """Return one of several masks as one array."""
    mask, structure = given[index], space_of_env(action_space)
    is_structure = isinstance(mask, tuple | Mapping) or (isinstance(mask, list) and not _is_flat(mask))
    flat = flat_mask(action_space, mask) if is_structure else np.asarray(mask)
    if flat.size != size or flat.dtype == object:
        kind = "tuple" if isinstance(structure, spaces.Tuple) else "dict"
        raise ValueError(
            f"action_masks is a list, which holds one mask for each observation: a {kind} of the masks of parts, or "
            f"{size} numbers ({_described_sizes(structure)}); element {index} is {mask!r}. The mask of one observation "
            f"alone must be the {kind} itself"
        )
    return flat.reshape(size)


def _described_sizes(action_space: spaces.Space[Any]) -> str:
    discrete = [part for part in parts_of(action_space) if not isinstance(part.space, spaces.Box)]
    return ", ".join(f"{sum(mask_sizes(flattened_choices(part.space)))} for part {part.path!r}" for part in discrete)


def flat_mask(action_space: spaces.Space[Any], mask: Any) -> np.ndarray:  # noqa: ANN401  # an array or structure
    """Return one environment's mask of a Tuple or Dict space as one array.

    :param action_space: the action space
    :param mask: such an array already, which is returned as it is. Or the structure that Gymnasium's ``sample(mask)``
        takes: a tuple for a Tuple, a dict for a Dict, and in the place of each discrete part its mask. None in the
        place of a part, or a key that is absent, allows all of its choices. A Box part has no mask
    :return: shape (mask size,); an array's shape is not checked
    :raises ValueError: for another structure, or a mask of the wrong size for a part; the error names its path
    """
    if isinstance(mask, np.ndarray) or not isinstance(mask, tuple | list | Mapping) or _is_flat(mask):
        return np.asarray(mask)
    masks = [*_masks_of_parts(space_of_env(action_space), mask, ())]
    return np.concatenate(masks) if masks else np.zeros(0, np.bool_)


def _is_flat(mask: Any) -> bool:  # noqa: ANN401  # an array or structure
    return isinstance(mask, tuple | list) and all(isinstance(each, Number | np.bool_) for each in mask)


def _masks_of_parts(space: spaces.Space[Any], mask: Any, path: tuple[str, ...]) -> Iterator[np.ndarray]:  # noqa: ANN401  # any structure
    where = f"the action mask of part {'.'.join(path)!r}" if path else "the action mask"
    if isinstance(space, HYBRID_SPACES):
        inner = _by_key(space, mask, where)
        for key, subspace in subspaces(space):
            yield from _masks_of_parts(subspace, inner.get(key), (*path, str(key)))
        return
    if isinstance(space, spaces.Box):
        if mask is not None:
            raise ValueError(f"{where} must be None, because the part is a {space}, got {mask!r}")
        return
    size = sum(mask_sizes(flattened_choices(space)))
    if mask is None:
        yield np.ones(size, dtype=np.bool_)
        return
    is_sequence = isinstance(mask, tuple | list)
    given = np.concatenate([np.reshape(each, -1) for each in mask]) if is_sequence and len(mask) else np.asarray(mask)
    if given.size != size:
        raise ValueError(f"{where} must have {size} elements for {space}, got {given.size}: {mask!r}")
    yield given.reshape(size)


def _by_key(space: spaces.Space[Any], mask: Any, where: str) -> Mapping[Any, Any]:  # noqa: ANN401  # any structure
    """Return the masks directly inside a Tuple or Dict by index or key."""
    keys = [key for key, _ in subspaces(space)]
    if mask is None:
        return {}
    if isinstance(space, spaces.Tuple):
        if not isinstance(mask, tuple | list) or len(mask) != len(keys):
            raise ValueError(f"{where} must be a tuple with {len(keys)} masks for {space}, got {mask!r}")
        return dict(enumerate(mask))
    if not isinstance(mask, Mapping):
        raise ValueError(f"{where} must be a dict with keys among {keys} for {space}, got {mask!r}")
    unknown = [key for key in mask if key not in keys]
    if unknown:
        raise ValueError(
            f"{where} has the key {unknown[0]!r}; allowed: {keys}{did_you_mean(unknown[0], map(str, keys))}"
        )
    return mask
