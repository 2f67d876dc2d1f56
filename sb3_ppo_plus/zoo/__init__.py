"""PPOPlus in the RL Zoo: registration, default hyperparameters and ``python -m sb3_ppo_plus.zoo train|enjoy``.

The RL Zoo (``rl_zoo3``) is an optional dependency, imported only when something here is called.
Its own ``enjoy`` evaluates and unpickles what lies in the log folder; ours does so only with ``--trust``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    import optuna
    from rl_zoo3.exp_manager import ExperimentManager

ALGO = "ppo_plus"

#: PPOPlus's arguments that are a number, a schedule or a schedule's string form; PPOPlus resolves them itself.
SCHEDULED_ARGUMENTS = ("learning_rate", "critic_learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef")

_COMMANDS = ("train", "enjoy")
_LEARNING_RATE_SCHEDULES = ("constant", "lin", "cos", "warmup_cos")
_ENT_COEF_SCHEDULES = ("constant", "lin")
_ACTION_DISTS = ("gaussian", "squashed_gaussian", "beta")


def _import_optional(name: str) -> ModuleType:
    """Import a module of the optional ``zoo`` extra.

    :param name: The module's full name.
    :return: The module.
    :raises ImportError: It, or something that it imports, is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): run `pip install sb3-ppo-plus[zoo]`") from error


def hyperparams_file() -> Path:
    """Path of ``ppo_plus.yml``, PPOPlus's hyperparameters in the RL Zoo's format.

    :return: The file inside the installed package, or in a checkout the one in ``zoo_hyperparams``.
    :raises FileNotFoundError: It is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = [root / "zoo_hyperparams" / f"{ALGO}.yml" for root in (package, package.parent)]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"neither {candidates[0]} nor {candidates[1]} is a file: reinstall sb3-ppo-plus")


def load_hyperparams(env_id: str) -> dict[str, Any]:
    """One environment's entry of ``ppo_plus.yml``, chosen as the RL Zoo chooses it.

    Besides PPOPlus's own arguments an entry holds what the RL Zoo takes out of it: ``n_timesteps``, ``n_envs``,
    ``normalize``, ``frame_stack`` and ``env_wrapper``.

    :param env_id: Gymnasium's id; without an entry of its own it gets ``atari`` if it is an Atari game, or ``default``.
    :return: The entry, a copy of the caller's own.
    :raises ImportError: PyYAML, part of the ``zoo`` extra, is not installed.
    """
    entries = _import_optional("yaml").safe_load(hyperparams_file().read_text(encoding="utf-8"))
    if env_id not in entries:
        spec = gym.registry.get(env_id)
        is_atari = env_id.startswith("ALE/") or (spec is not None and "AtariEnv" in str(spec.entry_point))
        env_id = "atari" if is_atari else "default"
    entry: dict[str, Any] = entries[env_id]
    return entry


def convert_ppo_plus_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Turn a trial's parameters into PPOPlus's arguments.

    The RL Zoo calls it for ``--trial-id`` too, with whatever the stored study holds, a study of its PPO included.

    :param sampled_params: ``trial.params``: those of the RL Zoo's PPO sampler, and optionally ``lr_schedule``,
        ``ent_coef_schedule`` and ``action_dist``.
    :return: Keyword arguments for PPOPlus; classes by registered name, so that the saved YAML stays plain.
    """
    params = dict(sampled_params)
    lr_schedule = params.pop("lr_schedule", "constant")
    ent_coef_schedule = params.pop("ent_coef_schedule", "constant")
    action_dist = params.pop("action_dist", None)

    hyperparams: dict[str, Any] = _import_optional("rl_zoo3.hyperparams_opt").convert_onpolicy_params(params)
    policy_kwargs = dict(hyperparams["policy_kwargs"], activation_fn=params["activation_fn"])
    if action_dist is not None:
        policy_kwargs["action_dist"] = action_dist
        if action_dist != "gaussian":
            # gSDE is Gaussian only, and the environment's entry may have switched it on.
            hyperparams["use_sde"] = False
    hyperparams["policy_kwargs"] = policy_kwargs
    if lr_schedule != "constant":
        hyperparams["learning_rate"] = f"{lr_schedule}_{params['learning_rate']}"
    if ent_coef_schedule != "constant":
        hyperparams["ent_coef"] = f"{ent_coef_schedule}_{params['ent_coef']}"
    return hyperparams


