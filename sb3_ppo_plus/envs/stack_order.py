"""A check of the order of frame stacks and normalisers."""

from __future__ import annotations

import warnings

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecNormalize
from torch import nn

from sb3_ppo_plus.extractors import TransformerExtractor


def warn_if_stacked_inside_normalize(env: VecEnv | None, policy: nn.Module) -> None:
    """Warn if a VecNormalize is outside a VecFrameStack and the policy has a Transformer.

    Zero frames pad the start of an episode. VecNormalize would change them, and the Transformer would not mask them.

    :param env: the outermost vectorised environment, or None
    :param policy: the policy
    """
    if not any(isinstance(module, TransformerExtractor) for module in policy.modules()):
        return
    normalizes = False
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            normalizes = normalizes or env.norm_obs
        elif isinstance(env, VecFrameStack) and normalizes:
            warnings.warn(
                "VecNormalize wraps VecFrameStack: the zero frames that pad an episode's start become non-zero, and "
                "a Transformer's mask can't see them. Use VecFrameStack(VecNormalize(env)).",
                UserWarning,
                stacklevel=2,
            )
            return
        env = env.venv
