"""Smooth actions: terms of the loss that want similar actions one step later, and where the observation is noisy.

They are CAPS (Mysore et al. 2021, "Regularizing Action Policies for Smooth Control with Reinforcement Learning").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer, obstacle_of_buffer
from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.trees import tree_map
from sb3_ppo_plus.update.coefficients import terms_in_use
from sb3_ppo_plus.update.losses import LossCoefficients, LossTerms, masked_mean

_WHITE = 255.0


def check_smoothness(model: PlusModel) -> None:
    """Check before the first step that a model can have the terms that it asks for.

    :param model: the model
    :raises ValueError: if it cannot
    """
    for name in terms_in_use(model):
        obstacle = _obstacle(model)
        if obstacle is None and name == "caps_spatial" and not _has_box(model.observation_space):
            obstacle = f"needs observations of a Box, or a Dict with one, to perturb; got {model.observation_space}"
        if obstacle is not None:
            raise ValueError(f"{name} {obstacle}")


def _obstacle(model: PlusModel) -> str | None:
    policy: Any = model.policy
    if not isinstance(model.action_space, spaces.Box):
        return f"needs Box actions, got {model.action_space}"
    of_buffer = obstacle_of_buffer(model.rollout_buffer)
    if of_buffer is not None:
        return of_buffer
    options = getattr(policy, "memory_options", None)
    if options is not None:
        return f"needs a policy without memory, whose action depends on more than one observation; got {options.kind!r}"
    dist = getattr(policy, "action_dist_name", "gaussian")
    if dist != "gaussian" and not hasattr(policy.action_dist, "normalized_mode"):
        return f"needs an action_dist with a method normalized_mode, got {dist!r}"
    return None


def _has_box(space: spaces.Space[Any]) -> bool:
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    return any(isinstance(part, spaces.Box) for part in parts)


def add_following(model: PlusModel) -> None:
    """Give the rollout of an update the observations that followed, if the model has the temporal term.

    After the last step follows the observation with which the next rollout begins. After the last step of an episode
    follows nothing.

    :param model: the model, with a full rollout buffer
    """
    if "caps_temporal" not in terms_in_use(model):
        return
    buffer = model.rollout_buffer
    assert isinstance(buffer, PPOPlusRolloutBuffer)
    rows = buffer.indices_of_part().reshape(buffer.n_envs, buffer.buffer_size)
    starts = np.concatenate((buffer.episode_starts[1:], np.reshape(model._last_episode_starts, (1, -1))))
    next_rows, continues = np.empty(rows.size, np.int64), np.empty(rows.size, np.bool_)
    next_rows[rows] = np.concatenate((rows[:, 1:], rows[:, -1:]), axis=1)
    continues[rows] = starts.T == 0
    indices, last_rows, has_next = (
        th.from_numpy(array).to(buffer.device) for array in (next_rows, rows[:, -1].copy(), continues)
    )

    def shifted(part: th.Tensor, last: th.Tensor) -> th.Tensor:
        following = part.index_select(0, indices)
        following[last_rows] = last.reshape(-1, *part.shape[1:]).to(part.dtype)
        return following

    last_obs = obs_as_tensor(model._last_obs, buffer.device)
    buffer.set_following(tree_map(shifted, buffer.rollout().observations, last_obs), has_next)


@dataclass(frozen=True)
class Smoothness:
    """The terms of a model's loss that want smooth actions.

    Both are means of Euclidean distances between deterministic actions. Actions are in units in which the bounds of the
    action space are -1 and 1, whatever the distribution:

    - Gaussian, and gSDE without ``squash_output``: the stored action, which is the mean before it is clipped, times
      2 / (high - low).
    - gSDE with ``squash_output``: the stored action, tanh of the mean.
    - squashed Gaussian: tanh of the mean, which is stored before the tanh.
    - Beta: 2 x - 1, where the stored action x is the mean or mode in (0, 1).

    :param temporal: has the distance between actions at an observation and at the one that followed. It is 0 after the
        last step of an episode
    :param spatial: has the distance between actions at an observation and at this one with Gaussian noise
    :param sigma: standard deviation of that noise, in the units in which the policy is given observations, thus after
        VecNormalize. Images that the policy divides by 255 get 255 times as much, neither rounded nor clipped. The
        parts of a Dict that are no Box get none
    :param scales: factors that bring Gaussian actions to these units, one for each dimension or one for all; empty:
        they are in these units
    """

    temporal: bool
    spatial: bool
    sigma: float
    scales: tuple[float, ...] = ()

    @classmethod
    def of_model(cls, model: PlusModel) -> Self | None:
        """Return the terms of a model; None: it has none.

        :param model: the model
        """
        terms, space = terms_in_use(model), model.action_space
        if not terms or not isinstance(space, spaces.Box):
            return None
        half = 0.5 * (space.high.astype(np.float64) - space.low).reshape(-1)
        # A dimension with one allowed value has no range
        scales = tuple((1.0 / np.where(half > 0, half, 1.0)).tolist())
        if model.policy.squash_output:
            scales = ()
        elif len(set(scales)) == 1:
            scales = scales[:1] if scales[0] != 1.0 else ()
        return cls("caps_temporal" in terms, "caps_spatial" in terms, float(model.caps_sigma), scales)

    def actions(self, policy: ActorCriticPolicy, batch: RolloutBatch) -> th.Tensor:
        """Return the deterministic actions of a minibatch, then those at following and at perturbed observations.

        The noise comes from PyTorch's default generator.

        :param policy: the policy
        :param batch: the minibatch
        :return: float32, in the units of :class:`Smoothness`, shape (k * batch, action dim) for 1 + k terms
        """
        observations = [batch.observations]
        if self.temporal:
            observations.append(batch.following["observations"])
        if self.spatial:
            observations.append(self._perturbed(policy, batch.observations))
        distribution: Any = policy.get_distribution(tree_map(lambda *parts: th.cat(parts), *observations))
        if hasattr(distribution, "normalized_mode"):
            mode: th.Tensor = distribution.normalized_mode()
            return mode.float()
        actions: th.Tensor = distribution.mode().float()
        if len(self.scales) > 1:
            return actions * th.cat([actions.new_full((1,), scale) for scale in self.scales])
        return actions * self.scales[0] if self.scales else actions

    def _perturbed(self, policy: ActorCriticPolicy, observations: Any) -> Any:  # noqa: ANN401  # tensors
        def perturb(tensor: th.Tensor, space: spaces.Space[Any]) -> th.Tensor:
            if not isinstance(space, spaces.Box):
                return tensor
            unit = _WHITE if policy.normalize_images and is_image_space(space) else 1.0
            numbers = tensor.to(th.promote_types(tensor.dtype, th.float32))
            return numbers + self.sigma * unit * th.randn_like(numbers)

        space = policy.observation_space
        if isinstance(space, spaces.Dict):
            return {key: perturb(part, space[key]) for key, part in observations.items()}
        return perturb(observations, space)

    def add_to(
        self, terms: LossTerms, batch: RolloutBatch, actions: th.Tensor, coefficients: LossCoefficients
    ) -> LossTerms:
        """Add the terms to the loss of a minibatch.

        :param terms: the loss
        :param batch: the minibatch
        :param actions: what :meth:`actions` has returned for it
        :param coefficients: has the weights of the terms
        """
        for name, mean in self._means(batch, actions):
            loss = terms.loss + getattr(coefficients, name) * mean
            terms = terms._replace(loss=loss, **{name: mean.detach()})
        return terms

    def _means(self, batch: RolloutBatch, actions: th.Tensor) -> Iterator[tuple[str, th.Tensor]]:
        now, *others = th.split(actions, len(batch.actions))
        if self.temporal:
            change = th.where(batch.following["continues"].unsqueeze(1), others[0] - now, 0.0)
            yield "caps_temporal", masked_mean(_length(change), batch.valid, batch.weights)
        if self.spatial:
            yield "caps_spatial", masked_mean(_length(others[-1] - now), batch.valid, batch.weights)


def _length(vectors: th.Tensor) -> th.Tensor:
    """Return the Euclidean length of each row. At 0 its gradient is 0, not NaN."""
    squares = vectors.square().sum(dim=1)
    is_zero = squares == 0
    return th.where(is_zero, 0.0, th.where(is_zero, 1.0, squares).sqrt())
