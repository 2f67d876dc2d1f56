"""Whether a user's code may change a policy during a rollout, so that each step looks for changes."""

from __future__ import annotations

import warnings
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

from sb3_ppo_plus.callback_hooks import iterate_callbacks
from sb3_ppo_plus.fast.policy_changes import KNOWN_PACKAGES, classes_of, is_patched
from sb3_ppo_plus.fast.policy_functions import PolicyFunctions
from sb3_ppo_plus.fast.watch import PartsWatch
from sb3_ppo_plus.policies.actor_critic import has_own_methods


class UsersCode:
    """Decides whether each step of a rollout looks for new methods, hooks and settings of the policy.

    This look takes longer than all else that a step adds to the policy's operations. So it is left out if all callbacks
    are SB3's or ours. Then other code, such as an environment's, may still change the policy. The end of the rollout
    shows this, and from then on each step looks.
    """

    def __init__(self) -> None:
        self.may_run = True
        """Whether each step of the rollout looks."""
        self._has_run_elsewhere = False

    def begin_rollout(self, callback: BaseCallback | None) -> None:
        """Decide for a rollout.

        :param callback: the callback of the rollout; None: it is not known
        """
        self.may_run = callback is None or self._has_run_elsewhere or not is_known_callback(callback)

    def end_rollout(self, watch: PartsWatch, functions: PolicyFunctions[Any]) -> None:
        """Look for changes that the steps of the rollout have missed. The first is warned of.

        :param watch: of the policy
        :param functions: made from the policy as it was when the rollout began
        """
        if self.may_run or not watch.has_changed():
            return
        self._has_run_elsewhere = True
        if not functions.is_current():
            warnings.warn(
                "the policy's methods, hooks or settings were changed during a rollout, not by a callback, but perhaps "
                "by an environment: the change counts from the next rollout on, later ones from the next step on",
                stacklevel=2,
            )


def is_known_callback(callback: BaseCallback) -> bool:
    """Whether a callback, and each one inside it, is SB3's or ours and calls no function of the user.

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
