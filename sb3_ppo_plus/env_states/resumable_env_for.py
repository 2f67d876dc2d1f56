"""Whether an environment can be resumed exactly, and how."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym

from sb3_ppo_plus.env_states.resumable_env import ResumableEnv

WAYS = ("state", "replay")


def resumable_env_for(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Stand-in."""
    if isinstance(env, ResumableEnv):
        return env
    resumable = ResumableEnv(env)
    resumable.reset(seed=0)
    finding = resumable.prove_resumable()
    if finding is None or not finding.is_error:
        return resumable
    warnings.warn(f"the environment cannot be resumed exactly: {finding.text}", stacklevel=2)
    return env
