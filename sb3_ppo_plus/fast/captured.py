"""Compiled graphs on a GPU as CUDA graphs: captured in their second call and replayed from then on.

A compiled graph launches dozens of kernels from Python, which takes longer than they do. A replay is one launch of the
same kernels, with the same bits.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch as th

from sb3_ppo_plus.fast.effects import changed_inputs, obstacle, random_operations
from sb3_ppo_plus.torch_private import copy_each, versions_of
from sb3_ppo_plus.update.tensor_places import tensor_places

Graph = Callable[..., Any]
Report = Callable[[Exception | str], None]

# Tensors of a graph's own may take this share of the device's free memory. A rollout of images takes gigabytes
MEMORY_SHARE = 0.25

# PyTorch captures one graph at a time
_CAPTURING = threading.Lock()

# One for each device, because cuBLAS keeps memory for each stream that it has seen
_STREAMS: dict[th.device, th.cuda.Stream] = {}

# PyTorch's allocator goes on asking a graph whose capture could not be ended, so that it must not be freed
_NEVER_ENDED: list[th.cuda.CUDAGraph] = []


class Replay(Protocol):
    """A function of no arguments that was captured. Capturing it changed nothing.

    :param function: a ``partial`` with all arguments, which are not kept alive
    :param device: on which it computes
    """

    outputs: Sequence[Any]
    """What the function returned. Each replay fills these tensors anew."""

    def __init__(self, function: partial[Any], device: th.device) -> None: ...

    def replay(self) -> None:
        """Do again what the function did, with what now is in the memory of its arguments."""

    @staticmethod
    def free_bytes(device: th.device) -> int:
        """Return how much memory can still be allocated."""

    @staticmethod
    def generator(device: th.device) -> th.Generator:
        """Return the generator from which a replay draws."""


class CudaReplay:
    """A CUDA graph, see :class:`Replay`."""

    def __init__(self, function: partial[Any], device: th.device) -> None:
        if th.cuda.is_current_stream_capturing():
            raise RuntimeError("the caller is capturing a CUDA graph")
        self._graph = th.cuda.CUDAGraph()
        with _CAPTURING, th.cuda.device(device):
            stream = th.cuda.current_stream(device)
            try:
                self.outputs: Sequence[Any] = _captured(self._graph, function, device)
            except BaseException:
                # The context manager of a capture that cannot be ended leaves its stream the current one
                th.cuda.set_stream(stream)
                if not _has_ended(self._graph):
                    _NEVER_ENDED.append(self._graph)
                    # The generator still takes itself to be capturing, until a capture ends well
                    with suppress(Exception):
                        _captured(th.cuda.CUDAGraph(), partial(th.zeros, 1, device=device), device)
                    th.cuda.set_stream(stream)
                raise

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()

    @staticmethod
    def free_bytes(device: th.device) -> int:
        """Return the free memory, with that which PyTorch has reserved and does not use."""
        free, _ = th.cuda.mem_get_info(device)
        return free + th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)

    @staticmethod
    def generator(device: th.device) -> th.Generator:
        """Return PyTorch's default generator."""
        return th.cuda.default_generators[th.cuda.current_device() if device.index is None else device.index]


def _captured(graph: th.cuda.CUDAGraph, function: Callable[[], Any], device: th.device) -> Any:  # noqa: ANN401  # as the function returns
    if device not in _STREAMS:
        _STREAMS[device] = th.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    # The collector may free another CUDA graph, which must not happen during a capture
    collects = gc.isenabled()
    gc.disable()
    try:
        # Other threads, such as those of environments, may use CUDA meanwhile
        with th.cuda.graph(graph, stream=_STREAMS[device], capture_error_mode="thread_local"):
            return function()
    finally:
        if collects:
            gc.enable()


