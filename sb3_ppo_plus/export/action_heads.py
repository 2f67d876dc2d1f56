"""All heads of a policy: one, or one for each part of a hybrid action."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_ppo_plus.export.action_layers import layers_of
from sb3_ppo_plus.export.contract import BATCH, TensorSpec, names_of_tensors
from sb3_ppo_plus.export.heads import BernoulliHead, CategoricalHead, make_head
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy


class ActionHeads(nn.Module):
    """Turns the policy's last hidden layer into the outputs of an export.

    :param policy: the policy
    :param deterministic: False: random numbers are inputs
    :raises ValueError: for an action distribution that is not known
    """

    def __init__(self, policy: ActorCriticPlusPolicy, deterministic: bool) -> None:
        super().__init__()
        layers = layers_of(policy)
        self.paths = [layer.path for layer in layers]
        self.spaces = [layer.space for layer in layers]
        self.names = names_of_tensors("action", self.paths)
        # nn.ModuleList forgets the type
        heads: Any = nn.ModuleList(make_head(layer) for layer in layers)
        self.heads = heads
        takes_masks = not any(isinstance(head, BernoulliHead) for head in heads)
        self.mask_sizes = [[*head.sizes] if takes_masks and isinstance(head, CategoricalHead) else [] for head in heads]
        """Numbers of choices of each head's actions, as its masks have them; empty for a head without masks."""
        self.noises = [() if deterministic else head.noises for head in heads]

    def specs(self) -> list[TensorSpec]:
        """Return the outputs."""
        specs = []
        for name, path, head in zip(self.names, self.paths, self.heads, strict=True):
            action = head(th.zeros(1, head.latent_dim), None, {})
            specs.append(TensorSpec(name, "action", action.numpy().dtype.name, (BATCH, *head.action_shape), key=path))
        return specs

    def noise_specs(self) -> list[TensorSpec]:
        """Return the inputs that are random numbers."""
        return [
            TensorSpec(
                self._input_of(index, noise.name),
                "noise",
                "float32",
                (BATCH, *noise.shape),
                distribution=noise.distribution,
                neutral=noise.neutral,
            )
            for index, noises in enumerate(self.noises)
            for noise in noises
        ]

    def _input_of(self, index: int, noise: str) -> str:
        # "noise" belongs to "action", "noise_1_angle" to "action_1_angle"
        return noise + self.names[index].removeprefix("action")

    def forward(
        self, latent: th.Tensor, masks: th.Tensor | None, inputs: Mapping[str, th.Tensor]
    ) -> dict[str, th.Tensor]:
        """Choose actions.

        :param latent: shape (batch, latent_dim)
        :param masks: True where a choice is valid, shape (batch, mask size): those of the first head, then those of the
            second, and so on; None: all are
        :param inputs: the random numbers, by the names of the inputs; without them, choose the deterministic actions
        :return: a tensor for each of :meth:`specs`, by name
        """
        actions = {}
        for index, (name, head, of_head) in enumerate(zip(self.names, self.heads, self._split(masks), strict=True)):
            names = {noise.name: self._input_of(index, noise.name) for noise in self.noises[index]}
            noise = {own: inputs[given] for own, given in names.items() if given in inputs}
            actions[name] = head(latent, of_head, noise)
        return actions

    def margins(self, latent: th.Tensor, masks: th.Tensor | None) -> dict[str, th.Tensor | None]:
        """Return by how much the chosen logits exceed the second ones, without noise.

        :param latent: see :meth:`forward`
        :param masks: see :meth:`forward`
        :return: for each output the smallest excess of all of its choices, shape (batch,); None for actions of a Box
        """
        margins: dict[str, th.Tensor | None] = {}
        for name, head, of_head in zip(self.names, self.heads, self._split(masks), strict=True):
            if not isinstance(head, CategoricalHead | BernoulliHead):
                margins[name] = None
                continue
            excesses = [th.full((len(latent),), th.inf)]
            for logits in head.logits(latent, of_head):
                if logits.shape[1] > 1:
                    top = logits.double().topk(2, dim=1).values
                    excesses.append((top[:, 0] - top[:, 1]).float())
            margins[name] = th.stack(excesses).amin(dim=0)
        return margins

    def _split(self, masks: th.Tensor | None) -> list[th.Tensor | None]:
        if masks is None:
            return [None] * len(self.heads)
        split = th.split(masks, [sum(sizes) for sizes in self.mask_sizes], dim=1)
        return [part if sizes else None for part, sizes in zip(split, self.mask_sizes, strict=True)]
