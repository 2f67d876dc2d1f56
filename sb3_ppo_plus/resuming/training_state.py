"""Everything that the next update of a :class:`PPOPlus` depends on, as the files of a checkpoint."""

from __future__ import annotations

import io
import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import StateDependentNoiseDistribution

from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.resuming.callback_state import callback_states
from sb3_ppo_plus.resuming.generator_state import (
    global_generator_states,
    set_global_generator_states,
    set_space_generator_states,
    space_generator_states,
)
from sb3_ppo_plus.resuming.plain_state import PlainStateReader, PlainStateWriter
from sb3_ppo_plus.resuming.vec_env_state import reset_without_learning, set_vec_env_state, vec_env_state
from sb3_ppo_plus.trees import tree_map

if TYPE_CHECKING:
    from sb3_ppo_plus.ppo_plus import PPOPlus

State = dict[str, Any]

MODEL_FILE, STATE_FILE, ARRAYS_FILE = "model.zip", "training_state.json", "training_state.bin"
GSDE_TENSORS = ("exploration_mat", "exploration_matrices")
PENDING_LOGS = ("name_to_value", "name_to_count", "name_to_excluded")


def checkpoint_files(model: PPOPlus, callback: BaseCallback, unsaved: list[str] | None = None) -> dict[str, bytes]:
    """Copy the state of a training run between two updates.

    ``model.zip`` is what ``model.save`` writes, without last observations and statistics. The rest is plain: the other
    files hold no pickle.

    :param model: the model
    :param callback: the callback of its ``learn``, with all callbacks inside it
    :param unsaved: takes a line about everything that is left out
    :return: contents by file name
    :raises PlainStateError: for a state that is not plain, by name
    """
    assert model.env is not None
    state: State = {
        "attributes": {name: getattr(model, name) for name in model.TRAINING_STATE},
        "seconds": seconds_of_learning(model),
        "logger": pending_logs(model),
        "spaces": [space_generator_states(space) for space in (model.observation_space, model.action_space)],
        "grad_scaler": model._grad_scaler.state_dict(),
        "learning_rate_factors": model._learning_rate_groups.factors,
        "has_gradient": model._gradient_step.has_gradient,
        "gsde": _gsde_noise(model),
        "env": vec_env_state(model.env, unsaved),
        "callbacks": callback_states(callback),
        # Last: the environments may draw from them while they are asked
        "generators": global_generator_states(),
    }
    writer = PlainStateWriter()
    text = json.dumps(writer.describe(state))
    archive = io.BytesIO()
    large = [name for name, value in state["attributes"].items() if not isinstance(value, int | float | str | None)]
    model.save(archive, exclude=large)
    return {MODEL_FILE: archive.getvalue(), STATE_FILE: text.encode(), ARRAYS_FILE: writer.arrays()}


def read_state(files: dict[str, bytes]) -> State:
    """Read what :func:`checkpoint_files` has written beside the model."""
    state: State = PlainStateReader(files[ARRAYS_FILE]).build(json.loads(files[STATE_FILE]))
    return state


def set_training_state(model: PPOPlus, state: State) -> bool:
    """Put back the state of a run into a model that was loaded from the checkpoint's ``model.zip``.

    Logs and callbacks follow in :func:`PPOPlus.continue_learning`, which sets up both.

    :return: whether the episodes of the environments go on; otherwise all were reset
    :raises WrapperStackError: for environments that are wrapped in another way, naming both
    """
    assert model.env is not None
    _check_attributes(model, state["attributes"])
    for name, value in state["attributes"].items():
        setattr(model, name, tree_map(lambda leaf: _on_device(leaf, model.device), value))
    for space, generators in zip((model.observation_space, model.action_space), state["spaces"], strict=True):
        set_space_generator_states(space, generators)
    model._grad_scaler.load_state_dict(state["grad_scaler"])
    model._learning_rate_groups.factors = state["learning_rate_factors"]
    if state["has_gradient"] is not None:
        model._gradient_step.flatten(state["has_gradient"])
    if state["gsde"] is not None:
        for name in GSDE_TENSORS:
            setattr(model.policy.action_dist, name, state["gsde"][name].to(model.device))
    goes_on = set_vec_env_state(model.env, state["env"])
    if not goes_on:
        _reset_envs(model)
    # Last, since all of the above may draw from them
    set_global_generator_states(state["generators"])
    return goes_on


def seconds_of_learning(model: PPOPlus) -> float:
    """Time since ``learn`` began, that before a resume included."""
    return (time.time_ns() - model.start_time) / 1e9


def restore_logs(model: PPOPlus, logs: State) -> None:
    """Give the model's logger what waits for its next dump."""
    for name in PENDING_LOGS:
        getattr(model.logger, name).update(logs.get(name, {}))


def pending_logs(model: PPOPlus) -> State:
    """What the last update has recorded and SB3 writes in the middle of the next, without figures and videos."""
    logger = getattr(model, "_logger", None)
    if logger is None:
        return {}
    values = {key: value for key, value in logger.name_to_value.items() if _is_plain(value)}
    return {
        "name_to_value": values,
        "name_to_count": {key: count for key, count in logger.name_to_count.items() if key in values},
        "name_to_excluded": {key: excluded for key, excluded in logger.name_to_excluded.items() if key in values},
    }


def _check_attributes(model: PPOPlus, attributes: State) -> None:
    """Refuse all but a model's training state: some attributes, such as the compiler's options, can run a program."""
    names = set(model.TRAINING_STATE)
    if attributes.keys() != names:
        raise ValueError(f"the training state must be of {sorted(names)}, got {sorted(attributes)}")
    for name, value in attributes.items():
        existing = getattr(model, name)
        if isinstance(existing, int | float | str | deque) and not isinstance(value, type(existing) | None):
            raise TypeError(f"{name} must be of type {type(existing).__name__}, got {value!r}")


def _is_plain(value: object) -> bool:
    try:
        PlainStateWriter().describe(value)
    except PlainStateError:
        return False
    return True


def _gsde_noise(model: PPOPlus) -> dict[str, th.Tensor] | None:
    distribution = getattr(model.policy, "action_dist", None)
    if not isinstance(distribution, StateDependentNoiseDistribution):
        return None
    return {name: getattr(distribution, name) for name in GSDE_TENSORS}


def _on_device(leaf: Any, device: th.device) -> Any:  # noqa: ANN401  # a leaf of plain values
    return leaf.to(device) if isinstance(leaf, th.Tensor) else leaf


def _reset_envs(model: PPOPlus) -> None:
    """Begin new episodes, with other seeds than at the beginning of the run."""
    env = model.env
    assert env is not None
    seeds = [seed for seed in (model.seed, *env.unwrapped._seeds) if seed is not None]
    if seeds:
        env.seed((seeds[0] + model.num_timesteps) % 2**32)
    model._last_obs = reset_without_learning(env)
    model._last_episode_starts = np.ones(env.num_envs, dtype=bool)
    if model._vec_normalize_env is not None:
        model._last_original_obs = model._vec_normalize_env.get_original_obs()
