"""A policy's memory: its options, its modules, and its place between the features and the heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_ppo_plus.argument_checks import did_you_mean, is_integer
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.policies.asymmetric import AsymmetricPolicy
from sb3_ppo_plus.policies.gtrxl import GTrXLMemory
from sb3_ppo_plus.policies.memory import GRUMemory, LSTMMemory, Memory, State
from sb3_ppo_plus.policies.state_use import warn_of_graph_without_state

MEMORIES: dict[str, type[Any]] = {"lstm": LSTMMemory, "gru": GRUMemory, "gtrxl": GTrXLMemory}
_SIZES = ("hidden_size", "n_layers")
_KIND_OPTIONS = {
    "lstm": (*_SIZES, "bias", "dropout", "forget_bias"),
    "gru": (*_SIZES, "bias", "dropout"),
    "gtrxl": (*_SIZES, "n_heads", "memory_length", "gate_bias", "d_feedforward"),
}
_COMMON_OPTIONS = ("shared", "critic", "sequence_length")
CONTRIB_KWARGS = ("lstm_hidden_size", "n_lstm_layers", "shared_lstm", "enable_critic_lstm", "lstm_kwargs")


@dataclass(frozen=True)
class MemoryOptions:
    """The options that ``memory`` and ``memory_kwargs`` give.

    :param kind: "lstm", "gru" or "gtrxl"
    :param shared: True: actor and critic share one memory; "actor": they share it, but only the actor trains it, as
        with sb3-contrib's ``shared_lstm``; False: each has its own
    :param critic: without a shared memory, whether the critic has one; False: it has a linear layer instead
    :param sequence_length: see :func:`resolve_sequence_length`
    :param sizes: other arguments of the memory's class
    """

    kind: str
    shared: bool | Literal["actor"] = False
    critic: bool = True
    sequence_length: int | None = None
    sizes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def resolve(
        cls, memory: str | None, memory_kwargs: dict[str, Any] | None, contrib_kwargs: dict[str, Any]
    ) -> MemoryOptions | None:
        """Validate the arguments of a policy.

        :param memory: None, "lstm", "gru" or "gtrxl"
        :param memory_kwargs: fields of this class, and arguments of the memory's class
        :param contrib_kwargs: the arguments among ``CONTRIB_KWARGS`` that were given
        :return: the options; None: there is no memory
        :raises ValueError: for a value that is not allowed
        """
        if memory is not None and memory not in MEMORIES:
            raise ValueError(
                f"policy_kwargs: memory must be None or one of {sorted(MEMORIES)}, got {memory!r}"
                f"{did_you_mean(memory, MEMORIES)}"
            )
        if contrib_kwargs and memory != "lstm":
            raise ValueError(f"policy_kwargs: {sorted(contrib_kwargs)} need memory='lstm', got memory={memory!r}")
        if memory is None:
            if memory_kwargs:
                raise ValueError(f"policy_kwargs: memory_kwargs={memory_kwargs!r} need a memory, got memory=None")
            return None
        given = {**_from_contrib(contrib_kwargs), **(memory_kwargs or {})}
        allowed = (*_COMMON_OPTIONS, *_KIND_OPTIONS[memory])
        unknown = sorted(given.keys() - set(allowed))
        if unknown:
            raise ValueError(
                f"memory_kwargs has {unknown}; allowed for memory={memory!r}: {sorted(allowed)}"
                f"{did_you_mean(unknown[0], allowed)}"
            )
        for name, value in given.items():
            _check_option(name, value)
            if is_integer(value):
                # nn.LSTM and nn.GRU refuse NumPy's integers
                given[name] = int(value)
        common = {name: given.pop(name) for name in _COMMON_OPTIONS if name in given}
        return cls(memory, **common, sizes=given)

    def make(self, features_dim: int) -> Any:  # noqa: ANN401  # an nn.Module that is a Memory too
        """Build one memory.

        :param features_dim: size of the features
        """
        return MEMORIES[self.kind](features_dim, **self.sizes)

    def as_kwargs(self) -> dict[str, Any]:
        """Return the arguments ``memory`` and ``memory_kwargs`` that give these options."""
        common = {name: getattr(self, name) for name in _COMMON_OPTIONS}
        return {"memory": self.kind, "memory_kwargs": {**common, **self.sizes}}

    @property
    def output_dim(self) -> int:
        """Size of the memory's output."""
        default = inspect.signature(MEMORIES[self.kind]).parameters["hidden_size"].default
        size: int = self.sizes.get("hidden_size", default)
        return size


