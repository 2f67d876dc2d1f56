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
_ACTION_DISTS = ("gaussian", "squashed_gaussian", "beta")


def import_optional(name: str) -> ModuleType:
    """Import a module of the optional ``zoo`` extra.

    :param name: The module's full name.
    :return: The module.
    :raises ImportError: It, or something that it imports, is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{name} cannot be imported ({error}): it comes with the extra [zoo]. Run `pip install -e ".[zoo]"` in a '
            'checkout, or `pip install "sb3-ppo-plus[zoo] @ git+ADDRESS"` with the address of your installation'
        ) from error


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
        ``ent_coef_schedule`` and ``action_dist``.
    :return: Keyword arguments for PPOPlus; classes by registered name, so that the saved YAML stays plain.
    """
    params = dict(sampled_params)
    lr_schedule = params.pop("lr_schedule", "constant")
    ent_coef_schedule = params.pop("ent_coef_schedule", "constant")
    action_dist = params.pop("action_dist", None)

    hyperparams: dict[str, Any] = import_optional("rl_zoo3.hyperparams_opt").convert_onpolicy_params(params)
    policy_kwargs = dict(hyperparams["policy_kwargs"], activation_fn=params["activation_fn"])
    if action_dist is not None:
        policy_kwargs["action_dist"] = action_dist
        if action_dist != "gaussian":
            # gSDE is Gaussian only, and the environment's entry may have switched it on.
            hyperparams["use_sde"] = False
    hyperparams["policy_kwargs"] = policy_kwargs
    if lr_schedule != "constant":
        hyperparams["learning_rate"] = f"{lr_schedule}_{params['learning_rate']}"
    if ent_coef_schedule != "constant":
        hyperparams["ent_coef"] = f"{ent_coef_schedule}_{params['ent_coef']}"
    return hyperparams


def sample_ppo_plus_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Sample PPOPlus's hyperparameters: the search space of the RL Zoo's PPO, schedules and the action distribution.

    :param trial: Optuna's trial.
    :param n_actions: Dimensions of a Box action space, which is given an ``action_dist``; 0 for any other space.
    :param n_envs: Number of environments.
    :param additional_args: What the RL Zoo hands to every sampler.
    :return: Keyword arguments for PPOPlus.
    """
    import_optional("rl_zoo3.hyperparams_opt").sample_ppo_params(trial, n_actions, n_envs, additional_args)
    trial.suggest_categorical("lr_schedule", _LEARNING_RATE_SCHEDULES)
    trial.suggest_categorical("ent_coef_schedule", _ENT_COEF_SCHEDULES)
    if n_actions > 0:
        trial.suggest_categorical("action_dist", _ACTION_DISTS)
    return convert_ppo_plus_params(trial.params)
