"""Schedules of training progress and their short string form.

A schedule maps ``progress_remaining``, which SB3 counts from 1 (start of training) down to 0, to a coefficient.
"""

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

__all__ = [
    "SHAPES",
    "Constant",
    "Cosine",
    "Exponential",
    "Linear",
    "ProgressSchedule",
    "Schedule",
    "WarmupCosine",
    "make_schedule",
    "schedule_value",
]


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
class ProgressSchedule(ABC):
    """Base of our schedules: frozen dataclasses, which check their arguments and compare by them.

    :func:`make_schedule` returns an instance as it is. It wraps any other callable in SB3's ``FloatSchedule``.

    :param value: a finite number
    """

    value: float

    @abstractmethod
    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``."""

    @property
    def limits(self) -> tuple[float, float]:
        """Two numbers between which all values lie; a warm-up also begins at 0. ``make_schedule`` checks the two.

        A subclass whose values leave the range from ``value`` to ``end`` overrides this.
        """
        return self.value, getattr(self, "end", self.value)

    def __post_init__(self) -> None:
        self._store("value")

    def _store(self, argument: str, *, above_zero: bool = False, at_most_one: bool = False) -> None:
        number = _check_number(
            type(self).__name__, argument, getattr(self, argument), above_zero=above_zero, at_most_one=at_most_one
        )
        # The dataclass is frozen, so object sets its field. An int or a numpy number becomes a plain float
        object.__setattr__(self, argument, number)


@dataclass(frozen=True)
class Constant(ProgressSchedule):
    """A constant value.

    :param value: the value
    :raises ValueError: if it is NaN or infinite (TypeError: not a number)
    """

    def __call__(self, progress_remaining: float) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class Linear(ProgressSchedule):
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
class Cosine(ProgressSchedule):
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
class WarmupCosine(ProgressSchedule):
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
class Exponential(ProgressSchedule):
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


SHAPES: dict[str, type[ProgressSchedule]] = {
    "lin": Linear,
    "cos": Cosine,
    "warmup_cos": WarmupCosine,
    "exp": Exponential,
}
"""The schedules with a string form, ``SHAPE_START`` or ``SHAPE_START_END``, from their ``value`` to their ``end``."""


def _needs_end(shape: str) -> bool:
    return inspect.signature(SHAPES[shape]).parameters["end"].default is inspect.Parameter.empty


def _string_forms() -> str:
    forms = ["3e-4"]
    for shape in SHAPES:
        forms += [f"{shape}_3e-4_1e-5"] if _needs_end(shape) else [f"{shape}_3e-4", f"{shape}_3e-4_1e-5"]
    quoted = ", ".join(f'"{form}"' for form in forms)
    return f"{quoted} (shape_start_end; without an end it is 0)"


_STRING_FORMS = _string_forms()


def make_schedule(value: object, name: str = "schedule", *, minimum: float = 0.0) -> Schedule:
    """Turn a coefficient, in any form that a user may give, into a schedule.

    :param value: a number, a schedule, any callable of progress_remaining, or a string: a number, ``SHAPE_START`` or
        ``SHAPE_START_END``, with a shape of ``SHAPES``: lin, cos, warmup_cos or exp. An exp schedule needs its end
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
    elif isinstance(value, ProgressSchedule | FloatSchedule):
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
    if isinstance(schedule, ProgressSchedule):
        values: tuple[float, ...] = schedule.limits
    else:
        values = (_evaluate(schedule, 1.0, name),)
    if not all(math.isfinite(value) and value >= minimum for value in values):
        raise ValueError(f"{name} must be finite and at least {minimum:g} throughout, got {given!r}")
    return schedule


def _parse(text: str, name: str) -> Schedule:
    """Read a schedule's string form."""
    shape, numbers = "", text.strip()
    for known in SHAPES:
        if numbers.startswith(f"{known}_"):
            shape, numbers = known, numbers.removeprefix(f"{known}_")
            break
    try:
        values = [float(number) for number in numbers.split("_", 3)]
    except ValueError:
        values = []
    lacks_end = shape != "" and len(values) == 1 and _needs_end(shape)
    if lacks_end or not 1 <= len(values) <= (2 if shape else 1):
        reason = f"a schedule of the shape {shape} needs its end" if lacks_end else "unknown schedule"
        raise ValueError(f"{name}: {reason} in {text!r}; allowed are {_STRING_FORMS}")
    try:
        if not shape:
            return Constant(values[0])
        # The end by its name: a warm-up's second argument is another
        return SHAPES[shape](values[0], **({"end": values[1]} if len(values) == 2 else {}))
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
