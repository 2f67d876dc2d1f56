"""What must be alike in all processes: models before they train, and whether something was done."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th

from sb3_ppo_plus.attributes import ARGUMENTS, PlusModel
from sb3_ppo_plus.distributed.ranks import Ranks
from sb3_ppo_plus.errors import CheckpointError, RankFailedError

Result = TypeVar("Result")

# Only the first process prints and logs
_MAY_DIFFER = ("verbose", "tensorboard_log")
_MAX_SHOWN = 200


def check_alike(model: PlusModel, ranks: Ranks, others: dict[str, Any]) -> None:
    """Check that all processes train alike.

    :param model: the model
    :param ranks: the processes
    :param others: further values that must be alike, by name
    :raises ValueError: in every process, for the first difference; it names both sides
    """
    if ranks.size == 1:
        return
    names = [name for name in ARGUMENTS if name not in _MAY_DIFFER and hasattr(model, name)]
    values = {name: getattr(model, name) for name in names}
    values |= {"observation_space": model.observation_space, "action_space": model.action_space}
    values |= {"number of environments": model.n_envs, "num_timesteps": model.num_timesteps, **_versions(), **others}
    # Functions have the same names, at other addresses
    texts = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in values.items()}
    first, *of_others = ranks.gather_objects(texts, "settings")
    for rank, theirs in enumerate(of_others, 1):
        for name, text in first.items():
            if theirs[name] != text:
                sides = [
                    text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..." for text in (text, theirs[name])
                ]
                raise ValueError(
                    f"{name} must be the same in all processes, got {sides[0]} in rank 0, {sides[1]} in rank {rank}"
                )


def _versions() -> dict[str, str]:
    packages = {"torch": th, "stable-baselines3": stable_baselines3, "gymnasium": gym, "numpy": np}
    versions = {f"version of {name}": str(package.__version__) for name, package in packages.items()}
    return {"version of Python": platform.python_version(), **versions}


def done_by_all(ranks: Ranks, do: Callable[[], Result]) -> list[Result]:
    """Do something in every process. Where it fails in one, it fails in all, so that all may go on after the error.

    :param ranks: the processes; each calls this
    :param do: returns what can be pickled; it must not exchange anything with the other processes
    :return: the results of all, in their order
    :raises Exception: what ``do`` raises in this process
    :raises CheckpointError: if it has raised a CheckpointError in another process only
    :raises RuntimeError: if it has raised another error there
    """
    if ranks.size == 1:
        return [do()]
    result, own = None, None
    try:
        result = do()
    except RankFailedError:
        raise
    except Exception as error:
        own = error
    failure = None if own is None else (isinstance(own, CheckpointError), f"{type(own).__name__}: {own}")
    of_all: list[tuple[Any, tuple[bool, str] | None]] = ranks.gather_objects((result, failure), what)
    if own is not None:
        raise own
    for rank, (_, failure) in enumerate(of_all):
        if failure is not None:
            raise (CheckpointError if failure[0] else RuntimeError)(f"in rank {rank}: {failure[1]}")
    return [each for each, _ in of_all]


def share_parameters(model: Any, ranks: Ranks) -> None:  # noqa: ANN401  # a PPO
    """Give all processes the parameters and the optimiser's state of the first one, where they differ.

    :param model: the model
    :param ranks: the processes
    """
    if ranks.size == 1:
        return
    parameters = model.get_parameters()
    digests = ranks.gather_objects(_digest(parameters), "digests of parameters")
    if len(set(digests)) > 1:
        on_cpu = _to_cpu(parameters) if ranks.rank == 0 else None
        model.set_parameters(ranks.gather_objects(on_cpu, "parameters")[0], device=model.device)


def _digest(tree: Any) -> str:  # noqa: ANN401  # nested dicts and lists of tensors and numbers
    found = hashlib.sha256()

    def add(value: Any) -> None:  # noqa: ANN401  # as above
        if isinstance(value, dict):
            for key, item in value.items():
                found.update(f"{key}:".encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, th.Tensor):
            found.update(value.detach().cpu().contiguous().view(-1).view(th.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())

    add(tree)
    return found.hexdigest()


def _to_cpu(tree: Any) -> Any:  # noqa: ANN401  # as above
    if isinstance(tree, dict):
        return {key: _to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_to_cpu(value) for value in tree)
    return tree.detach().cpu() if isinstance(tree, th.Tensor) else tree
