"""Observations that come in named groups, as SB3 knows them: one tensor, or a flat dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces


def flatten(groups: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401  # mapping, TensorDict, Dict space, leaf
    """Take groups inside of groups apart.

    :param groups: a mapping, whose values may be mappings; or something else, which gets the name "observations"
    :param prefix: name of the group that ``groups`` is in
    :return: the leaves, by names such as "policy" and "policy/joint_pos"
    """
    if not hasattr(groups, "items"):
        return {prefix or "observations": groups}
    flat: dict[str, Any] = {}
    for name, part in groups.items():
        flat |= flatten(part, f"{prefix}/{name}" if prefix else str(name))
    return flat


def space_of(shown: Any) -> spaces.Space[Any]:  # noqa: ANN401  # PyTorch's or JAX's
    """Return the space of what a simulator shows, which has no bounds that are known.

    :param shown: a tensor of shape (n_envs, *observation shape), or what has such a shape and a type of JAX
    """
    shape = tuple(shown.shape[1:])
    dtype = shown.new_zeros(0).cpu().numpy().dtype if isinstance(shown, th.Tensor) else np.dtype(shown.dtype)
    if dtype.kind == "b":
        return spaces.MultiBinary(list(shape))
    if dtype.kind in "iu":
        return spaces.Box(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype.type)
    return spaces.Box(-np.inf, np.inf, shape, dtype.type)


class ObservationGroups:
    """Chooses groups of observations. If one is left, it is shown as it is, several as a dict.

    :param owner: the environment, for errors
    :param groups: spaces in groups, as the simulator has them, or what ``make_space`` makes spaces of
    :param names: which groups are shown; None: all
    :param make_space: makes the space of a group; None: ``groups`` has spaces
    :raises ValueError: if there is no such group, or none is chosen
    :raises TypeError: if ``names`` is a text
    """

    def __init__(
        self,
        owner: object,
        groups: Any,  # noqa: ANN401  # see flatten
        names: Sequence[str] | None,
        make_space: Callable[[Any], spaces.Space[Any]] | None = None,
    ) -> None:
        if isinstance(names, str):
            raise TypeError(f"{owner}: groups must be a list of names or None, got {names!r}")
        if names is not None and not len(names):
            raise ValueError(f"{owner}: groups must name at least one of {sorted(flatten(groups))}, got {names!r}")
        self._owner, self._names = owner, names
        self._spaces: dict[str, Any] = self._chosen(groups)
        if make_space is not None:
            self._spaces = {name: make_space(shown) for name, shown in self._spaces.items()}
        self.space: spaces.Space[Any] = spaces.Dict(self._spaces)
        if len(self._spaces) == 1:
            self.space = next(iter(self._spaces.values()))

    def show(self, groups: Any) -> Any:  # noqa: ANN401  # a tensor or a dict
        """Return observations as the space says.

        :param groups: tensors in groups, as the simulator has them
        :raises ValueError: if a group is missing
        """
        tensors = self._chosen(groups)
        if len(self._spaces) == 1:
            (name,) = self._spaces
            if name not in tensors:
                raise ValueError(f"{self._owner}: observations lack {name!r}, they have {sorted(tensors)}")
            return tensors[name]
        return tensors

    def _chosen(self, groups: Any) -> dict[str, Any]:  # noqa: ANN401  # see flatten
        flat = flatten(groups)
        if self._names is None:
            return flat
        chosen: dict[str, Any] = {}
        for name in self._names:
            found = {key: part for key, part in flat.items() if key == name or key.startswith(f"{name}/")}
            if not found:
                raise ValueError(f"{self._owner}: groups must be of {sorted(flat)}, got {name!r}")
            chosen |= found
        return chosen
