"""Schedules of training progress and their short string form.

A schedule maps ``progress_remaining``, which SB3 counts from 1 (start of training) down to 0, to a coefficient.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

__all__ = ["Constant", "Cosine", "Exponential", "Linear", "Schedule", "WarmupCosine", "make_schedule", "schedule_value"]


def _check_number(
    owner: str, argument: str, value: object, *, above_zero: bool = False, at_most_one: bool = False
) -> float:
    """Return ``value`` as a finite float within the limits that the flags set.

    :raises TypeError: if it is not a real number (a bool is not one)
    :raises ValueError: if it is NaN, infinite or outside the limits
    """
    allowed = "a finite number"
    if above_zero:
        allowed += " in (0, 1]" if at_most_one else " above 0"
    message = f"{owner}: {argument} must be {allowed}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    number = float(value)
    if not math.isfinite(number) or (above_zero and number <= 0) or (at_most_one and number > 1):
        raise ValueError(message)
    return number


def _elapsed(progress_remaining: float) -> float:
    """Return the share of training that is done, in [0, 1]; ``progress_remaining`` is clamped."""
    return 1.0 - min(max(float(progress_remaining), 0.0), 1.0)


def _between(value: float, first: float, second: float) -> float:
    """Clip ``value`` to the interval between two numbers, because rounding may step over its ends."""
    return min(max(value, min(first, second)), max(first, second))


@dataclass(frozen=True)
class _Anchored(ABC):
    """Base of all schedules: one that has a finite ``value``."""

    value: float

    @abstractmethod
    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``."""

    def __post_init__(self) -> None:
        self._store("value")

    def _store(self, argument: str, *, above_zero: bool = False, at_most_one: bool = False) -> None:
        number = _check_number(
            type(self).__name__, argument, getattr(self, argument), above_zero=above_zero, at_most_one=at_most_one
        )
        # The dataclass is frozen, so object sets its field. An int or a numpy number becomes a plain float
        object.__setattr__(self, argument, number)


@dataclass(frozen=True)
class Constant(_Anchored):
    """A constant value.

    :param value: the value
    :raises ValueError: if it is NaN or infinite (TypeError: not a number)
    """

    def __call__(self, progress_remaining: float) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class Linear(_Anchored):
    """A straight line from ``value`` to ``end``, equal to SB3's ``LinearSchedule``.

    :param value: value at progress 1
    :param end: value after ``end_fraction`` of training
    :param end_fraction: share of training, in (0, 1], after which ``end`` is reached
    :raises ValueError: if an argument is NaN, infinite or outside its range (TypeError: not a number)
    """

    end: float = 0.0
    end_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._store("end")
        self._store("end_fraction", above_zero=True, at_most_one=True)

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``, which is clamped to [0, 1]."""
        step = _elapsed(progress_remaining) * (self.end - self.value) / self.end_fraction
        # After end_fraction, the line would go on beyond ``end``
        return _between(self.value + step, self.value, self.end)


@dataclass(frozen=True)
class Cosine(_Anchored):
    """Half a cosine period from ``value`` to ``end`` (Loshchilov and Hutter 2017, SGDR, equation 5, without restarts).

    :param value: value at progress 1
    :param end: value at progress 0
    :raises ValueError: if an argument is NaN or infinite (TypeError: not a number)
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._store("end")

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``, which is clamped to [0, 1]."""
        return _half_cosine(self.value, self.end, _elapsed(progress_remaining))


@dataclass(frozen=True)
class WarmupCosine(_Anchored):
    """A straight line from 0 up to ``value``, then half a cosine period down to ``end``.

    :param value: value at the end of the warm-up
    :param warmup_fraction: share of training, in (0, 1], that the warm-up takes; with 1 there is no cosine
    :param end: value at progress 0
    :raises ValueError: if an argument is NaN, infinite or outside its range (TypeError: not a number)
    """

    warmup_fraction: float = 0.1
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._store("warmup_fraction", above_zero=True, at_most_one=True)
        self._store("end")

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``, which is clamped to [0, 1]."""
        elapsed = _elapsed(progress_remaining)
        if elapsed <= self.warmup_fraction:
            return self.value * (elapsed / self.warmup_fraction)
        return _half_cosine(self.value, self.end, (elapsed - self.warmup_fraction) / (1.0 - self.warmup_fraction))


