"""Looks inside a model: its parts, its compiled graphs without TorchInductor, and their replays as CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from gpu_checks.report import Options

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import graphs
from sb3_ppo_plus.fast.graphs import GraphCache
from sb3_ppo_plus.update.flat_parameters import FlatParameters


def parts_of(model: Any, kind: type) -> list[Any]:  # noqa: ANN401  # private parts, of any class
    """Return every object of a class that a model holds, itself or inside another part of this package.

    :param model: a PPOPlus
    :param kind: the class
    """
    found, seen, waiting = [], set(), [model]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, kind):
            found.append(part)
        held = getattr(part, "__dict__", {}).values()
        waiting += [value for value in held if type(value).__module__.startswith("sb3_ppo_plus")]
    return found


@contextmanager
def graphs_without_code(options: Options) -> Iterator[None]:
    """Run compiled graphs operation by operation inside the block, where ``no_code`` asks for that."""
    generate = graphs._generate_code
    if options.no_code:
        graphs._generate_code = lambda graph, _: graph
    try:
        yield
    finally:
        graphs._generate_code = generate


class CudaReplay:
    """A function of no arguments, captured as a CUDA graph. Capturing does nothing else.

    :param function: returns the tensors that each replay fills anew
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        th.cuda.synchronize()
        self.graph = th.cuda.CUDAGraph()
        with th.cuda.graph(self.graph):
            self.outputs = function()

    def replay(self) -> None:
        self.graph.replay()


class PretendedReplay:
    """What :class:`CudaReplay` does, on the CPU, for a dry run.

    :param function: returns the tensors that each replay fills anew
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.outputs = function()
        # Here, unlike there, the capture has computed once
        self.is_first = True

    def replay(self) -> None:
        if not self.is_first:
            for output, value in zip(self.outputs, self.function(), strict=True):
                output.copy_(value)
        self.is_first = False


class CapturedGraph:
    """A compiled graph that is called once, then captured, then replayed.

    A replay reads and writes fixed memory. Parameters and the optimiser's state, which a graph changes, mostly stay
    where they are. All other inputs are copied into places of their own before a replay.

    :param graph: the compiled graph
    :param model: whose parameters and state it reads
    :param device: "cuda", or "cpu" for a dry run
    """

    def __init__(self, graph: Callable[..., Any], model: PPOPlus, device: str) -> None:
        self.graph, self.model = graph, model
        self.n_calls = self.n_replays = 0
        self._make_replay = CudaReplay if device == "cuda" else PretendedReplay
        self._replay: CudaReplay | PretendedReplay | None = None
        self._static: list[th.Tensor] = []
        self._may_change: list[bool] = []
        self._last: list[th.Tensor] = []
        self._moved: list[tuple[th.Tensor, th.Tensor]] = []

    def __call__(self, *inputs: th.Tensor) -> list[Any]:
        self.n_calls += 1
        if self.n_calls == 1:
            return self.graph(*inputs)
        if self._replay is None:
            self._capture(inputs)
        assert self._replay is not None
        self._place(inputs)
        self._replay.replay()
        self.n_replays += 1
        for tensor, static in self._moved:
            tensor.copy_(static)
        return [output.clone() if isinstance(output, th.Tensor) else output for output in self._replay.outputs]

    def _capture(self, inputs: Sequence[th.Tensor]) -> None:
        fixed = self._fixed_places()
        self._may_change = [tensor.data_ptr() in fixed for tensor in inputs]
        self._static = [
            tensor if may_change else tensor.clone()
            for tensor, may_change in zip(inputs, self._may_change, strict=True)
        ]
        self._last = list(inputs)
        self._replay = self._make_replay(lambda: self.graph(*self._static))

    def _place(self, inputs: Sequence[th.Tensor]) -> None:
        """Put the inputs where the graph reads them, and note those that it changes in another place than theirs."""
        # Nobody writes into a tensor that was handed over, but for those that may change
        new = [index for index, tensor in enumerate(inputs) if tensor is not self._last[index]]
        for index in new:
            if inputs[index].data_ptr() != self._static[index].data_ptr():
                self._static[index].copy_(inputs[index], non_blocking=True)
        if new:
            self._last = list(inputs)
            self._moved = [
                (tensor, static)
                for tensor, static, may_change in zip(inputs, self._static, self._may_change, strict=True)
                if may_change and tensor.data_ptr() != static.data_ptr()
            ]

    def _fixed_places(self) -> set[int]:
        policy = self.model.policy
        tensors = [*policy.parameters(), *policy.buffers()]
        for flat in parts_of(self.model, FlatParameters):
            for group in flat.groups:
                tensors += [tensor for tensor in (group.flat, group.flat.grad) if tensor is not None]
                tensors += [value for value in group.state.values() if isinstance(value, th.Tensor)]
        return {tensor.data_ptr() for tensor in tensors}


def capture_graphs(model: PPOPlus, device: str, captured: list[CapturedGraph]) -> None:
    """Have a model replay its compiled graphs as CUDA graphs.

    :param model: has compiled its graphs already
    :param device: "cuda", or "cpu" for a dry run
    :param captured: the graphs are added to it
    """
    for cache in parts_of(model, GraphCache):
        by_graph: dict[int, CapturedGraph] = {}

        def get(
            *arguments: Any,  # those of GraphCache.get
            original: Callable[..., Any] = cache.get,
            by_graph: dict[int, CapturedGraph] = by_graph,
        ) -> CapturedGraph | None:
            graph = original(*arguments)
            if graph is None:
                return None
            if id(graph) not in by_graph:
                by_graph[id(graph)] = CapturedGraph(graph, model, device)
                captured.append(by_graph[id(graph)])
            return by_graph[id(graph)]

        cache.get = get
