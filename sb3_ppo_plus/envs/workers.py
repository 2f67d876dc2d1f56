"""Says which worker of a SubprocVecEnv has died, where SB3 has but an EOFError."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.envs.questions import base_of
from sb3_ppo_plus.errors import DeadWorkerError

# What SB3 lets through where a worker's end of the pipe is closed
BROKEN_PIPES = (EOFError, ConnectionError)
# A worker closes its pipe before its process has ended
MAX_WAIT = 2.0


@contextmanager
def naming_dead_workers(envs: Callable[[], Iterable[object]]) -> Iterator[None]:
    """Raise :class:`DeadWorkerError` where SB3 raises no more than that a pipe is broken.

    :param envs: gives the vectorised environments in use
    """
    try:
        yield
    except BROKEN_PIPES as error:
        dead = dead_worker_error(envs())
        if dead is None:
            raise
        raise dead from error


def eval_envs_of(callback: BaseCallback | None) -> list[object]:
    """Return the environments on which callbacks evaluate.

    :param callback: with all callbacks inside it
    """
    children = [] if callback is None else iterate_callbacks(callback)
    return [getattr(child, "eval_env", None) for child in children]


def dead_worker_error(envs: Iterable[object]) -> DeadWorkerError | None:
    """Describe the dead workers among the environments of a training.

    :param envs: vectorised environments; anything else is passed over
    :return: the error to raise, or None where every worker is alive
    """
    subprocess_envs = [base_of(each) for each in envs if isinstance(each, VecEnv)]
    dead = [text for each in subprocess_envs if isinstance(each, SubprocVecEnv) for text in _dead_workers(each)]
    return DeadWorkerError("; ".join(dict.fromkeys(dead))) if dead else None


def _dead_workers(env: SubprocVecEnv) -> Iterable[str]:
    ended = wait([process.sentinel for process in env.processes], MAX_WAIT)
    for index, process in enumerate(env.processes):
        if process.sentinel in ended:
            process.join(MAX_WAIT)
        code = process.exitcode
        if code is not None:
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            hint = " (an exception in the environment: its traceback is above, on stderr)" if code == 1 else ""
            yield f"worker {index} of {len(env.processes)} of the SubprocVecEnv {reason}{hint}"