def _from_contrib(given: dict[str, Any]) -> dict[str, Any]:
    """Translate the arguments of sb3-contrib's RecurrentActorCriticPolicy."""
    if given.get("shared_lstm") and given.get("enable_critic_lstm"):
        raise ValueError("policy_kwargs: shared_lstm=True and enable_critic_lstm=True exclude each other")
    options = dict(given.get("lstm_kwargs") or {})
    for name, ours in (("lstm_hidden_size", "hidden_size"), ("n_lstm_layers", "n_layers")):
        if name in given:
            options[ours] = given[name]
    if given.get("shared_lstm"):
        options["shared"] = "actor"
    elif not given.get("enable_critic_lstm", True):
        options["critic"] = False
    return options


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "shared": ("True, False or 'actor'", lambda value: isinstance(value, bool) or value == "actor"),
    "critic": ("True or False", lambda value: isinstance(value, bool)),
    "sequence_length": (
        "None, -1 or an integer of at least 1",
        lambda value: value is None or is_integer(value, 1) or (is_integer(value) and int(value) == -1),
    ),
    "bias": ("True or False", lambda value: isinstance(value, bool)),
    "dropout": ("a number in [0, 1)", lambda value: isinstance(value, int | float) and 0 <= value < 1),
    "forget_bias": ("a number", lambda value: isinstance(value, int | float)),
    "gate_bias": ("a number", lambda value: isinstance(value, int | float)),
    "d_feedforward": ("None or an integer of at least 1", lambda value: value is None or is_integer(value, 1)),
}


def _check_option(name: str, value: object) -> None:
    allowed, is_allowed = _CHECKS.get(name, ("an integer of at least 1", lambda value: is_integer(value, 1)))
    if not is_allowed(value):
        raise ValueError(f"memory_kwargs: {name} must be {allowed}, got {value!r}")


def resolve_sequence_length(sequence_length: int | None, n_steps: int, batch_size: int) -> int:
    """Return the length of the sequences into which each environment's part of a rollout is cut.

    :param sequence_length: a number of steps; None: min(n_steps, batch_size); -1: n_steps, so that nothing is cut
    :param n_steps: steps per environment and rollout
    :param batch_size: transitions per minibatch, which has ``batch_size // sequence_length`` sequences
    :raises ValueError: for sequences longer than a rollout or a minibatch
    """
    if sequence_length is None:
        return min(n_steps, batch_size)
    if sequence_length == -1:
        if batch_size < n_steps:
            raise ValueError(
                f"sequence_length=-1 makes sequences of n_steps={n_steps} steps, which must fit into a minibatch: "
                f"batch_size must be at least n_steps, got batch_size={batch_size}"
            )
        return n_steps
    if sequence_length > min(n_steps, batch_size):
        raise ValueError(
            f"sequence_length must be at most n_steps={n_steps} and batch_size={batch_size}, got {sequence_length}"
        )
    return sequence_length


def set_sequence_length(rollout_buffer: RolloutBuffer, policy: ActorCriticPolicy, batch_size: int) -> None:
    """Tell a rollout buffer to cut rollouts into sequences, if the policy has a memory.

    :param rollout_buffer: the buffer
    :param policy: the policy
    :param batch_size: transitions per minibatch
    :raises ValueError: for a buffer that cannot do this, or sequences longer than a rollout or a minibatch
    """
    options: MemoryOptions | None = getattr(policy, "memory_options", None)
    if options is None:
        return
    if not isinstance(rollout_buffer, PPOPlusRolloutBuffer):
        raise ValueError(
            f"memory={options.kind!r} needs a rollout_buffer_class that is None or a subclass of "
            f"PPOPlusRolloutBuffer, got {type(rollout_buffer)}"
        )
    rollout_buffer.sequence_length = resolve_sequence_length(
        options.sequence_length, rollout_buffer.buffer_size, batch_size
    )