def sample_ppo_plus_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Sample PPOPlus's hyperparameters: the search space of the RL Zoo's PPO, schedules and the action distribution.

    :param trial: Optuna's trial.
    :param n_actions: Dimensions of a Box action space, which is given an ``action_dist``; 0 for any other space.
    :param n_envs: Number of environments.
    :param additional_args: What the RL Zoo hands to every sampler.
    :return: Keyword arguments for PPOPlus.
    """
    _import_optional("rl_zoo3.hyperparams_opt").sample_ppo_params(trial, n_actions, n_envs, additional_args)
    trial.suggest_categorical("lr_schedule", _LEARNING_RATE_SCHEDULES)
    trial.suggest_categorical("ent_coef_schedule", _ENT_COEF_SCHEDULES)
    if n_actions > 0:
        trial.suggest_categorical("action_dist", _ACTION_DISTS)
    return convert_ppo_plus_params(trial.params)


def _let_schedules_through(exp_manager: ModuleType) -> None:
    """Have ``ExperimentManager`` leave PPOPlus's schedules alone; other algorithms are preprocessed as before.

    Its ``_preprocess_schedules`` reads any string with one underscore as linear and raises at more, and at None.

    :param exp_manager: ``rl_zoo3.exp_manager``, whose class is changed in place, once.
    """
    manager = exp_manager.ExperimentManager
    if getattr(manager, "_leaves_ppo_plus_schedules", False):
        return
    preprocess = manager._preprocess_hyperparams

    @functools.wraps(preprocess)
    def preprocess_hyperparams(self: ExperimentManager, hyperparams: dict[str, Any]) -> tuple[Any, ...]:
        if self.algo != ALGO:
            unchanged: tuple[Any, ...] = preprocess(self, hyperparams)
            return unchanged
        # The nested mappings are also those that get saved as YAML: what follows must not change them.
        hyperparams = {k: copy.deepcopy(v) if isinstance(v, dict) else v for k, v in hyperparams.items()}
        schedules = {key: hyperparams.pop(key) for key in SCHEDULED_ARGUMENTS if key in hyperparams}
        processed, *rest = preprocess(self, hyperparams)
        return ({**processed, **schedules}, *rest)

    manager._preprocess_hyperparams = preprocess_hyperparams
    manager._leaves_ppo_plus_schedules = True


def register() -> None:
    """Make ``ppo_plus`` known to the RL Zoo: algorithm, Optuna sampler and converter, schedules.

    ``main`` does so by itself. Call it before ``rl_zoo3.train.train()`` or ``rl_zoo3.exp_manager.ExperimentManager``
    in a script of your own; calling it again changes nothing.

    :raises ImportError: The RL Zoo is not installed; the message names the extra.
    """
    zoo = _import_optional("rl_zoo3")
    hyperparams_opt = _import_optional("rl_zoo3.hyperparams_opt")
    exp_manager = _import_optional("rl_zoo3.exp_manager")
    from sb3_ppo_plus.ppo_plus import PPOPlus

    zoo.ALGOS[ALGO] = PPOPlus
    hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_ppo_plus_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert_ppo_plus_params
    _let_schedules_through(exp_manager)


@contextmanager
def _enjoying_with_masks(enjoy: Any, trusted: bool) -> Iterator[None]:  # noqa: ANN401  # a module, whose attributes are replaced
    """Have ``enjoy``, which knows no masks, act with those of its environment, for a model that was trained with masks.

    :param enjoy: ``rl_zoo3.enjoy``.
    :param trusted: Whether to unpickle the model.
    """
    from stable_baselines3.common.vec_env import VecEnv

    from sb3_ppo_plus.masking.evaluation import MaskedPredictor
    from sb3_ppo_plus.ppo_plus import PPOPlus

    create_test_env, envs = enjoy.create_test_env, list[VecEnv]()

    def create_and_keep(*args: Any, **kwargs: Any) -> VecEnv:
        envs.append(create_test_env(*args, **kwargs))
        return envs[-1]

    def load(*args: Any, **kwargs: Any) -> PPOPlus | MaskedPredictor:
        model = PPOPlus.load(*args, trusted=trusted, **kwargs)
        return model.masked(envs[-1]) if model.needs_masks else model

    enjoy.create_test_env = create_and_keep
    enjoy.ALGOS[ALGO] = SimpleNamespace(load=load)
    try:
        yield
    finally:
        enjoy.create_test_env = create_test_env
        enjoy.ALGOS[ALGO] = PPOPlus


@contextmanager
def _in_our_way(command: str, module: ModuleType, trusted: bool) -> Iterator[None]:
    """Change what the RL Zoo's command does with files, while it runs.

    :param command: ``train`` or ``enjoy``.
    :param module: The RL Zoo's module of that name.
    :param trusted: Whether ``enjoy`` may run code from the log folder.
    :raises SystemExit: Without trust, the log folder holds what is not plain.
    """
    from sb3_ppo_plus.errors import UntrustedFileError
    from sb3_ppo_plus.zoo import enjoy

    if command == "train":
        with enjoy.saving_statistics_twice():
            yield
        return
    try:
        with (
            nullcontext() if trusted else enjoy.enjoying_without_trust(module),
            _enjoying_with_masks(module, trusted),
        ):
            yield
    except UntrustedFileError as error:
        raise SystemExit(f"{error}\nWith --trust, enjoy runs whatever code the log folder holds.") from error


def _with_defaults(command: str, arguments: Sequence[str]) -> list[str]:
    """Put our defaults in front of the user's arguments: in argparse the last one counts, however it is spelled.

    :param command: ``train`` or ``enjoy``.
    :param arguments: What the user gave after the command.
    :return: Arguments for the RL Zoo; only ``ppo_plus`` gets our hyperparameter file and log folder.
    """
    algo = _algo(arguments)
    defaults = ["--algo", ALGO]
    if algo == ALGO:
        defaults += ["-conf", str(hyperparams_file())] if command == "train" else ["-f", "logs"]
    return [*defaults, *arguments]


def _algo(arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", nargs="?", default=ALGO)
    algo: str | None = parser.parse_known_args(arguments)[0].algo
    return algo


def main(argv: Sequence[str] | None = None) -> None:
    """Run the RL Zoo's ``train`` or ``enjoy`` with ``ppo_plus`` registered; every flag of theirs is taken.

    Unless given, ``--algo`` is ``ppo_plus``, and with it train's ``-conf`` is ``hyperparams_file()`` and
    enjoy's ``-f`` is ``logs``, train's own default. Without ``--trust``, enjoy unpickles, evaluates and imports nothing
    that the log folder holds or names.

    :param argv: ``train`` or ``enjoy`` and its flags; None: those of the command line.
    :raises SystemExit: The command is unknown, the RL Zoo is not installed, or the RL Zoo itself exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m sb3_ppo_plus.zoo",
        description="RL Zoo's train and enjoy for PPOPlus.",
        epilog="Flags after the command are the RL Zoo's: see `train --help` and `enjoy --help`. "
        "enjoy also takes --trust: run whatever code the log folder holds, as the RL Zoo does.",
    )
    parser.add_argument("command", choices=_COMMANDS)
    command, arguments = parser.parse_args(argv[:1]).command, argv[1:]
    trusted = command == "enjoy" and "--trust" in arguments
    if trusted:
        arguments.remove("--trust")
    elif command == "enjoy" and _algo(arguments) not in (ALGO, None):
        raise SystemExit("Only models of ppo_plus can be loaded without trust: give --trust to run the RL Zoo's enjoy")
    try:
        register()
        module = _import_optional(f"rl_zoo3.{command}")
    except ImportError as error:
        raise SystemExit(str(error)) from error

    user_argv = sys.argv
    # The RL Zoo's functions take no arguments: they read the command line.
    sys.argv = [f"{parser.prog} {command}", *_with_defaults(command, arguments)]
    try:
        with _in_our_way(command, module, trusted):
            getattr(module, command)()
    finally:
        sys.argv = user_argv
