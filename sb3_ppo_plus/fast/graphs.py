"""Functions of tensors, traced once and compiled by TorchInductor.

They are traced, not given to ``torch.compile``. So a policy may run any Python code, no call checks guards, and nothing
is compiled again by surprise. A graph is valid for the shapes with which it was traced.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.fast.captured import CapturedGraph, Graph, Report, with_capture
from sb3_ppo_plus.fast.decompositions import FUSED_OPERATIONS
from sb3_ppo_plus.fast.policy_changes import hindrance
from sb3_ppo_plus.fast.policy_functions import PolicyFunctions, PolicyState
from sb3_ppo_plus.fast.tracing import trace
from sb3_ppo_plus.policies.rounding import may_round
from sb3_ppo_plus.torch_private import inductor_code, inductor_mode, inductor_option_names

# The graph's random operations are PyTorch's own, so that they draw the numbers of eager mode
DEFAULT_OPTIONS: dict[str, Any] = {"fallback_random": True}

# A compilation takes seconds. A policy that changes more often than this runs faster eagerly
MAX_COMPILATIONS = 3

# TorchInductor's option for CUDA graphs. Its own would not capture graphs that change their inputs
CAPTURES = "triton.cudagraphs"


class CompilationReporter:
    """Prints a line for each compilation, and warns at the first failure.

    :param verbose: 0: print nothing
    """

    def __init__(self, verbose: int) -> None:
        self.verbose = verbose
        self.seconds = 0.0
        self._has_warned = False
        self._has_warned_of_capture = False

    def compiled(self, what: str, seconds: float) -> None:
        """Count the seconds, and print a line.

        :param what: what the graph does
        :param seconds: how long its compilation took
        """
        self.seconds += seconds
        if self.verbose >= 1:
            print(f"Compiled {what} in {seconds:.1f} s")

    def failed(self, what: str, reason: Exception | str) -> None:
        """Warn that something runs eagerly. Only the first call warns.

        :param what: what runs eagerly
        :param reason: why, or the error of the compilation
        """
        if not self._has_warned:
            if isinstance(reason, Exception):
                reason = f"it could not be compiled: {_in_one_line(reason)}"
            warnings.warn(f"compile=True: {what} runs eagerly, since {reason}", stacklevel=2)
        self._has_warned = True

    def not_captured(self, what: str, reason: Exception | str) -> None:
        """Warn that a compiled graph is not replayed as a CUDA graph. Only the first call warns.

        :param what: what the graph does
        :param reason: why, or the error of the capture or replay
        """
        if not self._has_warned_of_capture:
            if isinstance(reason, Exception):
                reason = f"this failed: {_in_one_line(reason)}"
            warnings.warn(f"compile=True: {what} runs compiled, but not as a CUDA graph: {reason}", stacklevel=2)
        self._has_warned_of_capture = True


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class GraphCache(PolicyFunctions[Graph]):
    """The compiled graphs of one task of a policy, such as acting.

    :param policy: the policy that the graphs are traced from
    :param options: options of TorchInductor
    :param reporter: told what was compiled, or why it could not be
    """

    def __init__(self, policy: ActorCriticPolicy, options: dict[str, Any], reporter: CompilationReporter) -> None:
        super().__init__(policy, options, reporter)
        self.n_compilations = 0
        self._options = options
        self._reporter = reporter

    @property
    def captured(self) -> list[CapturedGraph]:
        """The present graphs that are, or soon will be, replayed as CUDA graphs."""
        return [graph for graph in self._functions.values() if isinstance(graph, CapturedGraph)]

    def _hindrance(self) -> str | None:
        return hindrance(self._policy)

    def _drop(self, state: PolicyState) -> None:
        if self._functions and state.constants != self.state.constants:
            self._give_up("a tensor that is neither parameter nor buffer was replaced", "what was compiled")
        # A hook is no reason to drop them: they fit again once it is removed
        if state.python != self.state.python:
            self._functions.clear()

    def _give_up(self, reason: Exception | str, what: str = "a function") -> None:
        super()._give_up(reason, what)
        self._reporter.failed(what, reason)

    def get(
        self, key: Hashable, what: str, make_function: Callable[[], Callable[..., Any]], inputs: Sequence[th.Tensor]
    ) -> Graph | None:
        """Look up a graph, or compile it; None: there can be none, and the reporter was told why.

        :param key: everything that the graph holds as constants, besides the policy
        :param what: what the graph does, for the reporter
        :param make_function: makes the function to compile, see :func:`compile_graph`
        :param inputs: the function's inputs
        """
        if self.state.hindrance is not None:
            self._reporter.failed(what, self.state.hindrance)
        if not self.is_usable:
            return None
        if key not in self._functions:
            self._compile(key, what, make_function, inputs)
        return self._functions.get(key)

    def _compile(
        self, key: Hashable, what: str, make_function: Callable[[], Callable[..., Any]], inputs: Sequence[th.Tensor]
    ) -> None:
        self._n_requests[key] += 1
        if self._n_requests[key] > MAX_COMPILATIONS:
            self._give_up("attributes or parts of the policy change again and again", what)
            return
        started = time.perf_counter()
        report = partial(self._reporter.not_captured, what)
        self._make(key, lambda: compile_graph(make_function(), inputs, self._policy, self._options, report), what)
        if key in self._functions:
            self.n_compilations += 1
            self._reporter.compiled(f"{what} ({len(inputs[0])} at once)", time.perf_counter() - started)


def inductor_options(compile: bool | dict[str, Any]) -> dict[str, Any]:
    """Translate the ``compile`` argument into TorchInductor's options.

    :param compile: True, False, TorchInductor's options, or a dict of ``mode`` and ``options`` as for ``torch.compile``
    :raises TypeError: for anything else
    :raises ValueError: for an option that TorchInductor does not have
    """
    if isinstance(compile, bool):
        return {}
    if not isinstance(compile, dict):
        raise TypeError(f"compile must be True, False or a dict of torch.compile's options, got {compile!r}")

    options = dict(compile)
    if options.keys() <= {"mode", "options"}:
        mode = options.get("mode")
        # For Inductor this mode says nothing about CUDA graphs, which it does not use by default
        captures = {CAPTURES: False} if mode == "max-autotune-no-cudagraphs" else {}
        options = {**captures, **inductor_mode(mode), **options.get("options", {})}
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
    report: Report = lambda reason: None,
) -> Graph:
    """Compile a function for inputs of the shapes, dtypes and devices of ``inputs``.

    :param function: takes tensors, returns a tensor or tuple of tensors, and may change inputs in place
    :param inputs: examples; their values do not matter
    :param module: the module that the function calls; it is not changed
    :param options: options of TorchInductor, as in the argument ``options`` of ``torch.compile``
    :param report: told why the function is not replayed as a CUDA graph, where it might be
    :return: the compiled function; what it returns is the caller's
    :raises RuntimeError: if the module keeps a state in Python, which a graph would not follow
    :raises Exception: errors of many kinds, from tracing or the compiler
    """
    examples = [tensor.detach() for tensor in inputs]
    with may_round():
        graph, again = (trace(function, examples, module, FUSED_OPERATIONS) for _ in range(2))
    if graph.code != again.code:
        raise RuntimeError("two traces of the policy differ, so each call computes something else")
    options = {**DEFAULT_OPTIONS, **(options or {})}
    captures = options.get(CAPTURES, True)
    code = _generate_code(graph, {**options, CAPTURES: False})
    return with_capture(code, graph, inputs, module, report) if captures else code


def _generate_code(graph: th.fx.GraphModule, options: dict[str, Any]) -> Graph:
    # TorchInductor's cache on the disk needs the sizes of the trace's fake tensors
    placeholders = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    code = inductor_code(graph, placeholders, options)
    # The tensors that the traced code holds are its first inputs
    constants = [*graph.parameters(), *graph.buffers()]
    return lambda *inputs: code([*constants, *inputs])
