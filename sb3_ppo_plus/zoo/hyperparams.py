"""PPOPlus's hyperparameters in the RL Zoo's format, and the search for better ones."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    import optuna

ALGO = "ppo_plus"

_LEARNING_RATE_SCHEDULES = ("constant", "lin", "cos", "warmup_cos")
_ENT_COEF_SCHEDULES = ("constant", "lin")
_CLIP_RANGE_SCHEDULES = ("constant", "lin")
#: The critic's learning rate in relation to the other parameters'
_CRITIC_LEARNING_RATES = (1, 3, 10)
#: How the value function is clipped, with the range of the policy's ratio: not; as in SB3; or pessimistically
_VALUE_CLIPS = ("none", "sb3", "pessimistic")
_ACTION_DISTS = ("gaussian", "squashed_gaussian", "beta")


def import_optional(name: str, extra: str = "zoo") -> ModuleType:
    """Import a module of an optional extra.

    :param name: The module's full name.
    :param extra: The extra that it comes with.
    :return: The module.
    :raises ImportError: It, or something that it imports, is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): {how_to_install(extra)}") from error


def how_to_install(extra: str) -> str:
    """Say how to install an extra, for a message.

    :param extra: Its name.
    """
    return (
        f'it comes with the extra [{extra}]. Run `pip install -e ".[{extra}]"` in a checkout, or '
        f'`pip install "sb3-ppo-plus[{extra}] @ git+ADDRESS"` with the address of your installation'
    )


def hyperparams_file() -> Path:
    """Path of ``ppo_plus.yml``, PPOPlus's hyperparameters in the RL Zoo's format.

    :return: The file inside the installed package, or in a checkout the one in ``zoo_hyperparams``.
    :raises FileNotFoundError: It is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = [root / "zoo_hyperparams" / f"{ALGO}.yml" for root in (package, package.parent)]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"neither {candidates[0]} nor {candidates[1]} is a file: reinstall sb3-ppo-plus")


def load_hyperparams(env_id: str) -> dict[str, Any]:
    """One environment's entry of ``ppo_plus.yml``, chosen as the RL Zoo chooses it.

    Besides PPOPlus's own arguments an entry holds what the RL Zoo takes out of it: ``n_timesteps``, ``n_envs``,
    ``normalize``, ``frame_stack`` and ``env_wrapper``.

    :param env_id: Gymnasium's id; without an entry of its own it gets ``atari`` if it is an Atari game, or ``default``.
    :return: The entry, a copy of the caller's own.
    :raises ImportError: PyYAML, part of the ``zoo`` extra, is not installed.
    """
    entries = import_optional("yaml").safe_load(hyperparams_file().read_text(encoding="utf-8"))
    if env_id not in entries:
        spec = gym.registry.get(env_id)
        is_atari = env_id.startswith("ALE/") or (spec is not None and "AtariEnv" in str(spec.entry_point))
        env_id = "atari" if is_atari else "default"
    entry: dict[str, Any] = entries[env_id]
    return entry


def convert_ppo_plus_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Turn a trial's parameters into PPOPlus's arguments.

    The RL Zoo calls it for ``--trial-id`` too, with whatever the stored study holds, a study of its PPO included.

    :param sampled_params: ``trial.params``: those of the RL Zoo's PPO sampler, and optionally ``lr_schedule``,
        ``ent_coef_schedule``, ``clip_range_schedule``, ``critic_lr_factor``, ``value_clip`` and ``action_dist``.
    :return: Keyword arguments for PPOPlus; classes by registered name, so that the saved YAML stays plain.
    """
    params = dict(sampled_params)
    lr_schedule = params.pop("lr_schedule", "constant")
    ent_coef_schedule = params.pop("ent_coef_schedule", "constant")
    clip_range_schedule = params.pop("clip_range_schedule", "constant")
    critic_lr_factor = params.pop("critic_lr_factor", 1)
    value_clip = params.pop("value_clip", None)
    action_dist = params.pop("action_dist", None)

    hyperparams: dict[str, Any] = import_optional("rl_zoo3.hyperparams_opt").convert_onpolicy_params(params)
    policy_kwargs = dict(hyperparams["policy_kwargs"], activation_fn=params["activation_fn"])
    if action_dist is not None:
        policy_kwargs["action_dist"] = action_dist
        if action_dist != "gaussian":
            # gSDE is Gaussian only, and the environment's entry may have switched it on.
            hyperparams["use_sde"] = False
    hyperparams["policy_kwargs"] = policy_kwargs
    if critic_lr_factor != 1:
        critic_learning_rate = critic_lr_factor * params["learning_rate"]
        hyperparams["critic_learning_rate"] = _scheduled(lr_schedule, critic_learning_rate)
    for name, schedule in (
        ("learning_rate", lr_schedule),
        ("ent_coef", ent_coef_schedule),
        ("clip_range", clip_range_schedule),
    ):
        hyperparams[name] = _scheduled(schedule, params[name])
    if value_clip is not None:
        hyperparams["clip_range_vf"] = None if value_clip == "none" else hyperparams["clip_range"]
        hyperparams["pessimistic_value_clip"] = value_clip != "sb3"
    return hyperparams


def _scheduled(schedule: str, value: float) -> float | str:
    return value if schedule == "constant" else f"{schedule}_{value}"


def sample_ppo_plus_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Sample PPOPlus's hyperparameters: the search space of the RL Zoo's PPO, and what PPOPlus adds.

    That is schedules, the critic's learning rate, how the value function is clipped, and the action distribution. What
    changes the cost of a trial or the kind of model, such as a memory, is the entry's to say.

    :param trial: Optuna's trial.
    :param n_actions: Dimensions of a Box action space, which is given an ``action_dist``; 0 for any other space.
    :param n_envs: Number of environments.
    :param additional_args: What the RL Zoo hands to every sampler.
    :return: Keyword arguments for PPOPlus.
    """
    import_optional("rl_zoo3.hyperparams_opt").sample_ppo_params(trial, n_actions, n_envs, additional_args)
    trial.suggest_categorical("lr_schedule", _LEARNING_RATE_SCHEDULES)
    trial.suggest_categorical("ent_coef_schedule", _ENT_COEF_SCHEDULES)
    trial.suggest_categorical("clip_range_schedule", _CLIP_RANGE_SCHEDULES)
    trial.suggest_categorical("critic_lr_factor", _CRITIC_LEARNING_RATES)
    trial.suggest_categorical("value_clip", _VALUE_CLIPS)
    if n_actions > 0:
        trial.suggest_categorical("action_dist", _ACTION_DISTS)
    return convert_ppo_plus_params(trial.params)
