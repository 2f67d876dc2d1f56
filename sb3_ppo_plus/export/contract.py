"""The contract beside an exported policy: what goes in, what comes out, and a test vector, as strict JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.policies.flat_actions import parts_of
from sb3_ppo_plus.policies.masked_distributions import can_be_masked, mask_sizes
from sb3_ppo_plus.saving.described_spaces import decode_space, encode_space
from sb3_ppo_plus.untrusted.regular_files import read_regular_file
from sb3_ppo_plus.untrusted.strict_json import (
    DTYPES,
    MAX_BYTES,
    decode_array,
    decode_shape,
    encode_array,
    get,
    parse,
    short,
)

FORMAT = "sb3_ppo_plus.export/1"
BATCH = "batch"
"""In a shape: the number of observations."""
INPUT_ROLES = ("observation", "action_masks", "state", "episode_start", "noise")
OUTPUT_ROLES = ("action", "state")
DISTRIBUTIONS = ("standard_normal", "gumbel", "uniform")
MAX_TENSORS = 1000
MAX_NUMBERS = 2**24
"""In all inputs and outputs for one observation."""
N_TEST_ROWS = 2
"""Observations of a test vector."""
_DTYPES = {"action_masks": "bool", "state": "float32", "episode_start": "bool", "noise": "float32"}


class TensorSpec(NamedTuple):
    """An input or an output.

    :param name: its name
    :param role: one of ``INPUT_ROLES``, or of ``OUTPUT_ROLES``
    :param dtype: NumPy's name of its dtype
    :param shape: sizes; the one that is the number of observations is "batch"
    :param key: key in a Dict observation, or path of a part of a Tuple or Dict action, such as "1.angle"; None: the
        space is neither, or this is neither
    :param optional: whether the input may be left out; masks, which are then True everywhere
    :param distribution: of noise, one of ``DISTRIBUTIONS``
    :param neutral: the noise with which the action is the deterministic one; None: there is none
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]
    key: str | None = None
    optional: bool = False
    distribution: str | None = None
    neutral: float | None = None

    def shape_for(self, batch: int) -> tuple[int, ...]:
        """Return the shape for a number of observations.

        :param batch: the number
        """
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    @property
    def batch_axis(self) -> int:
        """The axis of the observations."""
        return self.shape.index(BATCH)

    def draw(self, batch: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the random numbers of a stochastic action.

        :param batch: number of observations
        :param rng: the generator
        :return: float32, of the shape for so many observations
        """
        shape = self.shape_for(batch)
        if self.distribution == "standard_normal":
            return rng.standard_normal(shape, np.float32)
        if self.distribution == "gumbel":
            return rng.gumbel(size=shape).astype(np.float32)
        # Drawn in float64, they might round up to 1
        return rng.random(shape, np.float32)


@dataclass(frozen=True)
class Contract:
    """What an exported policy takes and gives.

    :param inputs: its inputs, in their order
    :param outputs: its outputs, in their order
    :param observation_space: of the environment that it acts in
    :param action_space: of that environment
    :param deterministic: whether it takes no noise
    :param normalizer: settings of the normaliser that is included, None without one. For readers
    :param versions: of the software that has written it. For readers
    :param sha256: hash of the policy's file
    :param test_inputs: a test vector, by the names of the inputs
    :param test_outputs: the outputs for it, by their names
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    deterministic: bool
    normalizer: dict[str, Any] | None
    versions: dict[str, str]
    sha256: str
    test_inputs: dict[str, np.ndarray] = field(repr=False)
    test_outputs: dict[str, np.ndarray] = field(repr=False)

    def with_role(self, role: str) -> tuple[TensorSpec, ...]:
        """Return the inputs with a role.

        :param role: one of ``INPUT_ROLES``
        """
        return tuple(spec for spec in self.inputs if spec.role == role)

    @property
    def actions(self) -> tuple[TensorSpec, ...]:
        """The outputs that are the action, or its parts in the order of the action space."""
        return tuple(spec for spec in self.outputs if spec.role == "action")

    def as_json(self) -> str:
        """Return the text of the file."""
        content = {
            "format": FORMAT,
            "deterministic": self.deterministic,
            "inputs": [_encode_spec(spec) for spec in self.inputs],
            "outputs": [_encode_spec(spec) for spec in self.outputs],
            "state_begins": "zeros" if self.with_role("state") else None,
            "observation_space": encode_space(self.observation_space),
            "action_space": encode_space(self.action_space),
            "normalizer": self.normalizer,
            "versions": self.versions,
            "sha256": self.sha256,
            "test": {
                "inputs": {name: encode_array(array) for name, array in self.test_inputs.items()},
                "outputs": {name: encode_array(array) for name, array in self.test_outputs.items()},
            },
        }
        return json.dumps(content, indent=1, allow_nan=False)


def names_of_tensors(kind: str, keys: Iterable[str | None]) -> list[str]:
    """Return names of inputs or outputs: identifiers, as ONNX asks for, and each different.

    :param kind: what they are, such as "observation"
    :param keys: key of each; None: the name is ``kind``
    """
    names: list[str] = []
    for key in keys:
        name = kind if key is None else re.sub(r"\W", "_", f"{kind}_{key}", flags=re.ASCII)
        while name in names:
            name += "_"
        names.append(name)
    return names


def contract_path(path: Path) -> Path:
    """Return the place of the contract of a policy's file.

    :param path: the file, such as policy.onnx
    :return: such as policy.onnx.json
    """
    return path.with_name(f"{path.name}.json")


def read_contract(path: Path) -> Contract:
    """Read a contract strictly. The file may be hostile.

    :param path: of the contract
    :raises UntrustedFileError: for a file that is no contract
    :raises OSError: if it cannot be read
    """
    name = str(path)
    content = parse(read_regular_file(path, MAX_BYTES), name)
    written = get(content, "format", str, name)
    if written != FORMAT:
        raise UntrustedFileError(f"{name}: format must be {FORMAT!r}, got {short(written)}")
    inputs = _decode_specs(content, "inputs", INPUT_ROLES, name)
    outputs = _decode_specs(content, "outputs", OUTPUT_ROLES, name)
    test = get(content, "test", dict, name)
    contract = Contract(
        inputs=inputs,
        outputs=outputs,
        observation_space=decode_space(get(content, "observation_space", dict, name), f"{name}: observation_space"),
        action_space=decode_space(get(content, "action_space", dict, name), f"{name}: action_space"),
        deterministic=get(content, "deterministic", bool, name),
        normalizer=get(content, "normalizer", (dict, type(None)), name),
        versions=get(content, "versions", dict, name),
        sha256=get(content, "sha256", str, name),
        test_inputs=_decode_arrays(test, "inputs", inputs, name),
        test_outputs=_decode_arrays(test, "outputs", outputs, name),
    )
    _check_roles(contract, name)
    return contract


def _encode_spec(spec: TensorSpec) -> dict[str, Any]:
    always = {"name": spec.name, "role": spec.role, "dtype": spec.dtype, "shape": list(spec.shape)}
    if spec.role in ("observation", "action"):
        return {**always, "key": spec.key}
    if spec.role == "action_masks":
        return {**always, "optional": spec.optional}
    if spec.role == "noise":
        return {**always, "distribution": spec.distribution, "neutral": spec.neutral}
    return always


def _decode_specs(content: Any, which: str, roles: tuple[str, ...], name: str) -> tuple[TensorSpec, ...]:  # noqa: ANN401  # JSON
    entries = get(content, which, list, name)
    if not 0 < len(entries) <= MAX_TENSORS:
        raise UntrustedFileError(f"{name} must have from 1 to {MAX_TENSORS} {which}, got {len(entries)}")
    specs = tuple(_decode_spec(entry, roles, f"{name}: {which}[{index}]") for index, entry in enumerate(entries))
    if len({spec.name for spec in specs}) != len(specs):
        raise UntrustedFileError(f"{name}: a name occurs twice among the {which}")
    return specs


def _decode_spec(entry: object, roles: tuple[str, ...], name: str) -> TensorSpec:
    role, dtype = get(entry, "role", str, name), get(entry, "dtype", str, name)
    if role not in roles:
        raise UntrustedFileError(f"{name}: role must be one of {', '.join(roles)}, got {short(role)}")
    if dtype not in DTYPES:
        raise UntrustedFileError(f"{name}: dtype must be one of {', '.join(DTYPES)}, got {short(dtype)}")
    shape = get(entry, "shape", list, name)
    if shape.count(BATCH) != 1:
        raise UntrustedFileError(f"{name}: shape must hold {BATCH!r} once, got {short(shape)}")
    decode_shape([size for size in shape if size != BATCH], name)
    spec = TensorSpec(get(entry, "name", str, name), role, dtype, tuple(shape))
    if role in ("observation", "action"):
        return spec._replace(key=get(entry, "key", (str, type(None)), name))
    if role == "action_masks":
        return spec._replace(optional=get(entry, "optional", bool, name))
    if role == "noise":
        distribution = get(entry, "distribution", str, name)
        if distribution not in DISTRIBUTIONS:
            raise UntrustedFileError(
                f"{name}: distribution must be one of {', '.join(DISTRIBUTIONS)}, got {short(distribution)}"
            )
        neutral = get(entry, "neutral", (int, float, type(None)), name)
        return spec._replace(distribution=distribution, neutral=None if neutral is None else float(neutral))
    return spec


def _decode_arrays(test: object, which: str, specs: tuple[TensorSpec, ...], name: str) -> dict[str, np.ndarray]:
    members = get(test, which, dict, f"{name}: test")
    if set(members) != {spec.name for spec in specs}:
        raise UntrustedFileError(f"{name}: test must hold an array for each of the {which}, got {short(list(members))}")
    arrays = {spec.name: decode_array(members[spec.name], f"{name}: test: {short(spec.name)}") for spec in specs}
    for spec in specs:
        array = arrays[spec.name]
        fits = array.ndim == len(spec.shape) and array.dtype.name == spec.dtype
        if not fits or array.shape != spec.shape_for(array.shape[spec.batch_axis]):
            raise UntrustedFileError(
                f"{name}: test: {short(spec.name)} must be {spec.dtype} of the shape {short(spec.shape)}, got "
                f"{array.dtype.name} of the shape {array.shape}"
            )
    return arrays


def _check_roles(contract: Contract, name: str) -> None:
    """Check that inputs and outputs belong together, and fit the spaces."""
    n_of = {role: len(contract.with_role(role)) for role in INPUT_ROLES}
    states = [spec.shape for spec in contract.outputs if spec.role == "state"]
    if states != [spec.shape for spec in contract.with_role("state")]:
        raise UntrustedFileError(f"{name}: the states that come out must have the shapes of those that go in")
    if n_of["action_masks"] > 1 or n_of["episode_start"] != (1 if states else 0):
        raise UntrustedFileError(f"{name}: action_masks may occur once, and episode_start once, with a state")
    if bool(n_of["noise"]) == contract.deterministic:
        raise UntrustedFileError(f"{name}: a deterministic policy has no noise, and every other one has")
    if [(spec.key, spec.shape) for spec in contract.actions] != _shapes_of_actions(contract.action_space, name):
        raise UntrustedFileError(f"{name}: there must be an action for each part of the action space, with its shape")
    _check_inputs(contract, name)
    space = contract.observation_space
    known: dict[Any, spaces.Space[Any]] = dict(space.spaces) if isinstance(space, spaces.Dict) else {None: space}
    for spec in contract.with_role("observation"):
        if spec.key not in known or spec.shape != (BATCH, *(known[spec.key].shape or ())):
            raise UntrustedFileError(f"{name}: the input {short(spec.name)} does not fit the observation space")
    if n_of["observation"] == 0:
        raise UntrustedFileError(f"{name}: there must be an observation")


def _check_inputs(contract: Contract, name: str) -> None:
    """Check what must hold for the arrays of each role, and that there are not too many numbers."""
    for spec in (*contract.inputs, *contract.outputs):
        dtype = _DTYPES.get(spec.role, spec.dtype)
        if spec.dtype != dtype or (spec.role == "episode_start" and spec.shape != (BATCH,)):
            raise UntrustedFileError(f"{name}: {short(spec.name)} must be {dtype}, and episode_start one for each row")
    for spec in contract.with_role("action_masks"):
        size = sum(mask_sizes(contract.action_space)) if can_be_masked(contract.action_space) else 0
        if spec.shape != (BATCH, size):
            raise UntrustedFileError(f"{name}: action_masks must have the shape ({BATCH!r}, {size})")
    n_numbers = sum(math.prod(spec.shape_for(1)) for spec in (*contract.inputs, *contract.outputs))
    if n_numbers > MAX_NUMBERS:
        raise UntrustedFileError(f"{name} has {n_numbers} numbers for one observation; at most {MAX_NUMBERS}")
    arrays = {**contract.test_inputs, **contract.test_outputs}
    rows = {arrays[spec.name].shape[spec.batch_axis] for spec in (*contract.inputs, *contract.outputs)}
    if rows - {N_TEST_ROWS}:
        raise UntrustedFileError(f"{name}: test must have {N_TEST_ROWS} observations, got {short(sorted(rows))}")


def _shapes_of_actions(action_space: spaces.Space[Any], name: str) -> list[tuple[str | None, tuple[int | str, ...]]]:
    """Return the path of each part of an action space, None if there is one part only, and its outputs' shape."""
    try:
        parts = parts_of(action_space)
    except ValueError as error:
        raise UntrustedFileError(f"{name}: action_space: {error}") from error
    return [(part.path, (BATCH, *(part.space.shape or ()))) for part in parts] or [
        (None, (BATCH, *(action_space.shape or ())))
    ]
