"""The infos of ``gymnasium.vector``, a dict of arrays, as one dict for each environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

FINAL_OBSERVATIONS = ("final_obs", "final_observation")
"""Names of the last observations of episodes that ended in the same step: Gymnasium's, and that of earlier versions."""


def infos_of_envs(vector_infos: Mapping[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Return one dict for each environment.

    The reverse of ``gymnasium.vector.VectorEnv._add_info``: "_name" says which environments have a value under "name".
    Without it, all have one, if there are as many values as environments.

    :param vector_infos: values by name, as ``step`` and ``reset`` give them
    :param num_envs: number of environments
    :return: new dicts
    """
    infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in vector_infos.items():
        if name.startswith("_") and name[1:] in vector_infos:
            continue
        owners = vector_infos.get(f"_{name}")
        indices = range(num_envs) if owners is None else np.flatnonzero(owners).tolist()
        for index, value in _values_of(values, indices, num_envs):
            infos[index][name] = value
    return infos


def _values_of(values: Any, indices: Any, num_envs: int) -> Any:  # noqa: ANN401  # whatever environments put there
    if isinstance(values, Mapping):
        inner = infos_of_envs(values, num_envs)
        return [(index, inner[index]) for index in indices if inner[index]]
    if not isinstance(values, np.ndarray | list | tuple) or len(values) != num_envs:
        # Of the vector environment as a whole
        return [(index, values) for index in indices]
    return [(index, values[index]) for index in indices]