class RememberingPolicy(AsymmetricPolicy):
    """SB3's ``ActorCriticPolicy`` with a memory between the features and the heads, if ``memory_options`` is set.

    With an LSTM, the modules have the names and shapes of sb3-contrib's RecurrentActorCriticPolicy.
    """

    memory_options: MemoryOptions | None = None

    def _get_constructor_parameters(self) -> dict[str, Any]:
        memory_arguments = {} if self.memory_options is None else self.memory_options.as_kwargs()
        return {**super()._get_constructor_parameters(), **memory_arguments}

    def _build(self, lr_schedule: Schedule) -> None:
        # SB3 sums the choices of MultiDiscrete observations in NumPy, whose integers nn.LSTM and nn.GRU refuse
        self.features_dim = int(self.features_dim)
        super()._build(lr_schedule)

    def _build_mlp_extractor(self) -> None:
        if self.memory_options is None:
            super()._build_mlp_extractor()
            return
        self.mlp_extractor = MlpExtractor(
            self.memory_options.output_dim,
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            device=self.device,
        )

    def _build_memory(self, lr_schedule: Schedule) -> None:
        options = self.memory_options
        if options is None:
            return
        if options.shared and not self.share_features_extractor:
            keys = self.head_keys
            if keys is not None and keys.actor != keys.critic:
                raise ValueError(
                    f"memory_kwargs: shared={options.shared!r} needs heads that see the same keys, got {keys.described}"
                )
            raise ValueError(f"memory_kwargs: shared={options.shared!r} needs share_features_extractor=True, got False")
        setattr(self, f"{options.kind}_actor", options.make(self.features_dim))
        if not options.shared:
            if options.critic:
                setattr(self, f"{options.kind}_critic", options.make(self.critic_features_dim))
            else:
                self.critic = nn.Linear(self.critic_features_dim, options.output_dim)
        kwargs = dict(self.optimizer_kwargs)
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and not {"fused", "foreach"} & kwargs.keys():
            # A memory has many parameters, and a step that is not fused goes over them about ten times
            kwargs["fused"] = True
        # As in sb3-contrib, the memory is made after the heads, which thus begin as they do without one. The optimiser
        # that SB3 has made by then lacks the memory's parameters
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]  # torch's base class takes no lr

    @property
    def actor_memory(self) -> Memory | None:
        """The actor's memory, which the critic may share; None: the policy has no memory."""
        options = self.memory_options
        return None if options is None else getattr(self, f"{options.kind}_actor")

    @property
    def critic_memory(self) -> Memory | None:
        """The critic's own memory; None: it has none."""
        options = self.memory_options
        return None if options is None else getattr(self, f"{options.kind}_critic", None)

    def initial_states(self, n_envs: int) -> RNNStates:
        """Return the states in which episodes begin: all zeros. ``vf`` is empty if the critic has no own memory.

        :param n_envs: number of environments
        """
        actor, critic = self.actor_memory, self.critic_memory
        return RNNStates(
            () if actor is None else actor.initial_state(n_envs), () if critic is None else critic.initial_state(n_envs)
        )

    def _remember_actor(
        self, features: th.Tensor, state: State | None, episode_starts: th.Tensor | None
    ) -> tuple[th.Tensor, State]:
        """Pass the actor's features through its memory, see :func:`_pass_through`."""
        memory = self.actor_memory
        return (features, ()) if memory is None else _pass_through(memory, features, state, episode_starts)

    def _remember_critic(
        self, features: th.Tensor, states: RNNStates | None, episode_starts: th.Tensor | None
    ) -> tuple[th.Tensor, State]:
        """Pass the critic's features through its own memory, a shared one, or the layer that it has instead."""
        memory = self.critic_memory
        if memory is not None:
            return _pass_through(memory, features, None if states is None else states.vf, episode_starts)
        if self.memory_options is not None and self.memory_options.shared:
            latent, state = self._remember_actor(features, None if states is None else states.pi, episode_starts)
            return self._shared_latent(latent), state
        return self.critic(features), ()

    def _remember(
        self,
        pi_features: th.Tensor,
        vf_features: th.Tensor,
        states: RNNStates | None,
        episode_starts: th.Tensor | None,
    ) -> tuple[th.Tensor, th.Tensor, RNNStates]:
        """Pass the features of actor and critic through their memories; a shared memory runs once."""
        latent_pi, pi = self._remember_actor(pi_features, None if states is None else states.pi, episode_starts)
        if self.memory_options is not None and self.memory_options.shared:
            return latent_pi, self._shared_latent(latent_pi), RNNStates(pi, ())
        latent_vf, vf = self._remember_critic(vf_features, states, episode_starts)
        return latent_pi, latent_vf, RNNStates(pi, vf)

    def _shared_latent(self, latent: th.Tensor) -> th.Tensor:
        is_actors = self.memory_options is not None and self.memory_options.shared == "actor"
        return latent.detach() if is_actors else latent

    def _check_state(self, state: Any, n_envs: int) -> State | None:  # noqa: ANN401  # a user may give anything
        """Turn the state that ``predict`` was given into tensors.

        :raises ValueError: for a state that does not fit this memory and this number of environments
        """
        memory = self.actor_memory
        if state is None or memory is None:
            return None
        expected = [tuple(part.shape) for part in memory.initial_state(n_envs)]
        is_tuple = isinstance(state, tuple | list)
        given = [getattr(part, "shape", type(part).__name__) for part in state] if is_tuple else type(state).__name__
        if given != expected:
            raise ValueError(
                f"predict: state must be None or what predict returned for {n_envs} environment(s), a tuple of arrays "
                f"of the shapes {expected}; got {given}"
            )
        return tuple(th.as_tensor(part, dtype=th.float32, device=self.device) for part in state)


def _pass_through(
    memory: Memory, features: th.Tensor, state: State | None, episode_starts: th.Tensor | None
) -> tuple[th.Tensor, State]:
    """Take one step of every env, or all steps of sequences. The state says how many envs or sequences there are.

    :param features: shape (batch, features_dim), sequence by sequence
    :param state: the state before the first step; None: each observation begins an episode
    :param episode_starts: True where the state is reset before the step, shape (batch,); None: nowhere
    :return: outputs, float32, shape (batch, output_dim), and the state after a step; after sequences, an empty tuple
    """
    if state is None:
        warn_of_graph_without_state()
        state = memory.initial_state(len(features))
    n_sequences = state[0].shape[1]
    if episode_starts is None:
        episode_starts = th.zeros(len(features), dtype=th.bool, device=features.device)
    # In float32 even under autocast: otherwise errors would add up from step to step
    with th.autocast(features.device.type, enabled=False):
        features = features.float()
        if n_sequences == len(features):
            return memory.step(features, state, episode_starts.bool())
        outputs = memory.sequence(
            features.view(n_sequences, -1, features.shape[1]), state, episode_starts.bool().view(n_sequences, -1)
        )
    return outputs.flatten(0, 1), ()
