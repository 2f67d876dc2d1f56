"""What a policy computes, recorded once and then replayed: the same operations without Python and autograd around them.

Two thirds of the time of small networks is spent on what surrounds the operations. A replay does the very operations of
eager mode, in their order, so that every bit is the same; this is checked on its first results, too. Only what consists
of well-known parts is recorded, since a replay would pass by hooks and code that does something else at each call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.fast.policy_changes import constant_tensors, has_known_parts, python_state
from sb3_ppo_plus.fast.tracing import trace
from sb3_ppo_plus.torch_private import has_accumulation_hooks, has_gradient_hooks, script_of

# A recording takes as long as some hundred minibatches or steps; before so many of them it may not pay
RECORD_AFTER = 300
# PyTorch optimises a graph after its first runs
CHECKED_REPLAYS = 4

Replay = Callable[..., tuple[th.Tensor, ...]]


def can_record(policy: ActorCriticPolicy) -> bool:
    """Whether a replay does all that the policy does: known parts on the CPU, as they are, without hooks."""
    return (
        has_known_parts(policy)
        and policy.device.type == "cpu"
        and not has_gradient_hooks(policy.parameters())
        and not has_accumulation_hooks(policy.parameters())
        and not th.is_autocast_enabled("cpu")
        and not th.is_anomaly_enabled()
        # BLAS is called in another way for others, and rounds differently
        and all(parameter.is_contiguous() for parameter in policy.parameters())
    )


def record(function: Callable[..., Any], inputs: Sequence[th.Tensor], policy: ActorCriticPolicy) -> Replay:
    """Record what a function does with inputs of these shapes and dtypes.

    :param function: takes tensors that need no gradient, returns a tuple of such
    :param inputs: examples; their values do not matter
    :param policy: what the function calls; left as it was
    :return: the replay, for inputs that need no gradient
    :raises Exception: whatever tracing raises, of many kinds
    """
    graph = trace(function, inputs, policy)
    for node in graph.graph.find_nodes(op="call_function", target=th.ops.aten.detach.default):
        # Without autograd there is nothing to detach from
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    _keep_linear_layers_whole(graph.graph)
    graph.recompile()
    random_state = th.get_rng_state()
    try:
        return script_of(graph, inputs)
    finally:
        th.set_rng_state(random_state)


def _keep_linear_layers_whole(graph: th.fx.Graph) -> None:
    """Write each linear layer as one operation that TorchScript leaves as it is.

    It splits addmm into a product and a sum. With one input feature this rounds twice where eager mode rounds once. The
    checks would not see it in the first rollout, as biases begin at 0.
    """
    for node in graph.find_nodes(op="call_function", target=th.ops.aten.addmm.default):
        bias, inputs, transposed = node.args
        is_linear = (
            isinstance(transposed, th.fx.Node) and transposed.target is th.ops.aten.t.default and not node.kwargs
        )
        if is_linear:
            node.target, node.args = th.ops.aten.linear.default, (inputs, transposed.args[0], bias)


@dataclass
class _Recording:
    replay: Replay
    n_checks: int = 0


class Recordings:
    """The recordings of one thing that a policy does, one for each key; none any more once one failed.

    :param policy: what they are made from
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy = policy
        self._recordings: dict[Hashable, _Recording] = {}
        self._n_calls: Counter[Hashable] = Counter()
        self._state: Hashable = None
        self._has_failed = False
        self.is_possible = False
        """Whether there are recordings, or may be soon."""

    def __reduce__(self) -> tuple[type[Recordings], tuple[ActorCriticPolicy]]:
        # TorchScript's functions cannot be copied or pickled, but made again
        return Recordings, (self._policy,)

    @property
    def n_recordings(self) -> int:
        """Recordings that are in use."""
        return len(self._recordings)

    def refresh(self) -> None:
        """Drop the recordings if the policy is no longer what they were made from."""
        self.is_possible = not self._has_failed and can_record(self._policy)
        constants = tuple(id(tensor) for tensor in constant_tensors(self._policy))
        state = (self.is_possible, python_state(self._policy), constants)
        if state != self._state:
            self._recordings.clear()
            # Whoever changes the policy again and again is not to pay for a recording each time
            self._n_calls.clear()
        self._state = state

    def compute(
        self,
        key: Hashable,
        inputs: Sequence[th.Tensor],
        make_function: Callable[[], Callable[..., Any]],
        eager: Callable[[], Sequence[th.Tensor]],
    ) -> Sequence[th.Tensor]:
        """Compute what ``eager`` does, by a replay if this is worth it.

        :param key: everything that a recording holds as constants, besides the policy
        :param inputs: everything else that the computation depends on
        :param make_function: makes the function of ``inputs`` that is recorded, see :func:`record`
        :param eager: does the same
        """
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._make(key, inputs, make_function)
            if recording is None:
                return eager()
        if recording.n_checks < CHECKED_REPLAYS:
            return self._checked(recording, inputs, eager)
        try:
            return recording.replay(*inputs)
        except RuntimeError:
            # For eager mode's own error, such as that probabilities are NaN
            self._give_up()
        return eager()

    def _make(
        self, key: Hashable, inputs: Sequence[th.Tensor], make_function: Callable[[], Callable[..., Any]]
    ) -> _Recording | None:
        if not self.is_possible:
            return None
        self._n_calls[key] += 1
        if self._n_calls[key] <= RECORD_AFTER:
            return None
        try:
            self._recordings[key] = _Recording(record(make_function(), inputs, self._policy))
        except Exception:  # tracing raises all kinds: TorchScript has no backward of convolutions, for one
            self._give_up()
            return None
        return self._recordings[key]

    def _checked(
        self, recording: _Recording, inputs: Sequence[th.Tensor], eager: Callable[[], Sequence[th.Tensor]]
    ) -> Sequence[th.Tensor]:
        recording.n_checks += 1
        before = th.get_rng_state()
        expected = eager()
        after = th.get_rng_state()
        th.set_rng_state(before)
        replayed = recording.replay(*inputs)
        if _bits(replayed) != _bits(expected) or not th.equal(th.get_rng_state(), after):
            self._give_up()
            th.set_rng_state(after)
        return expected

    def _give_up(self) -> None:
        self._has_failed, self.is_possible = True, False
        self._recordings.clear()


def _bits(tensors: Sequence[th.Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()) for tensor in tensors]
