"""Questions about environments to a VecEnv that may not answer them.

SB3's PPO needs only ``reset`` and ``step``. VecEnvs of other packages, such as SuperSuit's, may lack ``has_attr``,
``get_attr``, ``env_method`` and ``env_is_wrapped``, refuse them, or take other arguments. Then the functions here
return answers with which training works.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_ppo_plus.errors import DeadWorkerError

# Their subclasses may do more
_KEEPS_OBSERVATIONS = (VecCheckNan, VecMonitor, VecVideoRecorder)
# A name that no environment has
_NO_ATTRIBUTE = "sb3_ppo_plus_asks_whether_every_answer_is_yes"


def wrappers_of(env: VecEnv | None) -> Iterator[VecEnvWrapper]:
    """Yield the wrappers of a vectorised environment, from the outside in.

    :param env: the outermost vectorised environment; None has no wrappers
    """
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv


def base_of(env: VecEnv) -> Any:  # noqa: ANN401  # whatever a wrapper of another package wraps
    """Return what is inside all VecEnvWrappers. A wrapper of another package may hold an object that is no VecEnv.

    :param env: the outermost vectorised environment
    """
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env


def keeps_observations(wrapper: VecEnvWrapper) -> bool:
    """Whether it is known that a wrapper hands on observations as they are.

    :param wrapper: the wrapper
    """
    if type(wrapper) is VecNormalize:
        return not wrapper.norm_obs
    if type(wrapper) is VecTransposeImage:
        return bool(wrapper.skip)
    return type(wrapper) in _KEEPS_OBSERVATIONS


def unknown_wrapper(
    env: VecEnv | None, inner: VecEnv | None = None, known: Collection[type[VecEnvWrapper]] = ()
) -> VecEnvWrapper | None:
    """Find a wrapper that may change observations in a way that is not known.

    :param env: the outermost vectorised environment
    :param inner: where the search ends; None: at the environment that is no wrapper
    :param known: classes whose changes are known
    :return: the outermost such wrapper; None: there is none
    """
    for wrapper in wrappers_of(env):
        if wrapper is inner:
            return None
        if type(wrapper) not in known and not keeps_observations(wrapper):
            return wrapper
    return None


def innermost_normalizer(env: VecEnv | None) -> VecNormalize | None:
    """Return the innermost VecNormalize that normalises observations; None: there is none.

    :param env: the outermost vectorised environment
    """
    found = [wrapper for wrapper in wrappers_of(env) if isinstance(wrapper, VecNormalize) and wrapper.norm_obs]
    return found[-1] if found else None


def has_attribute(env: Any, name: str) -> bool:  # noqa: ANN401  # a VecEnv, or what base_of returned
    """Whether every environment has an attribute.

    :param env: the vectorised environment
    :param name: name of the attribute
    :return: False also if ``env`` cannot tell, or says yes to every name
    """
    return bool(_answer(lambda: env.has_attr(name) and not env.has_attr(_NO_ATTRIBUTE)))


def values_of_attribute(env: Any, name: str, indices: Sequence[int]) -> list[Any] | None:  # noqa: ANN401  # what base_of returned
    """Get an attribute of some environments.

    :param env: the vectorised environment
    :param name: name of the attribute
    :param indices: indices of the environments
    :return: one value for each index; None if ``env`` cannot tell
    """
    return _answers(lambda: env.get_attr(name, indices), len(indices))


def names_of(env: Any) -> list[str]:  # noqa: ANN401  # a VecEnv, or what base_of returned
    """Get ``str()`` of every environment, which names its wrappers.

    :param env: the vectorised environment
    :return: empty if ``env`` cannot tell
    """
    answers = _answer(lambda: env.env_method("__str__"))
    return list(map(str, answers)) if isinstance(answers, list | tuple) else []


def indices_of_wrapped(env: VecEnv, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]]) -> list[int]:
    """Find the environments that have a wrapper.

    :param env: the vectorised environment
    :param wrapper_class: class of the wrapper
    :return: their indices; empty if ``env`` cannot tell
    """
    answers = _answers(lambda: env.env_is_wrapped(wrapper_class), env.num_envs) or []
    return [index for index, is_wrapped in enumerate(answers) if is_wrapped]


def _answers(ask: Callable[[], Any], n_expected: int) -> list[Any] | None:
    answers = _answer(ask)
    return list(answers) if isinstance(answers, list | tuple) and len(answers) == n_expected else None


def _answer(ask: Callable[[], Any]) -> Any:  # noqa: ANN401  # None, or the answer of a VecEnv
    try:
        return ask()
    except (EOFError, OSError, DeadWorkerError):
        # A worker process has died: other code names it, or has done so
        raise
    except Exception:
        return None
