"""Observations that come in named groups, as SB3 knows them: one tensor, or a flat dict."""

from __future__ import annotations

from collections.abc import Sequence
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


def space_of(tensor: th.Tensor) -> spaces.Space[Any]:
    """Return a space without bounds for what a simulator shows.

    :param tensor: observations of shape (n_envs, *observation shape)
    """
    dtype = tensor.new_zeros(0).cpu().numpy().dtype
    return spaces.Box(-np.inf, np.inf, tuple(tensor.shape[1:]), dtype)


class ObservationGroups:
    """Chooses groups of observations. If one is left, it is shown as it is, several as a dict.

    :param owner: the environment, for errors
    :param groups: spaces in groups, as the simulator has them
    :param names: which groups are shown; None: all
    :raises ValueError: if there is no such group
    """

    def __init__(self, owner: object, groups: Any, names: Sequence[str] | None) -> None:  # noqa: ANN401  # see flatten
        self._owner, self._names = owner, names
        self._spaces = self._chosen(groups)
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
