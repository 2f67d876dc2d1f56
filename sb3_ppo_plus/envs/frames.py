"""Checks of the frames that a Transformer reads."""

from __future__ import annotations

import warnings

from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_ppo_plus.envs.questions import wrappers_of
from sb3_ppo_plus.extractors import TransformerExtractor


def check_frames(env: VecEnv | None, policy: nn.Module, is_new: bool) -> None:
    """Warn where a Transformer in a policy reads frames that it cannot understand.

    :param env: the outermost vectorised environment; None: there is none
    :param policy: the policy
    :param is_new: whether the policy has not been trained yet
    """
    transformers = [module for module in policy.modules() if isinstance(module, TransformerExtractor)]
    if is_new:
        _warn_of_single_tokens(transformers)
    if transformers:
        _warn_if_stacked_inside_normalize(env)


def _warn_of_single_tokens(transformers: list[TransformerExtractor]) -> None:
    """Warn where nobody said that a flat observation holds frames."""
    for transformer in transformers:
        if transformer.lacks_seq_len:
            warnings.warn(
                f"The Transformer takes an observation of {transformer.frame_dim} numbers as a single token, which "
                "leaves nothing to attend to. Where it holds frames, as those of VecFrameStack(env, 8), say how many: "
                "features_extractor_kwargs={'seq_len': 8}. seq_len=1 is one token without this warning",
                stacklevel=3,
            )
            return


def _warn_if_stacked_inside_normalize(env: VecEnv | None) -> None:
    """Warn where a VecNormalize normalises what a VecFrameStack has stacked.

    The frames that pad the beginning of an episode are then no longer zero, and not masked.
    """
    normalizes = False
    for wrapper in wrappers_of(env):
        if isinstance(wrapper, VecNormalize):
            normalizes = normalizes or wrapper.norm_obs
        elif isinstance(wrapper, VecFrameStack) and normalizes:
            warnings.warn(
                "VecNormalize wraps VecFrameStack: the zero frames that pad an episode's start become non-zero, and "
                "a Transformer's mask can't see them. Use VecFrameStack(VecNormalize(env)).",
                UserWarning,
                stacklevel=3,
            )
            return
