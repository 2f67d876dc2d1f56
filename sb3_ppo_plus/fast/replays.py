"""Replays: the operations of a policy's computation, done again without Python and autograd around them.

Small networks spend two thirds of their time on what surrounds the operations. A replay does the operations of eager
mode in their order, so that every bit is equal. Its first results are compared with eager ones. A replay runs no hooks,
and no Python code that may differ from call to call. So only policies of known parts are replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.fast.policy_changes import has_known_parts
from sb3_ppo_plus.fast.policy_functions import PolicyFunctions, PolicyState
from sb3_ppo_plus.fast.tracing import trace
from sb3_ppo_plus.torch_private import has_accumulation_hooks, has_gradient_hooks, script_of

# Making a replay takes as long as a few hundred steps or minibatches. A short training is faster without it
REPLAY_AFTER = 300
# The first replays are checked. Not only the very first, because PyTorch optimises a graph after its first runs
CHECKED_REPLAYS = 4
# As many products that are added up, TorchScript joins into one
JOINED_PRODUCTS = 4

Replay = Callable[..., tuple[th.Tensor, ...]]


def can_replay(policy: ActorCriticPolicy) -> bool:
    """Whether a replay does all that the policy does: it has known, unchanged parts on the CPU and no hooks.

    :param policy: the policy
    """
    return (
        has_known_parts(policy)
        and policy.device.type == "cpu"
        and not has_gradient_hooks(policy.parameters())
        and not has_accumulation_hooks(policy.parameters())
        and not th.is_autocast_enabled("cpu")
        and not th.is_anomaly_enabled()
        # For other layouts BLAS is called in another way, and rounds differently
        and all(parameter.is_contiguous() for parameter in policy.parameters())
    )


def make_replay(function: Callable[..., Any], inputs: Sequence[th.Tensor], policy: ActorCriticPolicy) -> Replay:
    """Make a replay of a function for inputs of these shapes and dtypes.

    :param function: takes and returns tensors that need no gradient; it returns a tuple
    :param inputs: examples; their values do not matter
    :param policy: the policy that the function calls; it is not changed
    :return: the replay, for inputs that need no gradient
    :raises Exception: errors of many kinds, from tracing
    """
    graph = trace(function, inputs, policy)
    for node in graph.graph.find_nodes(op="call_function", target=th.ops.aten.detach.default):
        # A replay has no autograd from which a tensor could be detached
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    _keep_linear_layers_whole(graph.graph)
    _keep_products_apart(graph.graph)
    graph.recompile()
    random_state = th.get_rng_state()
    try:
        return script_of(graph, inputs)
    finally:
        th.set_rng_state(random_state)


def _keep_linear_layers_whole(graph: th.fx.Graph) -> None:
    """Write each linear layer as one operation that TorchScript does not split.

    TorchScript splits addmm into a product and a sum. With one input feature this rounds twice, but eager mode rounds
    once. The checks of the first replays may not find it, because biases begin at 0.
    """
    for node in graph.find_nodes(op="call_function", target=th.ops.aten.addmm.default):
        bias, inputs, transposed = node.args
        is_linear = (
            isinstance(transposed, th.fx.Node) and transposed.target is th.ops.aten.t.default and not node.kwargs
        )
        if is_linear:
            node.target, node.args = th.ops.aten.linear.default, (inputs, transposed.args[0], bias)


def _keep_products_apart(graph: th.fx.Graph) -> None:
    """Write matrix products as operations that TorchScript does not join.

    It joins four products or more that are added up into one, which rounds otherwise. Such a sum is the gradient of
    what four layers share.
    """
    products = graph.find_nodes(op="call_function", target=th.ops.aten.mm.default)
    added = [node for node in products if any(user.target is th.ops.aten.add.Tensor for user in node.users)]
    for node in products if len(added) >= JOINED_PRODUCTS else []:
        node.target = th.ops.aten.matmul.default


@dataclass
class _Replay:
    run: Replay
    n_checks: int = 0


class Replays(PolicyFunctions[_Replay]):
    """The replays of one task of a policy, such as acting."""

    @property
    def n_replays(self) -> int:
        """How many replays are in use."""
        return len(self._functions)

    def _hindrance(self) -> str | None:
        return None if can_replay(self._policy) else "a replay would not do all that the policy does"

    def _drop(self, state: PolicyState) -> None:
        self._functions.clear()
        # A policy that changes again and again does not pay for a replay each time
        self._n_requests.clear()

    def compute(
        self,
        key: Hashable,
        inputs: Sequence[th.Tensor],
        make_function: Callable[[], Callable[..., Any]],
        eager: Callable[[], Sequence[th.Tensor]],
    ) -> Sequence[th.Tensor]:
        """Compute what ``eager`` computes, by a replay if this is worth it.

        :param key: everything that a replay holds as constants, besides the policy
        :param inputs: everything else that the computation depends on
        :param make_function: makes a function of ``inputs`` for :func:`make_replay`
        :param eager: computes the results without a replay
        """
        replay = self._functions.get(key) or self._make_if_often_asked(key, inputs, make_function)
        if replay is None:
            return eager()
        if replay.n_checks < CHECKED_REPLAYS:
            return self._checked(replay, inputs, eager)
        try:
            return replay.run(*inputs)
        except RuntimeError as error:
            # Eager mode raises its own error, for example that probabilities are NaN
            self._give_up(error)
        return eager()

    def _make_if_often_asked(
        self, key: Hashable, inputs: Sequence[th.Tensor], make_function: Callable[[], Callable[..., Any]]
    ) -> _Replay | None:
        if self.is_usable:
            self._n_requests[key] += 1
            if self._n_requests[key] > REPLAY_AFTER:
                self._make(key, lambda: _Replay(make_replay(make_function(), inputs, self._policy)))
        return self._functions.get(key)

    def _checked(
        self, replay: _Replay, inputs: Sequence[th.Tensor], eager: Callable[[], Sequence[th.Tensor]]
    ) -> Sequence[th.Tensor]:
        replay.n_checks += 1
        before = th.get_rng_state()
        expected = eager()
        after = th.get_rng_state()
        th.set_rng_state(before)
        replayed = replay.run(*inputs)
        if _bits(replayed) != _bits(expected) or not th.equal(th.get_rng_state(), after):
            self._give_up("a replay has other bits than eager mode")
            th.set_rng_state(after)
        return expected


def _bits(tensors: Sequence[th.Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()) for tensor in tensors]
