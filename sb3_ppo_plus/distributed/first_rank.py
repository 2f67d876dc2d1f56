"""What only the first process does: log, write and evaluate."""

from __future__ import annotations

import functools

from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, ProgressBarCallback

from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.distributed.ranks import Ranks

# They take long, or write files of which all processes have the same names
OF_THE_FIRST_RANK = (EvalCallback, CheckpointCallback)


def share_out_work(callback: BaseCallback, ranks: Ranks) -> None:
    """Let SB3's callbacks that evaluate and write do so in the first process only, during this learn.

    :param callback: the callback of ``learn``, with all callbacks inside it
    :param ranks: the processes
    """
    if ranks.size == 1:
        return
    for child in iterate_callbacks(callback):
        if isinstance(child, OF_THE_FIRST_RANK) and ranks.rank > 0:
            vars(child)["on_step"] = _Replaced(lambda: True)
        elif isinstance(child, ProgressBarCallback):
            vars(child)["_on_step"] = _Replaced(_progress, child, ranks.size)


def take_work_back(callback: BaseCallback) -> None:
    """Undo :func:`share_out_work`.

    :param callback: the callback of ``learn``, with all callbacks inside it
    """
    for child in iterate_callbacks(callback):
        for name in ("on_step", "_on_step"):
            if isinstance(vars(child).get(name), _Replaced):
                del vars(child)[name]


class _Replaced(functools.partial[bool]):
    """A method that was replaced for a learn."""


def _progress(callback: ProgressBarCallback, n_processes: int) -> bool:
    """Count the steps of all processes."""
    callback.pbar.update(callback.training_env.num_envs * n_processes)
    return True
