"""Two runs of one configuration compared, and a configuration that fails made small."""

import copy
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from states import assert_same_training

from differential.training import Configuration, Run, replayed_early
from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import graphs

# What SB3 logs in float64 is added up in float32 or in another order
LOG_TOLERANCE = 1e-4
# A gradient's rounding is about 1e-7 of the largest gradient. Adam's eps of 1e-5 makes at most 1e-2 of a step of it for
# parameters with next to no gradient, so that after a few steps parameters agree to a hundredth of what the furthest
# of them has moved. A wrong operation moves them elsewhere by as much as they move at all
MOVE_TOLERANCE = 1e-2
# Of what a rollout sees, likewise: actions, values and returns follow from the parameters
RECORD_TOLERANCE = 2e-3


class ProvesNothingError(Exception):
    """SB3 itself does not train with the configuration, or not to finite parameters."""


def difference_from_sb3(configuration: Configuration) -> str | None:
    """Say how PPOPlus's default mode differs from SB3's PPO; None: in no bit of what was trained, seen and drawn.

    :raises ProvesNothingError: where SB3's training ends in an error, in NaN or where it began
    """
    sb3 = _trained(configuration, PPO)
    # The other form of value clipping is on purpose
    return _difference(sb3, configuration, {"pessimistic_value_clip": False}, _same_bits)


def difference_of_compiled(configuration: Configuration) -> str | None:
    """Say how PPOPlus differs with ``compile=True``; None: by no more than rounding. No code is generated.

    :raises ProvesNothingError: as above
    """
    eager = _trained(configuration, PPOPlus)
    with _graphs_without_code():
        return _difference(eager, configuration, {"compile": True}, _same_to_rounding)


def _trained(configuration: Configuration, algorithm: type) -> Run:
    try:
        run = Run(copy.deepcopy(configuration), algorithm)
    except Exception as error:
        raise ProvesNothingError(f"{algorithm.__name__}: {type(error).__name__}: {error}") from error
    parameters = run.model.policy.state_dict()
    if not all(value.isfinite().all() for value in parameters.values()):
        raise ProvesNothingError("not finite")
    return run


def _difference(
    expected: Run, configuration: Configuration, arguments: dict[str, Any], check: Callable[[Run, Run], str | None]
) -> str | None:
    try:
        with replayed_early(configuration):
            actual = Run(copy.deepcopy(configuration), PPOPlus, **arguments)
    except Exception:  # whatever it is, SB3 trained without
        return traceback.format_exc(limit=-3)
    return check(expected, actual)


@contextmanager
def _graphs_without_code() -> Iterator[None]:
    generate_code = graphs._generate_code
    graphs._generate_code = lambda graph, options: graph
    try:
        yield
    finally:
        graphs._generate_code = generate_code


def _same_bits(sb3: Run, ours: Run) -> str | None:
    seen = [[record for record in run.records if not _is_logged(record)] for run in (sb3, ours)]
    for (name, expected), (other, actual) in zip(*seen, strict=False):
        if name != other:
            return f"{name} and {other}"
        if expected.dtype != actual.dtype or expected.tobytes() != actual.tobytes():
            return f"{name}: {_shown(expected, actual)}"
    if len(seen[0]) != len(seen[1]):
        return f"{len(seen[0])} records and {len(seen[1])}"
    try:
        assert_same_training(sb3.model, ours.model)
    except AssertionError as error:
        return str(error)
    logged = dict(filter(_is_logged, ours.records))
    for name, expected in filter(_is_logged, sb3.records):
        if name not in logged or not _is_close(expected, logged[name], LOG_TOLERANCE):
            return f"{name}: {expected} and {logged.get(name)}"
    return None


def _is_logged(record: tuple[str, np.ndarray]) -> bool:
    return record[0].startswith("logged")


def _same_to_rounding(eager: Run, compiled: Run) -> str | None:
    # Callbacks find values and log-probs in the buffer only
    passed_over = ("values", "log_probs", "logged", "PyTorch's random state")
    seen = [[one for one in run.records if not one[0].startswith(passed_over)] for run in (eager, compiled)]
    for (name, expected), (other, actual) in zip(*seen, strict=False):
        if name != other:
            return f"{name} and {other}"
        if expected.shape != actual.shape or not _is_close(expected, actual, RECORD_TOLERANCE):
            return f"{name}: {_shown(expected, actual)}"
    before, after, other = eager.initial, eager.model.policy.state_dict(), compiled.model.policy.state_dict()
    if after.keys() != other.keys():
        return f"{after.keys() ^ other.keys()}"
    moved = 0.0
    for name, value in after.items():
        if name in before and before[name].shape == value.shape and value.numel() > 0:
            moved = max(moved, float((value - before[name]).abs().max()))
    for name, value in after.items():
        distance = float((value.double() - other[name].double()).abs().max()) if value.numel() else 0.0
        if distance > MOVE_TOLERANCE * moved + 1e-6:
            return f"{name} differs by {distance:.2g}, parameters moved {moved:.2g}"
    return None


def _is_close(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> bool:
    if expected.dtype.kind not in "fiub":
        return bool((expected == actual).all())
    scale = np.nan_to_num(np.abs(expected.astype(np.float64))).max(initial=0.0) + 1.0
    return np.allclose(
        expected.astype(np.float64), actual.astype(np.float64), rtol=0.0, atol=tolerance * scale, equal_nan=True
    )


def _shown(expected: np.ndarray, actual: np.ndarray) -> str:
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        return f"{expected.dtype}{expected.shape} and {actual.dtype}{actual.shape}"
    # The largest difference is what a comparison to rounding is about
    distances = np.nan_to_num(np.abs(expected.astype(np.float64) - actual.astype(np.float64)))
    where = np.unravel_index(distances.argmax(), distances.shape) if expected.size else ()
    return f"{expected[where]!r} and {actual[where]!r} at {tuple(map(int, where))} of {expected.shape}"


def shrunk(configuration: Configuration, fails: Callable[[Configuration], bool]) -> Configuration:
    """Drop one part after another as long as the configuration still fails.

    :param configuration: one that fails
    :param fails: whether a configuration does
    """
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for candidate in _smaller(configuration):
            if fails(candidate):
                configuration, is_smaller = candidate, True
                break
    return configuration


def _smaller(configuration: Configuration) -> Iterator[Configuration]:
    for name, value in configuration.items():
        without = {other: part for other, part in configuration.items() if other != name}
        if name == "seed":
            continue
        yield without
        if isinstance(value, dict):
            for key in value:
                yield without | {name: {other: part for other, part in value.items() if other != key}}
        elif isinstance(value, list):
            for index in range(len(value)):
                if value[:index] + value[index + 1 :]:
                    yield without | {name: value[:index] + value[index + 1 :]}
