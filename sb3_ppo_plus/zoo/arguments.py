"""The flags of the RL Zoo's commands, with what PPOPlus adds to them."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import rl_zoo3.utils
from rl_zoo3.utils import StoreDict

from sb3_ppo_plus.zoo.hyperparams import how_to_install
from sb3_ppo_plus.zoo.parser import ZooParser
from sb3_ppo_plus.zoo.processes import check_flags

CHECKPOINT_FREQ = 50_000
# What YAML would read as a text: a name, or the string form of a schedule
_WORD = re.compile(r"[A-Za-z_][\w.+-]*", re.ASCII)
_NOT_PYTHON = {"true": "True", "false": "False", "null": "None", "none": "None"}


class TrainParser(ZooParser):
    """The parser of ``train`` with PPOPlus, to which the RL Zoo adds its own flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = self.add_argument_group("PPOPlus", "so that `resume RUN_FOLDER` can go on with a run that was ended")
        group.add_argument(
            "--checkpoint-freq",
            metavar="N",
            type=int,
            default=CHECKPOINT_FREQ,
            help="write a checkpoint every N timesteps, counted over all environments, at the end of an update "
            "(default: %(default)s)",
        )
        group.add_argument("--no-checkpoint", action="store_true", help="write none, and only the RL Zoo's files")

    def parse_args(  # type: ignore[override]  # the same
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse the command line.

        :param args: the flags; None: those of the command line
        :param namespace: what gets the values; None: a new one
        :raises SystemExit: for a flag that does not exist, or a value that is not allowed
        """
        parsed = super().parse_args(args, namespace)
        if parsed.checkpoint_freq < 1:
            self.error(
                f"argument --checkpoint-freq: must be at least 1, got {parsed.checkpoint_freq}; "
                "--no-checkpoint writes none"
            )
        if parsed.track and importlib.util.find_spec("wandb") is None:
            self.error(f"argument --track: wandb is not installed: {how_to_install('track')}")
        check_flags(parsed, self.error)
        return parsed


class EnjoyParser(ZooParser):
    """The parser of ``enjoy``, to which the RL Zoo adds its own flags. ``--trust`` was taken out already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        help_of_trust = "run whatever code the log folder holds or names, as the RL Zoo does"
        self.add_argument_group("PPOPlus").add_argument("--trust", action="store_true", help=help_of_trust)


class StorePlainDict(StoreDict):
    """The RL Zoo's ``key:value``, whose value is Python; a word that means nothing there is taken as a text.

    So ``learning_rate:cos_1e-3`` needs no quotes inside quotes.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401  # argparse's own type
        option_string: str | None = None,
    ) -> None:
        """Store the dict."""
        stored: dict[str, Any] = {}
        for pair in values:
            key, colon, value = pair.partition(":")
            if not colon:
                parser.error(f"argument {option_string}: must be key:value, got {pair!r}")
            if value in _NOT_PYTHON:
                parser.error(f"argument {option_string}: {pair}: write {key}:{_NOT_PYTHON[value]}, as in Python")
            one = argparse.Namespace()
            try:
                plain = f"{key}:{value!r}" if _is_text(value) else pair
                super().__call__(parser, one, [plain], option_string)  # type: ignore[no-untyped-call]  # it has no types
            except Exception as error:
                # It is Python of the user's, which may raise anything
                parser.error(
                    f"argument {option_string}: {pair}: the value must be Python or one word, and is "
                    f"{type(error).__name__}: {error}"
                )
            stored |= getattr(one, self.dest)
        setattr(namespace, self.dest, stored)


def _is_text(value: str) -> bool:
    """Whether a value is a word that has no meaning where the RL Zoo evaluates it."""
    if not _WORD.fullmatch(value):
        return False
    try:
        eval(value, dict(vars(rl_zoo3.utils)))
    except (NameError, SyntaxError, AttributeError, TypeError):
        return True
    return False
