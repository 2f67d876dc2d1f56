"""What ``resume`` reads from the folder of a run. Without trust nothing there is unpickled, evaluated or imported."""

from __future__ import annotations

import ast
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sb3_ppo_plus.distributed.training import DISTRIBUTED
from sb3_ppo_plus.errors import CheckpointError, UntrustedFileError
from sb3_ppo_plus.ppo_plus import PPOPlus
from sb3_ppo_plus.resuming.checkpoint_directory import checkpoint_directories
from sb3_ppo_plus.resuming.directory_lock import DirectoryLock
from sb3_ppo_plus.untrusted.plain_yaml import read_yaml
from sb3_ppo_plus.untrusted.regular_files import read_regular_file
from sb3_ppo_plus.untrusted.strict_json import get, parse, short
from sb3_ppo_plus.zoo.enjoy import check_plain, checked_env_kwargs, read_hyperparams
from sb3_ppo_plus.zoo.hyperparams import ALGO
from sb3_ppo_plus.zoo.processes import launched_by

#: Names in a run's folder, and the format of its description
CHECKPOINTS, DESCRIPTION, FORMAT = "checkpoints", "resume.json", 1
MAX_DESCRIPTION_BYTES = 2**16
#: Arguments of ``train`` that a run goes on with, and their types. The rest is in config.yml and in the checkpoints
ARGUMENTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("env", "vec_env", "device", "tensorboard_log", "wandb_project_name"), (str,)),
    **dict.fromkeys(("wandb_entity", "wandb_group"), (str, type(None))),
    **dict.fromkeys(("seed", "num_threads", "eval_freq", "eval_episodes", "n_eval_envs", "save_freq"), (int,)),
    "verbose": (int,),
    **dict.fromkeys(("track", "progress"), (bool,)),
    **dict.fromkeys(("gym_packages", "wandb_tags"), (list,)),
}
#: Hyperparameters on which environments and callbacks depend. The model itself is in the checkpoint
HYPERPARAMS = (
    *("n_envs", "normalize", "gamma", "env_wrapper", "vec_env_wrapper", "frame_stack", "env_kwargs"),
    *("monitor_kwargs", "callback", "distributed", "vectorized"),
)
#: Packages of environments that a log folder may have imported
GYM_PACKAGES = frozenset(
    {
        *("ale_py", "gymnasium_robotics", "highway_env", "minigrid", "miniworld", "mo_gymnasium", "panda_gym"),
        *("pybullet_envs_gymnasium", "shimmy"),
    }
)
#: Callbacks that a log folder may name
CALLBACKS = frozenset(
    {
        "rl_zoo3.callbacks.RawStatisticsCallback",
        "stable_baselines3.common.callbacks.LogEveryNTimesteps",
        "stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes",
    }
)
_MONITOR_ARGUMENTS = ("allow_early_resets", "info_keywords", "reset_keywords")


@dataclass(frozen=True)
class InterruptedRun:
    """A run that can be resumed.

    :param folder: its folder, such as logs/ppo_plus/CartPole-v1_1
    :param trusted: whether code that the folder holds or names may run
    :param arguments: arguments of ``train``
    :param hyperparams: the hyperparameters of :data:`HYPERPARAMS`
    :param description: contents of resume.json
    """

    folder: Path
    trusted: bool
    arguments: dict[str, Any]
    hyperparams: dict[str, Any]
    description: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.folder / CHECKPOINTS


def read_run(
    folder: Path, trusted: bool, gym_packages: Sequence[str] | None = None, *, is_first: bool = True
) -> InterruptedRun:
    """Read the files of a run, without its checkpoints.

    :param folder: the run's folder
    :param trusted: whether code that the folder holds or names may run
    :param gym_packages: packages to import in place of those that the folder names; None: those
    :param is_first: whether this is the first process of its run, which looks whether another run is writing there
    :raises CheckpointError: if the folder is none of a run of PPOPlus with checkpoints, or another run is writing there
    :raises UntrustedFileError: without trust, for what is not plain
    """
    inner = _inner_folder(folder)
    if not trusted:
        _check_no_links(folder)
    members = _read(inner / "args.yml", trusted)
    algo = members.get("algo")
    if algo != ALGO:
        raise CheckpointError(f"{folder} is a run of the algorithm {short(algo)}: only runs of {ALGO} can be resumed")
    if not checkpoint_directories(folder / CHECKPOINTS) or not (inner / DESCRIPTION).exists():
        raise CheckpointError(
            f"{folder} holds no checkpoint: it was trained with --no-checkpoint, or ended before the first one was due "
            "(--checkpoint-freq). Train it anew"
        )
    if is_first:
        _check_no_other_run(folder / CHECKPOINTS)
    arguments = _arguments(members, inner / "args.yml", trusted)
    if gym_packages is not None:
        arguments["gym_packages"] = list(gym_packages)
    elif not trusted:
        _check_packages(arguments["gym_packages"], inner / "args.yml")
    return InterruptedRun(folder, trusted, arguments, _hyperparams(inner, trusted), _description(inner / DESCRIPTION))


def how_to_go_on(folder: Path, gym_packages: Sequence[str], n_processes: int = 1) -> str:
    """Return a text with the command that goes on with a run, and the flags that it needs.

    :param folder: the run's folder, with its final model
    :param gym_packages: packages of environments that the run has imported
    :param n_processes: number of the run's processes
    """
    unknown = not GYM_PACKAGES.issuperset(gym_packages)
    flags = ["--gym-packages", *gym_packages] if unknown else []
    try:
        read_run(folder, False, gym_packages)
        PPOPlus.load(folder / f"{_inner_folder(folder).name}.zip", device="cpu", trusted=False, verbose=0)
    except UntrustedFileError:
        flags = ["--trust"]
    except CheckpointError as error:
        return f"It cannot go on: {error}"
    return f"To go on: {launched_by(n_processes)} sb3_ppo_plus.zoo resume {shlex.join([str(folder), *flags])}"


