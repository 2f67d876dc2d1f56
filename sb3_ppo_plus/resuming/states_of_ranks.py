"""The states of several processes in one checkpoint, and how environments are shared out among another number of them.

The first process writes the files of all. Those of the others are ``rank_1_training_state.json`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th

from sb3_ppo_plus.distributed.agreement import done_by_all
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.resuming.checkpoint_directory import FILE_OF_RANK
from sb3_ppo_plus.resuming.training_state import ARRAYS_FILE, STATE_FILE, Snapshot, TrainingState
from sb3_ppo_plus.trees import tree_map

# Arrays that SB3's wrappers of vectorised environments keep for each environment
_OF_EACH_ENV = ("returns", "old_obs", "old_reward", "episode_returns", "episode_lengths", "stacked_obs")


def snapshot_of_all(take: Callable[[], Snapshot], ranks: Ranks) -> Snapshot:
    """Give the first process the files of all, which it writes as one checkpoint.

    :param take: takes the snapshot of this process
    :param ranks: the processes; each calls this
    :raises Exception: in all processes, if the snapshot of one cannot be taken: see :func:`done_by_all`
    """
    if ranks.size == 1:
        return take()
    taken: list[Snapshot] = []

    def take_own() -> dict[str, bytes]:
        taken.append(take())
        if ranks.rank == 0:
            return {}
        return {name: content for name, content in taken[0].files().items() if name in (STATE_FILE, ARRAYS_FILE)}

    of_all = done_by_all(ranks, take_own, "the state of a checkpoint")
    (snapshot,) = taken
    others = {f"rank_{rank}_{name}": content for rank, files in enumerate(of_all) for name, content in files.items()}
    return replace(snapshot, files=lambda: {**snapshot.files(), **others})


def files_by_rank(files: dict[str, bytes]) -> list[dict[str, bytes]]:
    """Divide the files of a checkpoint by the process that they belong to.

    :param files: contents by file name
    :return: contents by the name that a process alone gives the file, for each process in order
    :raises ValueError: if there are not two files of each process
    """
    found: dict[int, dict[str, bytes]] = {0: {}}
    for name, content in files.items():
        of_rank = FILE_OF_RANK.fullmatch(name)
        rank, own_name = (0, name) if of_rank is None else (int(of_rank[1]), of_rank[2])
        found.setdefault(rank, {})[own_name] = content
    names = [set(found.get(rank, ())) for rank in range(len(found))]
    if any(own_names != {STATE_FILE, ARRAYS_FILE} for own_names in names[1:]):
        raise ValueError(f"the files of each process must be {STATE_FILE} and {ARRAYS_FILE}, got {sorted(files)}")
    return [found[rank] for rank in range(len(found))]


def shared_out(states: list[TrainingState], ranks: Ranks, n_envs: int) -> TrainingState:
    """Share out the environments of a checkpoint among another number of processes. Random numbers are new ones.

    :param states: the states of the processes that have written the checkpoint
    :param ranks: the processes that go on
    :param n_envs: number of environments of each of them
    :return: the state with which this process goes on
    :raises ValueError: if the number of all environments has changed
    """
    n_saved = sum(state["env"]["n_envs"] for state in states)
    if n_saved != n_envs * ranks.size:
        raise ValueError(
            f"the checkpoint has {n_saved} environments of {len(states)} processes, now there are {n_envs} in each of "
            f"{ranks.size}: make {n_saved} in all, by share_of({n_saved}) in each process"
        )
    envs = slice(n_envs * ranks.rank, n_envs * (ranks.rank + 1))
    state = {name: value for name, value in states[0].items() if name not in ("parts", "original_observations")}
    attributes = [each["attributes"] for each in states]
    state["attributes"] = {
        **attributes[0],
        **{
            name: _joined([each[name] for each in attributes], lambda parts: np.concatenate(parts)[envs])
            for name in ("_last_obs", "_last_original_obs", "_last_episode_starts")
        },
        "_last_states": _joined(
            [each["_last_states"] for each in attributes], lambda parts: th.cat(list(parts), dim=1)[:, envs]
        ),
    }
    state["env"] = _env_shared_out([each["env"] for each in states], envs)
    return state


def _joined(trees: list[Any], join: Callable[[tuple[Any, ...]], Any]) -> Any:  # noqa: ANN401  # nested containers
    if any(tree is None for tree in trees):
        return None
    return tree_map(lambda *leaves: join(leaves), trees[0], *trees[1:])


def _env_shared_out(env_states: list[dict[str, Any]], envs: slice) -> dict[str, Any]:
    def of_all(name: str) -> list[Any]:
        return [item for each in env_states for item in each.get(name) or ()]

    n_saved = [each["n_envs"] for each in env_states]
    are_saved = all(each["envs"] is not None for each in env_states)
    shared: dict[str, Any] = {
        **env_states[0],
        "n_envs": envs.stop - envs.start,
        "seeds": of_all("seeds")[envs],
        "stack": of_all("stack")[envs],
        "vec_env": None,
        "envs": of_all("envs")[envs] if are_saved else None,
        "attributes": {
            name: [value for each in env_states for value in each["attributes"][name]][envs]
            for name in env_states[0]["attributes"]
        },
        "wrappers": [
            (name, _wrapper_shared_out([each["wrappers"][index][1] for each in env_states], n_saved, envs))
            for index, (name, _) in enumerate(env_states[0]["wrappers"])
        ],
    }
    if "workers" in env_states[0]:
        shared["workers"] = of_all("workers")[envs]
    return shared


def _wrapper_shared_out(trees: list[Any], n_saved: list[int], envs: slice, name: str = "") -> Any:  # noqa: ANN401  # plain values
    """Share out the arrays of each environment; the rest is that of the first process."""
    first = trees[0]
    if isinstance(first, dict):
        return {
            key: _wrapper_shared_out(
                [tree[key] for tree in trees], n_saved, envs, name if name in _OF_EACH_ENV else key
            )
            for key in first
        }
    if isinstance(first, list | tuple):
        items = zip(*trees, strict=True)
        return type(first)(_wrapper_shared_out(list(each), n_saved, envs, name) for each in items)
    if name == "num_envs" and isinstance(first, int):
        return envs.stop - envs.start
    is_of_each_env = isinstance(first, np.ndarray) and first.ndim > 0 and name in _OF_EACH_ENV
    if is_of_each_env and [len(tree) for tree in trees] == n_saved:
        return np.concatenate(trees)[envs]
    return first
