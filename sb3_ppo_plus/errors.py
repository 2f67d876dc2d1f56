"""Errors that PPOPlus raises, besides ValueError and TypeError."""

from __future__ import annotations


class UntrustedFileError(ValueError):
    """A file cannot be loaded without trust: it is damaged or hostile, or holds what only pickle can store."""


class DeadWorkerError(RuntimeError):
    """A worker process of a SubprocVecEnv has ended."""


class HangingWorkerError(DeadWorkerError):
    """A worker process of a SubprocVecEnv did not answer within ``worker_timeout``. All its workers were ended."""


class NonFiniteError(FloatingPointError):
    """A number that training depends on is NaN or infinite. No optimiser step has used it."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no valid checkpoint was found."""


class InvalidCheckpointError(CheckpointError):
    """A checkpoint is incomplete, or its files were changed after it was written."""


class WrapperStackError(ValueError):
    """The number of environments, or their wrappers, differ from the saved ones."""


class PlainStateError(TypeError):
    """A value cannot be saved in a checkpoint: it is not a plain value, or it contains one that is not."""


class ResumeProofError(CheckpointError):
    """An environment goes on in another way after its state was saved and put back."""


class ReplayError(ValueError):
    """The replay of an episode had another outcome than the episode itself, so the environment cannot go on."""


class RankFailedError(RuntimeError):
    """Training in several processes has ended, since another one of them has failed, or is gone."""
