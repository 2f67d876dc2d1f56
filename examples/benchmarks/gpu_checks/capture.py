"""Looks inside a model: its parts, its compiled graphs without TorchInductor, and pretended CUDA graphs on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch as th
from gpu_checks.report import Options
from torch.multiprocessing.reductions import StorageWeakRef

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import captured, graphs
from sb3_ppo_plus.fast.graphs import GraphCache


def parts_of(model: Any, kind: type) -> list[Any]:  # noqa: ANN401  # private parts, of any class
    """Return every object of a class that a model holds, itself or inside another part of this package.

    :param model: a PPOPlus, or a part of it
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
    """Run compiled graphs operation by operation inside the block, where ``no_code`` asks for that.

    On the CPU they are then replayed as a GPU would, see :class:`PretendedReplay`.
    """
    generate, replays = graphs._generate_code, dict(captured.REPLAYS)
    if options.no_code:
        graphs._generate_code = lambda graph, _: graph
        captured.REPLAYS["cpu"] = PretendedReplay
    try:
        yield
    finally:
        graphs._generate_code = generate
        captured.REPLAYS.clear()
        captured.REPLAYS.update(replays)


class PretendedReplay:
    """What a CUDA graph does, on the CPU. It is as unforgiving, and notices where a GPU would compute something else.

    It reads the memory of its capture alone, fails if that was freed, and overwrites its outputs at each replay. The
    capture changes nothing.

    :param function: a partial with all arguments
    :param device: without effect
    """

    def __init__(self, function: partial[Any], device: th.device) -> None:
        self._code = function.func
        self._places = [_Place(tensor) for tensor in function.args]
        contents = [tensor.untyped_storage().clone() for tensor in function.args]
        state = th.get_rng_state()
        self.outputs = [output.clone() for output in function()]
        self._spoil_outputs()
        self.is_random = not th.equal(state, th.get_rng_state())
        th.set_rng_state(state)
        for tensor, before in zip(function.args, contents, strict=True):
            tensor.untyped_storage().copy_(before)

    def replay(self) -> None:
        self._spoil_outputs()
        values = self._code(*(place.tensor() for place in self._places))
        for output, value in zip(self.outputs, values, strict=True):
            output.copy_(value)

    def _spoil_outputs(self) -> None:
        for output in self.outputs:
            output.fill_(float("nan") if output.is_floating_point() else 77)

    @staticmethod
    def free_bytes(device: th.device) -> int:
        return 2**33

    @staticmethod
    def generator(device: th.device) -> th.Generator:
        return th.default_generator


class _Place:
    """A tensor's memory, which this does not keep alive."""

    def __init__(self, tensor: th.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._geometry = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> th.Tensor:
        storage = th.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise SystemError("a captured graph uses memory that was freed")
        return th.empty(0, dtype=self._dtype).set_(storage, *self._geometry)


def replays_of(model: PPOPlus) -> list[int]:
    """Return how often the graphs of the gradient step, and of acting and evaluating, were replayed.

    :param model: a PPOPlus
    """
    parts = model._execution.gradient_step, model._execution.compiled_actor
    caches = [parts_of(part, GraphCache) for part in parts]
    return [sum(graph.n_replays for cache in found for graph in cache.captured) for found in caches]
