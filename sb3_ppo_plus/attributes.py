"""What each attribute of a PPOPlus model is. Saving, checkpoints and loading without trust read this one table.

A test fails for an attribute that is not in the table.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

ARGUMENTS = (
    *("policy_class", "policy_kwargs", "learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda"),
    *("clip_range", "clip_range_vf", "normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "target_kl"),
    *("use_sde", "sde_sample_freq", "rollout_buffer_class", "rollout_buffer_kwargs", "_stats_window_size"),
    *("tensorboard_log", "verbose", "seed", "critic_learning_rate", "pessimistic_value_clip", "action_masking"),
    *("amp", "compile", "on_non_finite", "max_skipped", "worker_timeout", "restart_workers", "micro_batches"),
    *("distributed", "symmetry", "symmetry_mode", "symmetry_coef", "caps_temporal", "caps_spatial", "caps_sigma"),
)
"""The constructor's arguments, as given or as SB3 keeps them. Saved with the model, and in its plain description."""

OTHERS_OF_SB3 = ("observation_space", "action_space", "n_envs", "lr_schedule", "action_noise", "start_time")
"""What else SB3 keeps. Saved with the model, as SB3 does."""

COUNTERS = (
    *("num_timesteps", "_total_timesteps", "_num_timesteps_at_start"),
    *("_n_updates", "_episode_num", "_skipped_steps", "_skipped_in_a_row"),
)
"""Counters of training, from 0 on. Saved with the model, in its plain description, and in a checkpoint's state."""

PROGRESS = (
    *("_current_progress_remaining", "_last_episode_starts", "_last_obs", "_last_original_obs"),
    *("ep_info_buffer", "ep_success_buffer"),
)
"""Other attributes that training changes. Saved with the model, as in SB3, and in a checkpoint's state."""

PROGRESS_OF_LEARN = ("_last_states", "_log_interval", "_n_iterations", "_tb_log_name")
"""How far the present ``learn`` is. Saved in a checkpoint's state, but not with the model."""

FLAGS = ("_built_for_masks", "_was_given_masks")
"""True or False, or None before it is known. Saved with the model, and in its plain description."""

RUNTIME = (
    *("_coefficients", "_execution", "_mask_use", "_parts", "_joins", "_current_run", "last_checkpoint"),
    *("policy", "device", "env", "rollout_buffer", "_vec_normalize_env", "_logger", "_custom_logger"),
)
"""Objects that a model works with. Not saved: ``_setup_model``, ``learn`` or ``resume`` makes them again."""

ATTRIBUTES = {
    "argument": ARGUMENTS,
    "other of SB3": OTHERS_OF_SB3,
    "counter": COUNTERS,
    "progress": PROGRESS,
    "progress of learn": PROGRESS_OF_LEARN,
    "flag": FLAGS,
    "runtime": RUNTIME,
}
"""All attributes, by kind."""

TRAINING_STATE = tuple(sorted((*COUNTERS, *PROGRESS, *PROGRESS_OF_LEARN)))
"""The attributes that a checkpoint holds, as plain values, beside the model's parameters."""

NOT_SAVED = (*PROGRESS_OF_LEARN, *RUNTIME)
"""The attributes that ``save`` leaves out."""


class Optionals:
    """The types of attributes that are None at first."""

    last_checkpoint: str | None
    """Directory of the checkpoint that was last written or resumed."""
    _built_for_masks: bool | None
    _last_states: RNNStates | None
    _log_interval: int | None


class PlusModel(Protocol):
    """The attributes of a PPOPlus that its parts read and change. Each call passes the model to them."""

    TRAINING_STATE: ClassVar[tuple[str, ...]]
    action_masking: bool | None
    action_space: spaces.Space[Any]
    amp: bool | str
    batch_size: int
    caps_sigma: float
    caps_spatial: Any
    caps_temporal: Any
    clip_range: Any
    clip_range_vf: Any
    compile: bool | dict[str, Any]
    critic_learning_rate: Any
    device: th.device
    distributed: bool | str
    ent_coef: Any
    ep_info_buffer: Any
    ep_success_buffer: Any
    env: VecEnv | None
    last_checkpoint: str | None
    learning_rate: Any
    lr_schedule: Schedule
    max_grad_norm: float
    max_skipped: int
    micro_batches: int
    n_envs: int
    n_steps: int
    normalize_advantage: bool
    num_timesteps: int
    observation_space: spaces.Space[Any]
    on_non_finite: str
    pessimistic_value_clip: bool
    policy: ActorCriticPolicy
    policy_class: Any
    policy_kwargs: dict[str, Any]
    restart_workers: int
    rollout_buffer: RolloutBuffer
    rollout_buffer_class: type[RolloutBuffer] | None
    seed: int | None
    start_time: float
    symmetry: Any
    symmetry_coef: float
    symmetry_mode: str
    target_kl: float | None
    tensorboard_log: str | None
    verbose: int
    vf_coef: Any
    worker_timeout: float | None
    _built_for_masks: bool | None
    _coefficients: Any
    _current_progress_remaining: float
    _current_run: Any
    _execution: Any
    _last_episode_starts: Any
    _last_obs: Any
    _last_original_obs: Any
    _last_states: Any
    _log_interval: int | None
    _mask_use: Any
    _n_iterations: int
    _n_updates: int
    _num_timesteps_at_start: int
    _parts: Any
    _skipped_in_a_row: int
    _skipped_steps: int
    _tb_log_name: str
    _total_timesteps: int
    _vec_normalize_env: VecNormalize | None
    _was_given_masks: bool

    @property
    def needs_masks(self) -> bool:
        """Whether the model was trained with masks that the observations do not hold."""

    @property
    def logger(self) -> Logger:
        """SB3's logger."""

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: Any = None) -> None:  # noqa: ANN401  # an array
        """Note the episodes that a step has ended."""

    def _setup_lr_schedule(self) -> None:
        """Make ``lr_schedule`` from ``learning_rate``."""

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:  # noqa: ANN401  # SB3 takes many types
        """Save the model as SB3 does."""
