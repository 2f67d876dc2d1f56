"""Functions of tensors, traced once and compiled by TorchInductor.

Traced rather than given to ``torch.compile``: what a policy computes in Python is recorded whatever it is, nothing is
guarded at each call, and there is nothing to recompile. A graph holds for the shapes that it was traced with.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch as th

from sb3_ppo_plus.fast.decompositions import FUSED_OPERATIONS
from sb3_ppo_plus.fast.policy_changes import constant_tensors, hindrance, python_state
from sb3_ppo_plus.fast.tracing import trace
from sb3_ppo_plus.policies.rounding import may_round
from sb3_ppo_plus.torch_private import inductor_code, inductor_mode, inductor_option_names

# Random operations of the graph are PyTorch's own: the numbers of eager mode, from the same generator
DEFAULT_OPTIONS: dict[str, Any] = {"fallback_random": True}

# Each takes seconds: whoever changes the policy again and again is better off without
MAX_COMPILATIONS = 3

Graph = Callable[..., Any]


class CompilationReporter:
    """Prints compilations where ``verbose``, and warns of the first that failed.

    :param verbose: 0 for silence about success
    """

    def __init__(self, verbose: int) -> None:
        self.verbose = verbose
        self.seconds = 0.0
        self._has_warned = False

    def compiled(self, what: str, seconds: float) -> None:
        """Count the seconds, and print a line."""
        self.seconds += seconds
        if self.verbose >= 1:
            print(f"Compiled {what} in {seconds:.1f} s")

    def failed(self, what: str, reason: Exception | str) -> None:
        """Warn, once."""
        if not self._has_warned:
            if isinstance(reason, Exception):
                first_line = (str(reason).strip().splitlines() or [""])[0]
                reason = f"it could not be compiled: {type(reason).__name__}: {first_line}"
            warnings.warn(f"compile=True: {what} runs eagerly, since {reason}", stacklevel=2)
        self._has_warned = True


class GraphCache:
    """The compiled graphs of one thing that a policy does, one for each key; none any more once one failed.

    :param policy: what the graphs were traced from
    :param options: TorchInductor's
    :param reporter: told of what was compiled, or could not be
    """

    def __init__(self, policy: th.nn.Module, options: dict[str, Any], reporter: CompilationReporter) -> None:
        self.n_compilations = 0
        self._policy = policy
        self._options = options
        self._reporter = reporter
        self._graphs: dict[Hashable, Graph] = {}
        self._n_compilations_of: Counter[Hashable] = Counter()
        self.python_state: Hashable = None
        """Of the policy at the last refresh, see :func:`policy_changes.python_state`."""
        self._constants: list[th.Tensor] = []
        self.hindrance: str | None = None
        """Why there are no graphs until the next refresh, see :func:`policy_changes.hindrance`; None: there may be."""
        self.has_given_up = False
        """Whether there will be no graphs any more."""

    def __reduce__(self) -> tuple[type[GraphCache], tuple[Any, ...]]:
        # Compiled code cannot be copied or pickled, but compiled again
        return GraphCache, (self._policy, self._options, self._reporter)

    def is_current(self) -> bool:
        """Whether the policy is still what it was at the last refresh."""
        return (
            python_state(self._policy) == self.python_state
            and self._has_constants(constant_tensors(self._policy))
            and hindrance(self._policy) == self.hindrance
        )

    def _has_constants(self, constants: list[th.Tensor]) -> bool:
        return [*map(id, constants)] == [*map(id, self._constants)]

    def refresh(self) -> None:
        """Drop the graphs if the policy is no longer what they have compiled in."""
        state, constants = python_state(self._policy), constant_tensors(self._policy)
        if self._graphs and not self._has_constants(constants):
            self._give_up("what was compiled", "a tensor that is neither parameter nor buffer was replaced")
        if state != self.python_state:
            self._graphs.clear()
        self.python_state, self._constants = state, constants
        self.hindrance = hindrance(self._policy)

    def _give_up(self, what: str, reason: Exception | str) -> None:
        self.has_given_up = True
        self._graphs.clear()
        self._reporter.failed(what, reason)

    def get(
        self, key: Hashable, what: str, make_function: Callable[[], Callable[..., Any]], inputs: Sequence[th.Tensor]
    ) -> Graph | None:
        """Look up a graph, or compile it; None where that has failed, which the reporter was told.

        :param key: everything that the graph has compiled in, besides the policy
        :param what: what it does, for the reporter
        :param make_function: makes the function to compile, see :func:`compile_graph`
        :param inputs: its inputs
        """
        if self.hindrance is not None:
            self._reporter.failed(what, self.hindrance)
        if self.has_given_up or self.hindrance is not None:
            return None
        if key not in self._graphs:
            self._compile(key, what, make_function, inputs)
        return self._graphs.get(key)

    def _compile(
        self, key: Hashable, what: str, make_function: Callable[[], Callable[..., Any]], inputs: Sequence[th.Tensor]
    ) -> None:
        self._n_compilations_of[key] += 1
        if self._n_compilations_of[key] > MAX_COMPILATIONS:
            self._give_up(what, "attributes or parts of the policy change again and again")
            return
        started = time.perf_counter()
        try:
            self._graphs[key] = compile_graph(make_function(), inputs, self._policy, self._options)
        except Exception as error:  # tracing and compilers raise all kinds
            self._give_up(what, error)
            return
        self.n_compilations += 1
        self._reporter.compiled(f"{what} ({len(inputs[0])} at once)", time.perf_counter() - started)


def inductor_options(compile: bool | dict[str, Any]) -> dict[str, Any]:
    """Translate the ``compile`` argument into TorchInductor's options.

    :param compile: True or False; TorchInductor's options; or ``mode`` and ``options``, as ``torch.compile`` takes them
    :raises TypeError: for anything else
    :raises ValueError: for an option that TorchInductor does not have
    """
    if isinstance(compile, bool):
        return {}
    if not isinstance(compile, dict):
        raise TypeError(f"compile must be True, False or a dict of torch.compile's options, got {compile!r}")

    options = dict(compile)
    if options.keys() <= {"mode", "options"}:
        options = {**inductor_mode(options.get("mode")), **options.get("options", {})}
    known = inductor_option_names()
    unknown = [] if known is None else sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"compile has options {unknown}; allowed: those of torch._inductor.list_options()")
    return options


def compile_graph(
    function: Callable[..., Any],
    inputs: Sequence[th.Tensor],
    module: th.nn.Module,
    options: dict[str, Any] | None = None,
) -> Graph:
    """Compile a function for inputs of the shapes, dtypes and devices of ``inputs``.

    :param function: takes tensors, returns a tensor or tuple of tensors, and may change inputs in place
    :param inputs: examples; their values do not matter
    :param module: what the function calls; left as it was
    :param options: TorchInductor's, as in the ``options`` of ``torch.compile``
    :return: the compiled function
    :raises RuntimeError: where the module keeps a state in Python, which a graph would not follow
    :raises Exception: whatever else tracing or the compiler raises, of many kinds
    """
    examples = [tensor.detach() for tensor in inputs]
    with may_round():
        graph, again = (trace(function, examples, module, FUSED_OPERATIONS) for _ in range(2))
    if graph.code != again.code:
        raise RuntimeError("it computes something else at each call")
    return _generate_code(graph, {**DEFAULT_OPTIONS, **(options or {})})


def _generate_code(graph: th.fx.GraphModule, options: dict[str, Any]) -> Graph:
    # Those of the trace: with real ones, there are no sizes that the cache on the disk asks for
    placeholders = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    code = inductor_code(graph, placeholders, options)
    # Tensors that the traced code holds, which come first
    constants = [*graph.parameters(), *graph.buffers()]
    return lambda *inputs: code([*constants, *inputs])
