"""``python -m sb3_ppo_plus.zoo COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

from sb3_ppo_plus.argument_checks import did_you_mean
from sb3_ppo_plus.zoo.hyperparams import ALGO, hyperparams_file, import_optional
from sb3_ppo_plus.zoo.parser import ZooParser, argparse_with
from sb3_ppo_plus.zoo.processes import check_alone, working_together
from sb3_ppo_plus.zoo.registration import hint_at_missing_model, register, with_members

PROG = "python -m sb3_ppo_plus.zoo"

#: Commands that are the RL Zoo's own, with PPOPlus registered, and what they do
_RL_ZOO_COMMANDS = {
    "train": "train a model, or search for hyperparameters (-optimize)",
    "enjoy": "watch a trained model act, and measure its returns",
}
#: Commands of ours: each is a module with a function ``main(arguments: list[str])``, and what it does
_OWN_COMMANDS: dict[str, tuple[str, str]] = {
    "resume": ("sb3_ppo_plus.zoo.resume", "go on with a run of train that was ended"),
    "record": ("sb3_ppo_plus.zoo.record", "record videos of a run's models"),
    "benchmark": ("sb3_ppo_plus.zoo.benchmark", "evaluate all runs of a log folder into one table"),
    "report": ("sb3_ppo_plus.zoo.report", "compare runs by their learning curves, as PNG and HTML"),
    "export": ("sb3_ppo_plus.zoo.export", "write a run's policy as ONNX or for PyTorch"),
    "push": ("sb3_ppo_plus.zoo.push", "put a run on the Hugging Face Hub"),
    "pull": ("sb3_ppo_plus.zoo.pull", "get a run from the Hugging Face Hub, without trust"),
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
def _in_our_way(command: str, module: ModuleType, trusted: bool, algo: str | None) -> Iterator[None]:
    """Change what the RL Zoo's command does with files, while it runs, and its flags.

    :param command: ``train`` or ``enjoy``.
    :param module: The RL Zoo's module of that name.
    :param trusted: Whether ``enjoy`` may run code from the log folder.
    :param algo: The algorithm.
    :raises SystemExit: Without trust, the log folder holds what is not plain.
    """
    from sb3_ppo_plus.errors import UntrustedFileError
    from sb3_ppo_plus.zoo import arguments, enjoy, train

    replaced: dict[str, Any] = {"argparse": argparse_with(arguments.EnjoyParser)}
    if command == "train":
        replaced = {"argparse": argparse_with(ZooParser)}
        if algo == ALGO:
            replaced = {
                "argparse": argparse_with(arguments.TrainParser),
                "ExperimentManager": train.CheckpointedExperiment,
                "StoreDict": arguments.StorePlainDict,
            }
        with with_members(module, replaced), enjoy.saving_statistics_twice():
            yield
        return
    try:
        with (
            with_members(module, replaced),
            nullcontext() if trusted else enjoy.enjoying_without_trust(module),
            _enjoying_with_masks(module, trusted),
        ):
            yield
    except UntrustedFileError as error:
        raise SystemExit(f"{error}\nWith --trust, enjoy runs whatever code the log folder holds.") from error
    except ValueError as error:
        hint = hint_at_missing_model(error)
        if not hint:
            raise
        raise SystemExit(f"{error}{hint}") from error


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

    With ``ppo_plus``, ``train`` also writes checkpoints, from which ``resume RUN_FOLDER`` goes on.
    Unless given, ``--algo`` is ``ppo_plus``, and with it train's ``-conf`` is ``hyperparams_file()`` and
    enjoy's ``-f`` is ``logs``, train's own default. Without ``--trust``, enjoy unpickles, evaluates and imports nothing
    that the log folder holds or names.

    :param argv: The command and its flags; None: those of the command line.
    :raises SystemExit: The command is unknown, the RL Zoo is not installed, or the command itself exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    command, arguments = parser.parse_args(argv[:1]).command, argv[1:]
    descriptions = _descriptions()
    if command not in descriptions:
        parser.error(
            f"argument command: {command!r} is none of {', '.join(descriptions)}{did_you_mean(command, descriptions)}"
        )
    if command not in ("train", "resume"):
        check_alone(command)
    if command not in _OWN_COMMANDS:
        _run_rl_zoos(command, arguments)
        return
    module, _ = _OWN_COMMANDS[command]
    try:
        import_optional(module).main(arguments)
    except ImportError as error:
        raise SystemExit(str(error)) from error


def _descriptions() -> dict[str, str]:
    return {**_RL_ZOO_COMMANDS, **{name: description for name, (_, description) in _OWN_COMMANDS.items()}}


def _parser() -> argparse.ArgumentParser:
    descriptions = _descriptions()
    width = max(map(len, descriptions))
    lines = [f"  {name:{width}}  {description}" for name, description in descriptions.items()]
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} COMMAND [FLAGS]",
        description="The RL Zoo with PPOPlus.",
        epilog="\n".join(["commands:", *lines, "", f"The flags of a command: {PROG} COMMAND --help"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    return parser


def _run_rl_zoos(command: str, arguments: list[str]) -> None:
    """Run a command of the RL Zoo in our way.

    :param command: ``train`` or ``enjoy``.
    :param arguments: Its flags.
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
    sys.argv = [f"{PROG} {command}", *_with_defaults(command, arguments)]
    try:
        together = working_together(_algo(arguments)) if command == "train" else nullcontext()
        with together, _in_our_way(command, module, trusted, _algo(arguments)):
            getattr(module, command)()
    finally:
        sys.argv = user_argv
