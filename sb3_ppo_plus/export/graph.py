"""A policy as one module: from named tensors in the environment's units to named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn

from sb3_ppo_plus.export.action_heads import ActionHeads
from sb3_ppo_plus.export.contract import BATCH, TensorSpec, names_of_tensors
from sb3_ppo_plus.export.observations import ObservationPart
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.masks import MASK_KEY
from sb3_ppo_plus.policies.memory import Memory, State

# What decides which actions predict gives: a subclass that overrides one of these may act in another way
METHODS_OF_PREDICT = (
    *("predict", "_predict", "_for_actor", "_needed", "obs_to_tensor", "_split_off_mask", "_distribution_and_state"),
    *("_actor_features", "extract_features", "_check_state", "_remember_actor", "actor_memory", "_masked_distribution"),
    *("_get_action_dist_from_latent", "unscale_action", "squash_output", "set_training_mode", "device"),
)
_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, FlatActionSpace)
_STATE_NAMES = {"lstm": ("hidden", "cell"), "gru": ("hidden",), "gtrxl": ("memory", "n_remembered")}


class PolicyGraph(nn.Module):
    """The part of a policy that chooses actions, with everything around it. It is a copy, on the CPU.

    :param policy: the policy
    :param parts: what converts each array of an observation, by key; see :class:`ObservationPart`
    :param deterministic: False: random numbers are inputs
    :raises ValueError: for a part of the policy that is not known
    """

    def __init__(
        self, policy: ActorCriticPlusPolicy, parts: Mapping[str | None, ObservationPart], deterministic: bool
    ) -> None:
        super().__init__()
        check_policy(policy)
        self.heads = ActionHeads(policy, deterministic)
        self.keys = tuple(parts)
        self.parts = nn.ModuleList(parts.values())
        self.spaces = [part.space for part in parts.values()]
        self.observation_space = policy.actor_space
        self.normalize_images = policy.normalize_images
        self.has_mask_key = policy.has_mask_key
        self.features_extractor = deepcopy(policy.pi_features_extractor)
        memory: Any = policy.actor_memory
        self.memory: Any = deepcopy(memory)
        # The critic's layers stay behind, if the parts of actor and critic are apart
        is_known = type(policy.mlp_extractor) is MlpExtractor
        mlp: Any = policy.mlp_extractor
        self.mlp: nn.Module = deepcopy(mlp.policy_net if is_known else _ActorOf(mlp))
        self.state_names = _STATE_NAMES[policy.memory_options.kind] if policy.memory_options else ()
        self.cpu().eval().requires_grad_(False)
        for tensor in (*self.parameters(), *self.buffers()):
            # A parameter may be a part of a larger tensor, which would be written as a whole
            tensor.data = tensor.data.contiguous().clone()
        self.inputs, self.outputs = self._specs()

    def _specs(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        names = names_of_tensors("observation", self.keys)
        inputs = [
            TensorSpec(name, "observation", _dtype_of(space), (BATCH, *(space.shape or ())), key=key)
            for key, name, space in zip(self.keys, names, self.spaces, strict=True)
        ]
        mask_size = sum(map(sum, self.heads.mask_sizes))
        if mask_size and not self.has_mask_key:
            inputs.append(TensorSpec("action_masks", "action_masks", "bool", (BATCH, mask_size), optional=True))
        outputs = self.heads.specs()
        if self.memory is not None:
            for name, part in zip(self.state_names, self.memory.initial_state(1), strict=True):
                shape = (part.shape[0], BATCH, *part.shape[2:])
                inputs.append(TensorSpec(f"state_{name}", "state", "float32", shape))
                outputs.append(TensorSpec(f"next_state_{name}", "state", "float32", shape))
            inputs.append(TensorSpec("episode_start", "episode_start", "bool", (BATCH,)))
        inputs += self.heads.noise_specs()
        return inputs, outputs

    def forward(self, inputs: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        """Choose actions.

        :param inputs: a tensor for each of ``self.inputs``, by name; ``action_masks`` may be absent
        :return: a tensor for each of ``self.outputs``, by name
        """
        latent, masks, state = self._latent(inputs)
        return {
            **self.heads(latent, masks, inputs),
            **{f"next_state_{name}": part for name, part in zip(self.state_names, state, strict=True)},
        }

    def margins(self, inputs: dict[str, th.Tensor]) -> dict[str, th.Tensor | None]:
        """Return by how much the chosen logits exceed the second ones, see :meth:`ActionHeads.margins`.

        :param inputs: see :meth:`forward`
        """
        latent, masks, _ = self._latent(inputs)
        return self.heads.margins(latent, masks)

    def _latent(self, inputs: dict[str, th.Tensor]) -> tuple[th.Tensor, th.Tensor | None, State]:
        observations: Any = {}
        for key, part, spec in zip(self.keys, self.parts, self.inputs, strict=False):
            observations[key] = part(inputs[spec.name])
        masks = inputs.get("action_masks")
        if self.has_mask_key:
            masks = observations.pop(MASK_KEY).flatten(1) != 0
        if None in observations:
            observations = observations[None]
        observations = preprocess_obs(observations, self.observation_space, normalize_images=self.normalize_images)
        latent: th.Tensor = self.features_extractor(observations)
        state: State = ()
        if self.memory is not None:
            memory: Memory = self.memory
            before = tuple(inputs[f"state_{name}"] for name in self.state_names)
            latent, state = memory.step(latent.float(), before, inputs["episode_start"])
        return self.mlp(latent).float(), masks, state


class _ActorOf(nn.Module):
    """The actor's way through a user's own ``mlp_extractor``."""

    def __init__(self, mlp_extractor: Any) -> None:  # noqa: ANN401  # what a user has built
        super().__init__()
        self.mlp_extractor = mlp_extractor

    def forward(self, features: th.Tensor) -> th.Tensor:
        latent: th.Tensor = self.mlp_extractor.forward_actor(features)
        return latent


def check_policy(policy: BasePolicy) -> None:
    """Check that the exporter knows what a policy does.

    :param policy: the policy
    :raises ValueError: for another class, an overridden method or an action space that is not known; it names the part
    """
    kind = type(policy)
    if not isinstance(policy, ActorCriticPlusPolicy):
        raise ValueError(
            f"export_policy needs a policy of PPOPlus, got {kind.__name__}; PPOPlus.load reads what SB3's PPO has saved"
        )
    own = [
        name
        for name in METHODS_OF_PREDICT
        if getattr(kind, name, None) is not getattr(ActorCriticPlusPolicy, name, None) or name in vars(policy)
    ]
    if own:
        raise ValueError(
            f"export_policy does not know the method {own[0]} of {kind.__name__}: it knows "
            f"{ActorCriticPlusPolicy.__name__}.{own[0]}, which it replaces"
        )
    if type(policy.action_space) not in _SPACES:
        raise ValueError(
            f"export_policy does not know the action space {policy.action_space}; known: "
            f"{', '.join(known.__name__ for known in _SPACES)}"
        )
    memory: Any = policy.actor_memory
    if policy.memory_options is not None and policy.memory_options.kind not in _STATE_NAMES:
        raise ValueError(
            f"export_policy does not know the memory {type(memory).__name__}; known: {', '.join(_STATE_NAMES)}"
        )


def _dtype_of(space: spaces.Space[Any]) -> str:
    return np.dtype(space.dtype or np.float32).name


@contextmanager
def naming_the_part(graph: PolicyGraph, step: str) -> Iterator[None]:
    """Say which parts of users' own a policy has, where PyTorch cannot export it.

    :param graph: the policy
    :param step: what is tried
    :raises ValueError: instead of PyTorch's error
    """
    try:
        yield
    except Exception as error:
        # PyTorch's exporter raises many types of errors
        own = ", ".join(users_parts(graph))
        parts = f"; parts that are not PPOPlus's: {own}" if own else ""
        raise ValueError(f"export_policy: {step} failed{parts}: {type(error).__name__}: {error}") from error


def users_parts(graph: PolicyGraph, policy: nn.Module | None = None) -> list[str]:
    """Return the names of the classes of a policy's parts that are neither PPOPlus's nor SB3's nor PyTorch's.

    :param graph: the policy's graph
    :param policy: the policy, whose own class counts too
    """
    classes = {type(module) for module in (*graph.modules(), *([] if policy is None else [policy]))}
    known = ("torch", "sb3_ppo_plus", "stable_baselines3")
    return sorted(
        f"{each.__module__}.{each.__name__}" for each in classes if each.__module__.partition(".")[0] not in known
    )
