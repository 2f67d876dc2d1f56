"""Everything that the next update of a model depends on, as the files of a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.distributed.parts import GSDE_NOISE, Parts
from sb3_ppo_plus.env_states.generator_state import (
    global_generator_states,
    set_global_generator_states,
    set_space_generator_states,
    space_generator_states,
)
from sb3_ppo_plus.env_states.plain_state import Json, PlainStateReader, PlainStateWriter, place_of_odd_value
from sb3_ppo_plus.env_states.vec_env_state import reset_without_learning, set_vec_env_state, vec_env_state
from sb3_ppo_plus.envs.originals import OriginalObservations
from sb3_ppo_plus.envs.questions import base_of, innermost_normalizer
from sb3_ppo_plus.envs.replaced_statistics import own_statistics
from sb3_ppo_plus.errors import PlainStateError
from sb3_ppo_plus.resuming.callback_state import callback_states
from sb3_ppo_plus.resuming.checkpoint_directory import NORMALIZER_FILE
from sb3_ppo_plus.resuming.state_checks import check_attributes, check_other_parts, check_seconds
from sb3_ppo_plus.saving.model_snapshot import ModelSnapshots
from sb3_ppo_plus.saving.vec_normalize import as_json
from sb3_ppo_plus.trees import tree_map
from sb3_ppo_plus.untrusted.strict_json import Limits, parse

TrainingState = dict[str, Any]

MODEL_FILE, STATE_FILE, ARRAYS_FILE = "model.zip", "training_state.json", "training_state.bin"
# Wider than the limits of a model's description: best scores begin at -inf, the state of a generator has 39 digits, and
# there may be many environments, with nested lists. Python itself reads at most 4300 digits
UNTRUSTED_LIMITS = Limits(2**26, max_depth=128, max_values=2**21, max_digits=4300, allows_non_finite=True)
PENDING_LOGS = ("name_to_value", "name_to_count", "name_to_excluded")


@dataclass(frozen=True)
class Snapshot:
    """The state of a training run between two updates, which training does not change any more.

    :param num_timesteps: timesteps done
    :param mean_return: see :func:`mean_return_of`
    :param files: makes the contents of the checkpoint's files, by name; any thread may call it
    """

    num_timesteps: int
    mean_return: float | None
    files: Callable[[], dict[str, bytes]]


def take_snapshot(
    model: PlusModel, callback: BaseCallback, models: ModelSnapshots, unsaved: list[str] | None = None
) -> Snapshot:
    """Copy the state of a training run between two updates.

    ``model.zip`` is what ``model.save`` writes, without last observations and statistics. ``vecnormalize.json`` is what
    ``save_vec_normalize`` writes, if there is a VecNormalize. The other files hold plain values, no pickle.

    :param model: the model
    :param callback: the callback of its ``learn``, with all callbacks inside it
    :param models: takes the snapshots of this model
    :param unsaved: gets a line for everything that is left out
    :raises PlainStateError: if a state is not plain; the message names it
    """
    assert model.env is not None
    state: TrainingState = {
        "attributes": {name: _as_python_number(getattr(model, name)) for name in model.TRAINING_STATE},
        "learning_rate_factors": model._coefficients.groups(model).factors,
        **model._execution.state(model),
        **model._parts.state(),
        **_state_of_originals(model),
        "seconds": seconds_of_learning(model),
        "logger": pending_logs(model),
        "spaces": [space_generator_states(space) for space in (model.observation_space, model.action_space)],
        "gsde": _gsde_noise(model),
        "env": _env_state(model.env, unsaved),
        "callbacks": callback_states(callback),
        # Last: the environments may draw random numbers when they are asked for their state
        "generators": global_generator_states(),
    }
    writer = PlainStateWriter()
    try:
        encoded = writer.encode(state)
    except RecursionError as error:
        raise PlainStateError(f"{place_of_odd_value(state)} is nested too deep for a checkpoint") from error
    # The other files hold these already
    large = [name for name, value in state["attributes"].items() if not isinstance(value, int | float | str | None)]
    a_ppo: Any = model
    # The first process writes the model of all
    model_file = models.take(a_ppo, large) if model._parts.ranks.rank == 0 else bytes
    normalizer_file = _normalizer_file(model)
    return Snapshot(
        model.num_timesteps,
        mean_return_of(model),
        lambda: {
            MODEL_FILE: model_file(),
            STATE_FILE: _as_text(encoded).encode(),
            ARRAYS_FILE: writer.arrays(),
            **normalizer_file,
        },
    )


def _env_state(env: VecEnv, unsaved: list[str] | None) -> dict[str, Any]:
    # Between two updates, statistics are the same in all processes
    with own_statistics(env):
        return vec_env_state(env, unsaved)


def _state_of_originals(model: PlusModel) -> dict[str, Any]:
    originals = getattr(model.rollout_buffer, "originals", None)
    return {} if originals is None else {"original_observations": originals.state()}


def _as_text(encoded: Json) -> str:
    try:
        return json.dumps(encoded)
    except (ValueError, RecursionError) as error:
        raise PlainStateError(f"{place_of_odd_value(encoded)} cannot be written into a checkpoint: {error}") from error


def _normalizer_file(model: PlusModel) -> dict[str, bytes]:
    normalize = None if model.env is None else unwrap_vec_normalize(model.env)
    # A subclass may hold more than the file could
    return {NORMALIZER_FILE: as_json(normalize).encode()} if type(normalize) is VecNormalize else {}


def mean_return_of(model: PlusModel) -> float | None:
    """Return the mean return of the last episodes, as ``rollout/ep_rew_mean`` has it.

    :param model: the model
    :return: None where no episode has ended, or where the mean is not finite
    """
    returns = [episode["r"] for episode in model.ep_info_buffer or () if "r" in episode]
    mean = float(np.mean(returns)) if returns else np.nan
    return mean if np.isfinite(mean) else None


def read_state(files: dict[str, bytes], trusted: bool) -> TrainingState:
    """Read the state that :func:`take_snapshot` has written beside the model.

    :param files: contents by file name
    :param trusted: False: a file that exceeds :data:`UNTRUSTED_LIMITS`, has a key twice, or would take more memory
        than its size tells, is an error
    :raises UntrustedFileError: for such a file, if it is not trusted
    """
    text = files[STATE_FILE]
    encoded = json.loads(text) if trusted else parse(text, STATE_FILE, UNTRUSTED_LIMITS)
    state: TrainingState = PlainStateReader(files[ARRAYS_FILE], trusted).build(encoded)
    return state


def set_training_state(model: PlusModel, state: TrainingState, trusted: bool = True) -> bool:
    """Put back the state of a run into a model that was loaded from the checkpoint's ``model.zip``.

    :meth:`PPOPlus.continue_learning` sets up logs and callbacks, and puts back their state.

    :param model: the model, with its environments
    :param state: what :func:`read_state` has returned
    :param trusted: False: only values that training could have given are taken
    :return: whether the episodes of the environments go on; otherwise all environments were reset
    :raises WrapperStackError: if the number of environments, or their wrappers, differ from the saved ones
    """
    assert model.env is not None
    check_attributes(model, state["attributes"], trusted)
    if not trusted:
        check_seconds(state["seconds"])
        check_other_parts(model, state)
    for name, value in state["attributes"].items():
        setattr(model, name, tree_map(lambda leaf: _on_device(leaf, model.device), value))
    model._coefficients.groups(model).factors = state["learning_rate_factors"]
    model._execution.set_state(model, state)
    model._parts.set_state(state)
    normalize = innermost_normalizer(model.env)
    if "original_observations" in state and normalize is not None:
        originals = OriginalObservations(model, normalize)
        originals.set_state(state["original_observations"])
        model.rollout_buffer.originals = originals  # type: ignore[attr-defined]  # a symmetry needs a buffer of ours
    for space, generators in zip((model.observation_space, model.action_space), state["spaces"], strict=True):
        set_space_generator_states(space, generators)
    if state["gsde"] is not None:
        for name in GSDE_NOISE:
            setattr(model.policy.action_dist, name, state["gsde"][name].to(model.device))
    goes_on = set_vec_env_state(model.env, state["env"], trusted)
    if not goes_on:
        begin_new_episodes(model)
    # Last, since everything before may draw random numbers
    set_global_generator_states(state["generators"])
    return goes_on


def seconds_of_learning(model: PlusModel) -> float:
    """Return the seconds since ``learn`` began, including the time before a resume.

    :param model: the model
    """
    # The clock may have been set back
    return max((time.time_ns() - model.start_time) / 1e9, 0.0)


def restore_logs(model: PlusModel, logs: dict[str, Any]) -> None:
    """Give a model's logger the values that wait for its next dump.

    :param model: the model
    :param logs: what :func:`pending_logs` has returned
    """
    for name in PENDING_LOGS:
        getattr(model.logger, name).update(logs.get(name, {}))


def pending_logs(model: PlusModel) -> dict[str, Any]:
    """Copy the values that wait for the logger's next dump: SB3 writes those of an update during the next one.

    Figures and videos are left out.

    :param model: the model
    """
    logger = getattr(model, "_logger", None)
    if logger is None:
        return {}
    values = {key: value for key, value in logger.name_to_value.items() if _is_plain(value)}
    return {
        "name_to_value": values,
        "name_to_count": {key: count for key, count in logger.name_to_count.items() if key in values},
        "name_to_excluded": {key: excluded for key, excluded in logger.name_to_excluded.items() if key in values},
    }


def _as_python_number(value: Any) -> Any:  # noqa: ANN401  # any attribute
    # learn(np.int64(1000)) is allowed
    return value.item() if isinstance(value, np.number) else value


def _is_plain(value: object) -> bool:
    try:
        PlainStateWriter().encode(value)
    except PlainStateError:
        return False
    return True


def _gsde_noise(model: PlusModel) -> dict[str, th.Tensor] | None:
    distribution = getattr(model.policy, "action_dist", None)
    if not isinstance(distribution, StateDependentNoiseDistribution):
        return None
    return {name: getattr(distribution, name) for name in GSDE_NOISE}


def _on_device(leaf: Any, device: th.device) -> Any:  # noqa: ANN401  # a leaf of plain values
    return leaf.to(device) if isinstance(leaf, th.Tensor) else leaf


def begin_new_episodes(model: PlusModel) -> None:
    """Begin new episodes, with other seeds than at the beginning of the run, unless the run is there.

    :param model: the model
    """
    env = model.env
    assert env is not None
    seeds = [seed for seed in (model.seed, *getattr(base_of(env), "_seeds", ())) if seed is not None]
    if seeds:
        parts: Parts = model._parts
        # Those of one process with all environments
        env.seed(
            (seeds[0] + model.num_timesteps + parts.ranks.rank * (0 if model.seed is None else env.num_envs)) % 2**32
        )
    model._last_obs = reset_without_learning(env)
    model._last_episode_starts = np.ones(env.num_envs, dtype=bool)
    if model._vec_normalize_env is not None:
        model._last_original_obs = model._vec_normalize_env.get_original_obs()
