"""What must be alike in all processes: models before they train, and whether something was done."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus.attributes import ARGUMENTS, PlusModel
from sb3_ppo_plus.distributed.ranks import Ranks, of_all_processes
from sb3_ppo_plus.envs.questions import wrappers_of
from sb3_ppo_plus.errors import CheckpointError, RankFailedError
from sb3_ppo_plus.trees import tree_flatten, tree_map

Result = TypeVar("Result")

# Only the first process prints and logs
_MAY_DIFFER = ("verbose", "tensorboard_log", "worker_timeout")
_OF_NORMALIZERS = (
    *("training", "norm_obs", "norm_reward", "norm_obs_keys", "clip_obs", "clip_reward", "gamma", "epsilon"),
)
_MAX_SHOWN = 200
_PLAIN = (bool, int, float, str, type(None))


def check_alike(model: PlusModel, ranks: Ranks, others: dict[str, Any]) -> None:
    """Check that all processes train alike.

    :param model: the model
    :param ranks: the processes
    :param others: further values that must be alike, by name
    :raises ValueError: in every process, for the first difference; it names both sides
    """
    if ranks.size == 1:
        return
    uses_masks = None if model.env is None else model._mask_use.decide(model.env, model)
    values = {
        "observation_space": model.observation_space,
        "action_space": model.action_space,
        "number of environments": model.n_envs,
        "num_timesteps": model.num_timesteps,
        "whether masks are used": uses_masks,
        **_machine(model),
        **others,
    }
    texts = settings_of(model) | {name: _text_of(value) for name, value in values.items()}
    refuse_differences(ranks.gather_objects(texts, "settings"))


def settings_of(model: PlusModel) -> dict[str, str]:
    """Return what a callback could change in a single process, so that the processes would not train alike any more.

    :param model: the model
    :return: by name, as texts that are equal for equal values
    """
    names = [name for name in ARGUMENTS if name not in _MAY_DIFFER and hasattr(model, name)]
    values = {name: getattr(model, name) for name in names}
    values |= _settings_of_wrappers(model.env)
    values["trainable parameters"] = [name for name, each in model.policy.named_parameters() if each.requires_grad]
    return {name: _text_of(value) for name, value in values.items()}


def refuse_differences(texts: list[dict[str, str]]) -> None:
    """Check that all processes have the same settings.

    :param texts: those of each process
    :raises ValueError: in every process, for the first difference; it names both sides
    """
    first, *others = texts
    for rank, theirs in enumerate(others, 1):
        for name in first | theirs:
            text, their_text = first.get(name, "none"), theirs.get(name, "none")
            if their_text != text:
                sides = [text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..." for text in (text, their_text)]
                message = (
                    f"{name} must be the same in all processes, got {sides[0]} in rank 0, {sides[1]} in rank {rank}"
                )
                raise of_all_processes(ValueError(message))


def _text_of(value: Any) -> str:  # noqa: ANN401  # any value
    if isinstance(value, _PLAIN):
        return repr(value)
    # Arrays whole; functions have the same names, at other addresses
    with np.printoptions(threshold=sys.maxsize):
        return re.sub(" at 0x[0-9a-fA-F]+", "", repr(tree_map(_ordered, value)))


def _ordered(leaf: Any) -> Any:  # noqa: ANN401  # any value
    """Return the items of a set in an order that is the same in each process."""
    return (type(leaf).__name__, sorted(map(repr, leaf))) if isinstance(leaf, set | frozenset) else leaf


def _settings_of_wrappers(env: VecEnv | None) -> dict[str, Any]:
    """Return the names of the wrappers of vectorised environments, and the settings of normalisers.

    Where normalisers differ, processes would share other statistics, or scale rewards in other ways.
    """
    settings: dict[str, Any] = {}
    for number, wrapper in enumerate(wrappers_of(env), 1):
        kind = type(wrapper).__name__
        of_normalizer = {key: getattr(wrapper, key, None) for key in _OF_NORMALIZERS} | {"type": kind}
        settings[f"VecEnv wrapper {number}"] = of_normalizer if isinstance(wrapper, VecNormalize) else kind
    return settings


def _machine(model: PlusModel) -> dict[str, Any]:
    """Return what the last bits depend on."""
    capability = th.backends.cpu.get_cpu_capability()
    # A CPU with wider registers rounds as one with AVX2
    capability = "AVX2" if capability == "AVX512" else capability
    return {
        "type of device": model.device.type,
        "capability of the CPU": capability,
        "number of threads": th.get_num_threads(),
        **_versions(),
    }


def _versions() -> dict[str, str]:
    # The package itself is being imported when this module is
    own = sys.modules["sb3_ppo_plus"]
    packages = {"torch": th, "stable-baselines3": stable_baselines3, "sb3-contrib": sb3_contrib, "sb3-ppo-plus": own}
    packages |= {"gymnasium": gym, "numpy": np}
    versions = {f"version of {name}": str(package.__version__) for name, package in packages.items()}
    return {"version of Python": platform.python_version(), **versions}


def done_by_all(ranks: Ranks, do: Callable[[], Result], what: str) -> list[Result]:
    """Do something in every process. Where it fails in one, it fails in all, so that all may go on after the error.

    :param ranks: the processes; each calls this
    :param do: returns what can be pickled; it must not exchange anything with the other processes
    :param what: what is done, see :meth:`Ranks.gather_objects`
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
        raise of_all_processes(own)
    for rank, (_, failure) in enumerate(of_all):
        if failure is not None:
            kind = CheckpointError if failure[0] else RuntimeError
            raise of_all_processes(kind(f"in rank {rank}: {failure[1]}"))
    return [each for each, _ in of_all]


def share_parameters(model: Any, ranks: Ranks) -> None:  # noqa: ANN401  # a PPO
    """Give all processes the parameters and the optimiser's state of the first one, where they differ.

    :param model: the model
    :param ranks: the processes
    """
    if ranks.size == 1:
        return
    parameters = model.get_parameters()
    digests = ranks.gather_objects(digest(parameters), "digests of parameters")
    if len(set(digests)) > 1:
        of_first = on_cpu(parameters) if ranks.rank == 0 else None
        model.set_parameters(ranks.gather_objects(of_first, "parameters")[0], device=model.device)


def digest(tree: Any) -> str:  # noqa: ANN401  # nested dicts and lists of tensors and numbers
    """Return a hash of all values, from which processes see whether theirs are the same.

    :param tree: nested dicts and lists
    """
    leaves, spec = tree_flatten(tree)
    found = hashlib.sha256(repr(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, th.Tensor):
            found.update(leaf.detach().cpu().contiguous().view(-1).view(th.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def on_cpu(tree: Any) -> Any:  # noqa: ANN401  # nested dicts and lists
    """Return a tree whose tensors are on the CPU, without gradients.

    :param tree: nested dicts, lists and tuples of tensors and other values
    """
    return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, th.Tensor) else leaf, tree)
