"""Makes ``ppo_plus`` an algorithm of the RL Zoo, which has no plugins."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sb3_ppo_plus.zoo.hyperparams import (
    ALGO,
    convert_ppo_plus_params,
    import_optional,
    sample_ppo_plus_params,
)

if TYPE_CHECKING:
    from rl_zoo3.exp_manager import ExperimentManager

#: PPOPlus's arguments that are a number, a schedule or a schedule's string form; PPOPlus resolves them itself.
SCHEDULED_ARGUMENTS = (
    *("learning_rate", "critic_learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef"),
    *("caps_temporal", "caps_spatial"),
)


@contextmanager
def with_members(module: Any, members: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401  # a module, or a class
    """Replace members of a module of the RL Zoo for a while: it has no other hooks.

    :param module: The module.
    :param members: What takes their places, by name.
    """
    originals = {name: getattr(module, name) for name in members}
    try:
        for name, member in members.items():
            setattr(module, name, member)
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def hint_at_missing_model(error: Exception) -> str:
    """Say what to do about the RL Zoo's error that a run has no model.

    :param error: An error of the RL Zoo's ``get_model_path``, or any other.
    :return: Another line of the message; empty if the error is about something else.
    """
    if not str(error).startswith(("No model found", "No checkpoint found")):
        return ""
    return (
        "\nA run that was ended has no final model yet: `resume RUN_FOLDER` goes on with it. --load-best may find one"
    )


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
    zoo = import_optional("rl_zoo3")
    hyperparams_opt = import_optional("rl_zoo3.hyperparams_opt")
    exp_manager = import_optional("rl_zoo3.exp_manager")
    from sb3_ppo_plus.ppo_plus import PPOPlus

    zoo.ALGOS[ALGO] = PPOPlus
    hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_ppo_plus_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert_ppo_plus_params
    _let_schedules_through(exp_manager)
