"""Says which worker of a SubprocVecEnv has died, where SB3 has but an EOFError."""

from __future__ import annotations

import signal
from collections.abc import Iterable
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


def dead_worker_error(env: VecEnv | None, callback: BaseCallback | None) -> DeadWorkerError | None:
    """Describe the dead workers among the environments of a training.

    :param env: the training environment
    :param callback: the training's callbacks, which may have an ``eval_env``
    :return: the error to raise, or None where every worker is alive
    """
    envs = [env, *(getattr(child, "eval_env", None) for child in (iterate_callbacks(callback) if callback else ()))]
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