def _has_ended(graph: th.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


REPLAYS: dict[str, type[Replay]] = {"cuda": CudaReplay}
"""How graphs are captured, by type of device. On others, they are not."""


class CapturedGraph:
    """A compiled graph that is called once, which loads its kernels, then captured, then replayed.

    A replay reads and writes the memory of its capture. What the graph changes, and the policy's tensors, it uses where
    they are; they stay there as a rule. Other inputs are copied into tensors of the graph's own. So is, in every later
    call, an input that was not found in its place: what had that place may be somebody else's by now, and is not
    written to. Outputs are copies.

    If a capture or replay fails, one warning says why, and the compiled graph is called.

    :param code: the compiled graph; returns tensors
    :param replay_type: how it is captured
    :param changed: indices of the inputs that it changes in place
    :param in_place: indices of the inputs that it uses where they are; ``changed`` among them
    :param is_random: whether it draws random numbers
    :param report: told why it is not captured
    """

    def __init__(
        self,
        code: Graph,
        replay_type: type[Replay],
        changed: set[int],
        in_place: set[int],
        is_random: bool,
        report: Report,
    ) -> None:
        self._code, self._replay_type = code, replay_type
        self._changed, self._is_random, self._report = changed, is_random, report
        self._in_place = sorted(in_place)
        # Inputs that were not found in their place, and those that never had one
        self._moving: list[int] = []
        self._others: list[int] = []
        self._is_warm = self._has_failed = False
        self._replay: Replay | None = None
        # Held, so that nothing else gets this memory
        self._places: dict[int, th.Tensor] = {}
        self._pointers: list[int] = []
        self._seen: dict[int, tuple[weakref.ref[th.Tensor], int, int]] = {}
        self.n_captures = self.n_replays = 0

    def __call__(self, *inputs: th.Tensor) -> Any:  # noqa: ANN401  # as the graph returns
        """Compute the graph's outputs, and change what it changes."""
        if self._has_failed or not self._is_warm:
            self._is_warm = True
            return self._code(*inputs)
        try:
            outputs = self._replayed(inputs)
        except Exception as error:  # CUDA raises errors of many kinds
            self._has_failed, self._replay, self._places, self._seen = True, None, {}, {}
            self._report(error)
            return self._code(*inputs)
        self.n_replays += 1
        given_back = [index for index in self._moving if index in self._changed]
        if given_back:
            copy_each([inputs[index] for index in given_back], [self._places[index] for index in given_back])
        return [output.clone() if isinstance(output, th.Tensor) else output for output in outputs]

    def _replayed(self, inputs: Sequence[th.Tensor]) -> Sequence[Any]:
        """Replay the graph; if this fails, nothing has changed."""
        replay = self._replay
        if replay is None or [inputs[index].data_ptr() for index in self._in_place] != self._pointers:
            replay = self._capture(inputs)
        new = [*self._moving, *self._new_among(inputs)]
        if new:
            copy_each([self._places[index] for index in new], [inputs[index] for index in new])
        if not self._is_random:
            replay.replay()
            return replay.outputs
        generator = self._replay_type.generator(inputs[0].device)
        state = generator.get_state()
        try:
            replay.replay()
        except Exception:
            generator.set_state(state)
            raise
        return replay.outputs

    def _new_among(self, inputs: Sequence[th.Tensor]) -> list[int]:
        """Return which of the other inputs differ from those of the last call, and remember them."""
        versions = versions_of([inputs[index] for index in self._others])
        if versions is None:
            return self._others
        new = []
        for index, version in zip(self._others, versions, strict=True):
            tensor, seen = inputs[index], self._seen.get(index)
            # Only noted weakly, because a rollout must not be kept until the next one is there
            if seen is None or seen[0]() is not tensor or seen[1:] != (version, tensor.data_ptr()):
                self._seen[index] = (weakref.ref(tensor), version, tensor.data_ptr())
                new.append(index)
        return new

    def _capture(self, inputs: Sequence[th.Tensor]) -> Replay:
        # Frees its memory before the next capture needs as much
        self._replay = None
        if self._places:
            moved = [i for i in self._in_place if inputs[i].data_ptr() != self._places[i].data_ptr()]
            self._in_place = [index for index in self._in_place if index not in moved]
            self._moving += moved
            for index in moved:
                del self._places[index]
        self._others = [index for index in range(len(inputs)) if index not in {*self._in_place, *self._moving}]
        _check_shared_memory(inputs, self._changed)
        own = [index for index in range(len(inputs)) if index not in self._in_place and index not in self._places]
        self._check_size([inputs[index] for index in own], inputs[0].device)
        # Other objects than the caller's, which may be given other memory
        self._places |= {index: inputs[index].detach() for index in self._in_place}
        self._places |= {index: _place_like(inputs[index]) for index in own}
        function = partial(self._code, *(self._places[index] for index in range(len(inputs))))
        self._replay = self._replay_type(function, inputs[0].device)
        self._pointers = [inputs[index].data_ptr() for index in self._in_place]
        self.n_captures += 1
        return self._replay

    def _check_size(self, tensors: Sequence[th.Tensor], device: th.device) -> None:
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if n_bytes > MEMORY_SHARE * self._replay_type.free_bytes(device):
            raise MemoryError(f"copies of its inputs would take {n_bytes / 2**20:.0f} MiB, too much of the free memory")


def _place_like(tensor: th.Tensor) -> th.Tensor:
    # With the strides for which the graph was compiled
    place = th.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return place.copy_(tensor)


def _check_shared_memory(inputs: Sequence[th.Tensor], changed: set[int]) -> None:
    """Refuse inputs that a graph changes, and that share memory with others: copies would not."""
    memory = [tensor.untyped_storage().data_ptr() for tensor in inputs]
    counts = Counter(memory)
    if any(memory[index] and counts[memory[index]] > 1 for index in changed):
        raise RuntimeError("tensors that it changes share memory with others")


def with_capture(
    code: Graph, graph: th.fx.GraphModule, inputs: Sequence[th.Tensor], module: th.nn.Module, report: Report
) -> Graph:
    """Return a compiled graph that is captured and replayed, or the graph itself where that cannot be.

    :param code: the compiled graph
    :param graph: its operations
    :param inputs: those for which it was compiled
    :param module: the module that it calls
    :param report: told why it is not captured; not where no graph is
    """
    replay_type = REPLAYS.get(inputs[0].device.type)
    if replay_type is None:
        return code
    changed, reason = changed_inputs(graph), obstacle(graph, inputs, module)
    if reason is None and changed is None:
        reason = "it is not known what it changes"
    if changed is None or reason is not None:
        report(reason or "")
        return code
    of_module = {tensor.data_ptr() for tensor in tensor_places(module).values() if tensor.numel()}
    in_place = {index for index, tensor in enumerate(inputs) if tensor.data_ptr() in of_module}
    return CapturedGraph(code, replay_type, changed, changed | in_place, any(random_operations(graph)), report)