@dataclass(frozen=True)
class Exponential(_Anchored):
    """A geometric interpolation from ``value`` to ``end``: equal steps of progress multiply the value by equal factors.

    :param value: value at progress 1, above 0
    :param end: value at progress 0, above 0
    :raises ValueError: if an argument is NaN, infinite or not above 0 (TypeError: not a number)
    """

    end: float

    def __post_init__(self) -> None:
        self._store("value", above_zero=True)
        self._store("end", above_zero=True)

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``, which is clamped to [0, 1]."""
        elapsed = _elapsed(progress_remaining)
        return _between(self.value ** (1.0 - elapsed) * self.end**elapsed, self.value, self.end)


def _half_cosine(value: float, end: float, elapsed: float) -> float:
    """Return the point at ``elapsed`` in [0, 1] of the half cosine period from ``value`` to ``end``."""
    weight = 0.5 * (1.0 + math.cos(math.pi * elapsed))
    # With two weights instead of one difference, both ends are exact
    return _between(weight * value + (1.0 - weight) * end, value, end)


_STRING_FORMS = '"3e-4", "lin_3e-4", "lin_3e-4_1e-5", "cos_3e-4", "cos_3e-4_1e-5", "warmup_cos_3e-4", '
_STRING_FORMS += '"warmup_cos_3e-4_1e-5", "exp_3e-4_1e-5" (shape_start_end; without an end it is 0)'


def make_schedule(value: object, name: str = "schedule", *, minimum: float = 0.0) -> Schedule:
    """Turn a coefficient, in any form that a user may give, into a schedule.

    :param value: a number, a schedule, any callable of progress_remaining, or a string: a number or one of
        ``lin_START``, ``lin_START_END``, ``cos_START``, ``cos_START_END``, ``warmup_cos_START``,
        ``warmup_cos_START_END``, ``exp_START_END``
    :param name: the coefficient's name, for error messages
    :param minimum: the smallest value allowed
    :return: the schedule; SB3's ``FloatSchedule`` wraps other callables, so that they return plain floats
    :raises TypeError: for a value of another type
    :raises ValueError: for an unknown string, or a schedule that gives NaN, an infinity or less than ``minimum``. A
        callable is tried at progress 1 only, as in SB3; :func:`schedule_value` checks its later values
    """
    schedule: Schedule
    if isinstance(value, str):
        schedule = _parse(value, name)
    elif isinstance(value, Real) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number of at least {minimum:g}, got {value!r}")
        schedule = Constant(float(value))
    elif isinstance(value, _Anchored | FloatSchedule):
        schedule = value
    elif callable(value) and not isinstance(value, type):
        schedule = FloatSchedule(value)
    else:
        raise TypeError(
            f"{name} must be a number of at least {minimum:g}, a callable of progress_remaining, or one of the strings "
            f"{_STRING_FORMS}; got {value!r}"
        )
    return _checked(schedule, value, name, minimum)


def _checked(schedule: Schedule, given: object, name: str, minimum: float) -> Schedule:
    """Return ``schedule`` if the values that are known before training are allowed; raise ValueError otherwise."""
    if isinstance(schedule, _Anchored):
        # All values of our schedules lie between these two. Only a warm-up begins at 0, which is always allowed
        values = [schedule.value, getattr(schedule, "end", schedule.value)]
    else:
        values = [_evaluate(schedule, 1.0, name)]
    if not all(math.isfinite(value) and value >= minimum for value in values):
        raise ValueError(f"{name} must be finite and at least {minimum:g} throughout, got {given!r}")
    return schedule


def _parse(text: str, name: str) -> Schedule:
    """Read a schedule's string form."""
    shape, numbers = "", text.strip()
    for prefix in ("lin_", "cos_", "warmup_cos_", "exp_"):
        if numbers.startswith(prefix):
            shape, numbers = prefix, numbers[len(prefix) :]
            break
    try:
        values = [float(number) for number in numbers.split("_")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= (2 if shape else 1) or (shape == "exp_" and len(values) == 1):
        reason = "an exp schedule needs its end" if shape == "exp_" and values else "unknown schedule"
        raise ValueError(f"{name}: {reason} in {text!r}; allowed are {_STRING_FORMS}")
    try:
        if shape == "exp_":
            return Exponential(values[0], values[1])
        end = values[1] if len(values) == 2 else 0.0
        if shape == "lin_":
            return Linear(values[0], end)
        if shape == "cos_":
            return Cosine(values[0], end)
        return WarmupCosine(values[0], end=end) if shape else Constant(values[0])
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: {error}") from error


def _evaluate(schedule: Schedule, progress_remaining: float, name: str) -> float:
    """Return a schedule's value as a float; raise an error that names the coefficient if it is not a number."""
    try:
        return float(schedule(progress_remaining))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{name}: the schedule {schedule!r} must take progress_remaining and return a number, "
            f"but at progress_remaining={progress_remaining:g} failed: {error}"
        ) from error


def schedule_value(schedule: Schedule, progress_remaining: float, name: str) -> float:
    """Return the value of a coefficient's schedule; refuse a value that no coefficient may have.

    :param schedule: the schedule
    :param progress_remaining: 1 at the start of training, 0 at its end
    :param name: the coefficient's name, for the error message
    :return: its value, finite and not negative
    :raises ValueError: if the value is NaN, infinite or negative
    :raises TypeError: if the schedule does not return a number
    """
    value = _evaluate(schedule, progress_remaining, name)
    if not math.isfinite(value) or value < 0:
        raise ValueError(
            f"{name} must be finite and not negative, but its schedule {schedule!r} gives {value!r} "
            f"at progress_remaining={progress_remaining:g}"
        )
    return value
