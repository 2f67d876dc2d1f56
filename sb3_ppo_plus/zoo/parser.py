"""The parser of all commands, and the module that gives it to the RL Zoo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NoReturn

from sb3_ppo_plus.argument_checks import did_you_mean


class ZooParser(argparse.ArgumentParser):
    """Names the nearest flag where one does not exist."""

    def parse_args(  # type: ignore[override]  # argparse overloads it by the type of the namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse the command line, as argparse does.

        :param args: the flags; None: those of the command line
        :param namespace: what gets the values; None: a new one
        :raises SystemExit: for a flag that does not exist
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return known

    def _refuse(self, unknown: list[str]) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        hints = [did_you_mean(one.partition("=")[0], flags) for one in unknown if one.startswith("-")]
        self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints[:1])}")


def argparse_with(parser: type[argparse.ArgumentParser]) -> SimpleNamespace:
    """Return argparse with another parser. A command of the RL Zoo gets it in place of the module.

    :param parser: the class
    """
    return SimpleNamespace(**{**vars(argparse), "ArgumentParser": parser})
