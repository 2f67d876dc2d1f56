"""Which callbacks leave a policy's code alone, so that a rollout need not look for changes of it at each step."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.fast.policy_changes import KNOWN_PACKAGES, classes_of, is_patched
from sb3_ppo_plus.policies.actor_critic import has_own_methods


def is_known_callback(callback: BaseCallback) -> bool:
    """Whether a callback and all inside it are SB3's or ours, without a function of the user's.

    None of these changes a class, a method or a setting of the policy.

    :param callback: the callback of ``learn``, with others inside
    """
    return all(_is_known(one) for one in iterate_callbacks(callback))


def _is_known(callback: BaseCallback) -> bool:
    kind = type(callback)
    calls_function = isinstance(callback, ConvertCallback) and callback.callback is not None
    return (
        kind.__module__.startswith(KNOWN_PACKAGES)
        and not calls_function
        and not has_own_methods(callback)
        and not any(map(is_patched, classes_of([callback])))
    )
