"""``python -m sb3_ppo_plus.zoo COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

from sb3_ppo_plus.zoo.hyperparams import ALGO, hyperparams_file, import_optional
from sb3_ppo_plus.zoo.registration import register

#: Commands that are the RL Zoo's own, with PPOPlus registered
_RL_ZOO_COMMANDS = ("train", "enjoy")
#: Commands of ours: each is a module of this folder with a function ``main(arguments: list[str])``
_OWN_COMMANDS: dict[str, str] = {
    "record": "sb3_ppo_plus.zoo.record",
    "benchmark": "sb3_ppo_plus.zoo.benchmark",
    "report": "sb3_ppo_plus.zoo.report",
    "push": "sb3_ppo_plus.zoo.push",
    "pull": "sb3_ppo_plus.zoo.pull",
}


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
    """Run a command of the zoo. ``train`` and ``enjoy`` are the RL Zoo's and take all its flags.

    Unless given, ``--algo`` is ``ppo_plus``, and with it train's ``-conf`` is ``hyperparams_file()`` and
    enjoy's ``-f`` is ``logs``, train's own default. Without ``--trust``, enjoy unpickles, evaluates and imports nothing
    that the log folder holds or names.

    :param argv: The command and its flags; None: those of the command line.
    :raises SystemExit: The command is unknown, the RL Zoo is not installed, or the command itself exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m sb3_ppo_plus.zoo",
        description="RL Zoo's train and enjoy for PPOPlus.",
        epilog="Flags after the command are the RL Zoo's: see `train --help` and `enjoy --help`. "
        "enjoy also takes --trust: run whatever code the log folder holds, as the RL Zoo does.",
    )
    parser.add_argument("command", choices=(*_RL_ZOO_COMMANDS, *_OWN_COMMANDS))
    command, arguments = parser.parse_args(argv[:1]).command, argv[1:]
    if command in _OWN_COMMANDS:
        try:
            importlib.import_module(_OWN_COMMANDS[command]).main(arguments)
        except ImportError as error:
            raise SystemExit(str(error)) from error
        return
    _run_rl_zoos(command, arguments, parser.prog)


def _run_rl_zoos(command: str, arguments: list[str], prog: str) -> None:
    """Run a command of the RL Zoo in our way.

    :param command: ``train`` or ``enjoy``.
    :param arguments: Its flags.
    :param prog: The program's name, for messages.
    """
    trusted = command == "enjoy" and "--trust" in arguments
    if trusted:
        arguments.remove("--trust")
    elif command == "enjoy" and _algo(arguments) not in (ALGO, None):
        raise SystemExit("Only models of ppo_plus can be loaded without trust: give --trust to run the RL Zoo's enjoy")
    try:
        register()
        module = import_optional(f"rl_zoo3.{command}")
    except ImportError as error:
        raise SystemExit(str(error)) from error

    user_argv = sys.argv
    # The RL Zoo's functions take no arguments: they read the command line.
    sys.argv = [f"{prog} {command}", *_with_defaults(command, arguments)]
    try:
        with _in_our_way(command, module, trusted):
            getattr(module, command)()
    finally:
        sys.argv = user_argv
