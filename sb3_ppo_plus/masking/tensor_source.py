"""Action masks of environments on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_ppo_plus.envs.tensor_vec_env import TensorVecEnv, is_free_to_wait
from sb3_ppo_plus.masking.sources import ActionMaskSource
from sb3_ppo_plus.policies.masks import MASK_KEY, check_masks


class TensorMaskSource(ActionMaskSource):
    """Gets the action masks of each step of a rollout as tensors.

    On the CPU each step's masks are checked at once, elsewhere those of all steps after the rollout.

    :param env: the training environment
    :param action_space: its action space
    :param policy: the policy that uses the masks
    """

    def __init__(self, env: TensorVecEnv, action_space: spaces.Space[Any], policy: BasePolicy) -> None:
        super().__init__(env, action_space, policy)
        self._tensor_env, self._policy_device = env, policy.device
        self._waits_are_free = is_free_to_wait(env.device)
        self._unchecked: list[th.Tensor] = []

    def ask(self, observations: Any, step: int) -> th.Tensor:  # type: ignore[override]  # an array in the base class  # noqa: ANN401
        """Get the masks of a step.

        :param observations: those before the step, tensors or arrays
        :param step: index of the step in the rollout, for the message of an error
        :return: bool, shape (n_envs, mask size)
        :raises ValueError: for masks of a wrong shape, or where an environment has no valid action
        """
        # Copies: the environment may write its next masks into these tensors
        masks = th.as_tensor(observations[MASK_KEY]) if self._in_observations else self._own_masks(step)
        if self._waits_are_free:
            return th.from_numpy(self._checked(masks.numpy().copy(), step))
        self._unchecked.append(masks.clone())
        return self._unchecked[-1].flatten(1) != 0

    def _own_masks(self, step: int) -> th.Tensor:
        masks = self._tensor_env.get_attr("action_masks", 0)[0]()
        if not isinstance(masks, th.Tensor) or masks.shape != self._shape or masks.device != self._tensor_env.device:
            found = f"{tuple(masks.shape)} on {masks.device}" if isinstance(masks, th.Tensor) else type(masks).__name__
            raise ValueError(
                f"{self._tensor_env}: action_masks() must return a tensor of shape {self._shape} on "
                f"{self._tensor_env.device}, got {found} at step {step} of the rollout"
            )
        return masks

    def context(self, masks: th.Tensor) -> dict[str, th.Tensor]:  # type: ignore[override]  # an array in the base class
        """Make the policy's keyword arguments, see :meth:`ActionMaskSource.context`."""
        return {} if self._policy_finds_them else {"action_masks": masks.to(self._policy_device)}

    def finish(self) -> None:
        """Check the masks of all steps that were not checked.

        :raises ValueError: see :meth:`ask`
        """
        if self._unchecked:
            for step, masks in enumerate(th.stack(self._unchecked).cpu().numpy()):
                check_masks(np.asarray(masks), self._sizes, step, self._names)
