"""The errors that PPOPlus raises beside ValueError and TypeError."""

from __future__ import annotations


class UntrustedFileError(ValueError):
    """A file cannot be loaded without trust: it is damaged or hostile, or it holds what only pickle can describe."""


class DeadWorkerError(RuntimeError):
    """A worker process of a SubprocVecEnv has ended."""


class NonFiniteError(FloatingPointError):
    """A number that training depends on is NaN or infinite; no step was taken on it."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read."""


class InvalidCheckpointError(CheckpointError):
    """A checkpoint is torn or was altered."""


class WrapperStackError(ValueError):
    """The environment is wrapped in another way than the one that was saved."""


class PlainStateError(TypeError):
    """A value that is neither plain nor made of plain values."""
