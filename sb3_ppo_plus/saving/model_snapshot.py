"""Snapshots of a model: taken between two updates, turned into the bytes of a saved model later."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # SB3's pickler has no types
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.save_util import data_to_json, recursive_getattr, save_to_zip_file

from sb3_ppo_plus.saving.model_description import describe_space, description_as_json, description_of
from sb3_ppo_plus.saving.model_file import policies_named_by_package
from sb3_ppo_plus.saving.untrusted_model import DESCRIPTION

# Values of these types are written to JSON as they are
_PLAIN = (bool, int, float, str, type(None))


class ModelSnapshots:
    """Takes snapshots of a model. It remembers the JSON of attributes, most of which never change."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, str], tuple[bytes, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A user's function in the model may refer to this object: saved with the model, it must not hold earlier saves
        return {"_made": {}}

    def take(self, model: PPO, exclude: Iterable[str]) -> Callable[[], bytes]:
        """Copy what ``model.save`` would write.

        :param model: the model
        :param exclude: names of attributes to leave out, as for ``model.save``
        :return: makes the bytes of the zip; any thread may call it, and changes of the model change nothing. For a
            model that is not on the CPU, or whose class has a ``save`` of its own, the bytes are made already
        """
        if not _saves_as_ppo_plus(model):
            archive = io.BytesIO()
            model.save(archive, exclude=exclude)
            return archive.getvalue
        state_dicts, variables = model._get_torch_save_params()
        left_out = {*exclude, *model._excluded_save_params()}
        left_out |= {name.split(".")[0] for name in (*state_dicts, *variables)}
        with policies_named_by_package():
            data = {
                name: value if type(value) in _PLAIN else self._unless_made(_entry, name, value)
                for name, value in vars(model).items()
                if name not in left_out
            }
        spaces = [
            self._unless_made(_described, name, getattr(model, name)) for name in ("observation_space", "action_space")
        ]
        description = description_of(model, exclude, spaces)
        states = (model.get_parameters(), {name: recursive_getattr(model, name) for name in variables})
        tensors = list(_tensors_in(states))
        if any(tensor.device.type != "cpu" for tensor in tensors):
            # Here, since another thread's copies would break the recording of a CUDA graph
            content = _archive(data, description, *states)
            return lambda: content
        copied = _copied(states, tensors)
        return lambda: _archive(data, description, *copied)

    def _unless_made(self, make: Callable[[str, Any], Any], name: str, value: object) -> Any:  # noqa: ANN401  # any JSON
        # Equal pickles are equal values. Pickling takes a tenth of the time of making what SB3 and we write
        pickled = cloudpickle.dumps(value)
        made = self._made.get((make, name))
        if made is None or made[0] != pickled:
            made = self._made[make, name] = (pickled, make(name, value))
        return made[1]


def _entry(name: str, value: object) -> Any:  # noqa: ANN401  # any JSON
    return json.loads(data_to_json({name: value}))[name]


def _described(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401  # a space
    return describe_space(value)


def _saves_as_ppo_plus(model: PPO) -> bool:
    if "save" in vars(model):
        return False
    owner = next(cls for cls in type(model).__mro__ if "save" in vars(cls))
    return owner.__module__ == "sb3_ppo_plus.ppo_plus"


def _archive(
    data: dict[str, Any], description: dict[str, Any], parameters: dict[str, Any], variables: dict[str, Any]
) -> bytes:
    archive = io.BytesIO()
    save_to_zip_file(archive, data=None, params=parameters, pytorch_variables=variables)
    with zipfile.ZipFile(archive, "a") as opened:
        # As SB3 writes it
        opened.writestr("data", json.dumps(data, indent=4))
        opened.writestr(DESCRIPTION, description_as_json(description))
    return archive.getvalue()


def _copied(tree: Any, tensors: list[th.Tensor]) -> Any:  # noqa: ANN401  # state dicts
    """Copy state dicts with all their tensors, several times faster than ``deepcopy`` alone."""
    tensors = [tensor for tensor in tensors if type(tensor) is th.Tensor and tensor.layout is th.strided]
    storages = [tensor.untyped_storage() for tensor in tensors]
    n_uses = Counter(storage.data_ptr() for storage in storages)
    memo: dict[int, Any] = {}
    for tensor, storage in zip(tensors, storages, strict=True):
        is_alone = n_uses[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes
        # deepcopy keeps what the others share, and what their storages hold besides: th.save writes whole storages
        if is_alone and not tensor.requires_grad:
            memo[id(tensor)] = tensor.clone()
    return copy.deepcopy(tree, memo)


def _tensors_in(tree: object) -> Iterator[th.Tensor]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors_in(item)
    elif isinstance(tree, th.Tensor):
        yield tree
