"""A rollout, or a minibatch of it, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_plus.trees import tree_map


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The transitions of one minibatch, as tensors on the policy's device.

    :param observations: shape (batch, *observation shape), or a dict of such tensors
    :param actions: the stored actions: int64 of shape (batch,) for Discrete, else float32 of shape (batch, action dim)
    :param old_values: value predictions at the time of the rollout, shape (batch,)
    :param old_log_prob: log probability of the actions at the time of the rollout, shape (batch,)
    :param advantages: GAE(lambda) estimates, shape (batch,)
    :param returns: TD(lambda) targets of the value function, shape (batch,)
    :param valid: False where a minibatch is padded, shape (batch,); None: nothing is padded
    :param weights: weight of each transition in the mean over a minibatch of which these are a part, shape (batch,);
        None: the batch is a whole minibatch, in which all weigh the same
    :param context: further keyword arguments of the policy, such as action_masks: tensors of shape (batch, ...)
    :param states: a memory's states at the start of each sequence of the rollout, shape (n_layers, n_sequences, ...)
    :param sequence_of: index of the sequence of each transition of a rollout, int64, shape (batch,)
    :param mirrored: mirror images of ``observations`` and ``actions``, by these names; empty: the model has no symmetry
    :param following: ``observations`` one step later, and ``continues``: whether they belong to the same episode, bool
        of shape (batch,); empty: the loss does not need them
    """

    observations: PyTorchObs
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    valid: th.Tensor | None = None
    weights: th.Tensor | None = None
    context: dict[str, Any] = field(default_factory=dict)
    states: RNNStates | None = None
    sequence_of: th.Tensor | None = None
    mirrored: dict[str, Any] = field(default_factory=dict)
    following: dict[str, Any] = field(default_factory=dict)

    def by_field(self) -> dict[str, Any]:
        """Return the values of the fields, by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def select(self, indices: th.Tensor | slice) -> RolloutBatch:
        """Return some of the transitions, or whole sequences in a row.

        :param indices: for transitions a slice, or int64 of shape (batch,); for sequences int64 of shape
            (n_sequences, length), where -1 is padding
        """
        if isinstance(indices, th.Tensor) and indices.dim() == 2:
            return self._select_sequences(indices)
        observations = self.observations
        return RolloutBatch(
            observations={key: _rows(obs, indices) for key, obs in observations.items()}
            if isinstance(observations, dict)
            else _rows(observations, indices),
            actions=_rows(self.actions, indices),
            old_values=_rows(self.old_values, indices),
            old_log_prob=_rows(self.old_log_prob, indices),
            advantages=_rows(self.advantages, indices),
            returns=_rows(self.returns, indices),
            valid=None if self.valid is None else _rows(self.valid, indices),
            weights=None if self.weights is None else _rows(self.weights, indices),
            context={name: _rows(tensor, indices) for name, tensor in self.context.items()},
            mirrored=tree_map(lambda part: _rows(part, indices), self.mirrored) if self.mirrored else {},
            following=tree_map(lambda part: _rows(part, indices), self.following) if self.following else {},
        )

    def _select_sequences(self, indices: th.Tensor) -> RolloutBatch:
        assert self.states is not None and self.sequence_of is not None
        flat = indices.flatten()
        batch = self.select(flat.clamp(min=0))
        sequences = self.sequence_of[indices[:, 0]]
        context = {**batch.context, "states": tree_map(lambda part: part[:, sequences], self.states)}
        if self.weights is not None:
            # Padding holds some transition of the process. Where it began an episode would decide how sequences are cut
            context["episode_starts"] = context["episode_starts"] & (flat >= 0)
        return replace(batch, valid=None if batch.valid is None else batch.valid & (flat >= 0), context=context)


def _rows(tensor: th.Tensor, indices: th.Tensor | slice) -> th.Tensor:
    # index_select takes half as long as indexing
    return tensor.index_select(0, indices) if isinstance(indices, th.Tensor) else tensor[indices]


class Minibatch(NamedTuple):
    """A minibatch whose transitions are gathered later, perhaps inside a compiled function.

    :param rollout: the transitions of a rollout
    :param indices: indices of the minibatch's transitions, see :meth:`RolloutBatch.select`; None: all transitions
    """

    rollout: RolloutBatch
    indices: th.Tensor | None = None

    def batch(self) -> RolloutBatch:
        """Gather the transitions."""
        return self.rollout if self.indices is None else self.rollout.select(self.indices)