def _inner_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give that of a run, such as logs/{ALGO}/CartPole-v1_1")
    found = [path.parent for path in sorted(folder.glob("*/args.yml"))]
    if len(found) != 1:
        below = sorted(path.parents[1] for path in folder.glob("*/*/args.yml"))
        hint = f", such as {below[-1]}" if below else ""
        raise CheckpointError(f"{folder} is no folder of a run: exactly one folder in it must hold args.yml{hint}")
    return found[0]


def _check_no_links(folder: Path) -> None:
    """Refuse links in a run's folder: resume writes and cuts files there, and would do it elsewhere."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                raise UntrustedFileError(f"{os.path.join(parent, name)} is a link, where resume would write elsewhere")


def _read(path: Path, trusted: bool) -> dict[str, Any]:
    if not trusted:
        return read_yaml(path)
    members = yaml.load(path.read_text(), Loader=yaml.UnsafeLoader)
    return dict(members)


def _check_no_other_run(checkpoints: Path) -> None:
    lock = DirectoryLock(checkpoints.absolute())
    lock.acquire()
    lock.release()


def _arguments(members: dict[str, Any], path: Path, trusted: bool) -> dict[str, Any]:
    arguments = {}
    for name, types in ARGUMENTS.items():
        arguments[name] = get(members, name, types, str(path))
    for name in ("env_kwargs", "eval_env_kwargs"):
        arguments[name] = members.get(name) if trusted else checked_env_kwargs(members, path, name)
    return arguments


def _check_packages(packages: list[Any], path: Path) -> None:
    unknown = [package for package in packages if not isinstance(package, str) or package not in GYM_PACKAGES]
    if unknown:
        raise UntrustedFileError(
            f"{path}: gym_packages names {short(unknown[0])}, which is none of {', '.join(sorted(GYM_PACKAGES))}. "
            "--gym-packages names those to import"
        )


def _hyperparams(inner: Path, trusted: bool) -> dict[str, Any]:
    members = _read(inner / "config.yml", trusted)
    hyperparams = {name: members[name] for name in HYPERPARAMS if name in members}
    if not trusted:
        name = str(inner / "config.yml")
        checked, _ = read_hyperparams(str(inner))
        hyperparams |= {key: checked[key] for key in hyperparams.keys() & checked.keys()}
        for key in ("normalize", "monitor_kwargs"):
            if key in members:
                hyperparams[key] = _literal(members[key], f"{name}: {key}")
        _check_monitor_kwargs(hyperparams.get("monitor_kwargs", {}), f"{name}: monitor_kwargs")
        _check_callbacks(hyperparams.get("callback"), f"{name}: callback")
        for key in ("n_envs", "gamma"):
            check_plain(hyperparams.get(key, 1), name, key)
        if hyperparams.get("distributed", False) not in DISTRIBUTED:
            raise UntrustedFileError(
                f"{name}: distributed is {short(hyperparams['distributed'])}, none of {DISTRIBUTED}"
            )
    # The number of timesteps is in the checkpoints
    return {**hyperparams, "n_timesteps": 1}


def _literal(value: object, name: str) -> Any:  # noqa: ANN401  # a plain value
    """Read a text such as "dict(norm_obs=True)", which the RL Zoo would evaluate, and check that it is plain."""
    if isinstance(value, str):
        try:
            node = ast.parse(value, mode="eval").body
            is_dict = isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args
            if isinstance(node, ast.Call) and is_dict:
                value = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
            else:
                value = ast.literal_eval(node)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UntrustedFileError(f"{name}: {short(value)} is no plain value") from error
    check_plain(_with_lists(value), name)
    return value


def _with_lists(value: object) -> object:
    if isinstance(value, dict):
        return {key: _with_lists(member) for key, member in value.items()}
    return [_with_lists(member) for member in value] if isinstance(value, tuple | list) else value


def _check_monitor_kwargs(kwargs: object, name: str) -> None:
    if not isinstance(kwargs, dict) or not set(kwargs) <= set(_MONITOR_ARGUMENTS):
        raise UntrustedFileError(f"{name} must be a mapping of {', '.join(_MONITOR_ARGUMENTS)}, got {short(kwargs)}")


def _check_callbacks(value: object, name: str) -> None:
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        callback, kwargs = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if callback is not None and (not isinstance(callback, str) or callback not in CALLBACKS):
            raise UntrustedFileError(f"{name}: {short(callback)} is none of {', '.join(sorted(CALLBACKS))}")
        check_plain(kwargs, f"{name}: {callback}")
        if not isinstance(kwargs, dict):
            raise UntrustedFileError(f"{name}: arguments of {callback} must be a mapping, got {short(kwargs)}")


def _description(path: Path) -> dict[str, Any]:
    name = str(path)
    description = parse(read_regular_file(path, MAX_DESCRIPTION_BYTES), name)
    if get(description, "format", int, name) != FORMAT:
        raise CheckpointError(f"{name} has format {description['format']}, and this version reads format {FORMAT}")
    if get(description, "checkpoint_freq", int, name) < 1:
        raise UntrustedFileError(f"{name}: checkpoint_freq must be at least 1, got {description['checkpoint_freq']}")
    get(description, "normalizes", bool, name)
    get(description, "logs", (str, type(None)), name)
    get(description, "wandb", (str, type(None)), name)
    return dict(description)
