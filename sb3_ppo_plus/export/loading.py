"""Loads exported policies, and runs them with onnxruntime or PyTorch, without the policy's code."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.export.contract import Contract, TensorSpec, contract_path, read_contract
from sb3_ppo_plus.export.pt2_sizes import check_sizes
from sb3_ppo_plus.export.untrusted_onnx import checked_onnx
from sb3_ppo_plus.export.untrusted_pt2 import without_code
from sb3_ppo_plus.policies.flat_actions import FlatActionSpace, flat_action_space
from sb3_ppo_plus.policies.mask_layout import masks_of_envs
from sb3_ppo_plus.policies.masks import MASK_KEY
from sb3_ppo_plus.untrusted.regular_files import read_regular_file

MAX_BYTES = 2**31
Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs a policy: from arrays by the names of inputs to arrays by the names of outputs."""
_MISSING = "running an .onnx file needs onnx and onnxruntime: pip install 'sb3-ppo-plus[export]'"


class ExportedPolicy:
    """A policy from a file. It has the ``predict`` of SB3's models, so ``evaluate_policy`` takes it.

    :param contract: what the file takes and gives
    :param run: runs the file
    :param seed: seed of the noise of a stochastic export; None: another one each time
    """

    def __init__(self, contract: Contract, run: Runner, seed: int | None = None) -> None:
        self.contract = contract
        self.observation_space: spaces.Space[Any] = contract.observation_space
        self.action_space: spaces.Space[Any] = contract.action_space
        self._run = run
        self._rng = np.random.default_rng(seed)
        self._observations = contract.with_role("observation")
        self._states = contract.with_role("state")
        self._next_states = [spec.name for spec in contract.outputs if spec.role == "state"]
        self._others = {role: contract.with_role(role) for role in ("action_masks", "episode_start", "noise")}
        # None: the action space is no Tuple or Dict
        flat = flat_action_space(self.action_space)
        self._structure = flat if isinstance(flat, FlatActionSpace) else None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the file once.

        :param inputs: an array for each input of the contract, by name; those that are optional may be absent
        :return: an array for each output, by name
        :raises ValueError: for a name, a dtype or a shape that is not the contract's
        """
        known = {spec.name: spec for spec in self.contract.inputs}
        batch: int | None = None
        for name, array in inputs.items():
            if name not in known:
                raise ValueError(f"{name!r} is no input; inputs: {', '.join(known)}")
            spec = known[name]
            size = array.shape[spec.batch_axis] if array.ndim == len(spec.shape) else -1
            batch = size if batch is None else batch
            if array.dtype.name != spec.dtype or array.shape != spec.shape_for(batch):
                raise ValueError(
                    f"the input {name!r} must be {spec.dtype} of the shape {spec.shape}, with the same batch as other "
                    f"inputs, got {array.dtype} of the shape {array.shape}"
                )
        missing = [name for name, spec in known.items() if name not in inputs and not spec.optional]
        if missing:
            raise ValueError(f"the inputs {missing} are missing")
        return self._run(inputs)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool | None = None,
        action_masks: Any = None,  # noqa: ANN401  # an array, or the structure of a hybrid action space
    ) -> tuple[Any, tuple[np.ndarray, ...] | None]:
        """Choose actions in the environment's units, as SB3's ``predict`` does.

        :param observation: in the environment's units, of one environment or of n_envs
        :param state: the state of the memory that the last call returned; None: each observation begins an episode
        :param episode_start: True where the state is reset before the step, shape (n_envs,); None: nowhere
        :param deterministic: None: as the policy was exported. True is also possible for a stochastic export, but for
            one of a Beta policy
        :param action_masks: True where an action is valid, shape (n_envs, mask size) or (mask size,); None: all are,
            or the observation holds them. For a Tuple or Dict, the structures that the model's ``predict`` takes too
        :return: the actions, and the state after them; without a memory, ``state`` itself. For a Tuple or Dict action
            space, the actions of a batch are a list of structures
        :raises ValueError: for arrays that do not fit, or for ``deterministic`` that the file cannot do
        """
        inputs, batch, is_batch = self._observation_inputs(observation)
        if action_masks is not None:
            self._put_masks(inputs, action_masks, batch)
        if self._states:
            self._put_state(inputs, state, episode_start, batch)
        self._put_noise(inputs, deterministic, batch)
        outputs = self._run(inputs)
        if self._states:
            state = tuple(outputs[name] for name in self._next_states)
        of_parts = [outputs[spec.name] for spec in self.contract.actions]
        actions: Any = of_parts[0] if self._structure is None else self._structure.structures(of_parts)
        return (actions if is_batch else actions[0]), state

    def largest_error_of_test(self) -> float:
        """Run the contract's test vector.

        :return: the largest difference of an action from the contract's; 0 or near it if this machine computes the same
        """
        outputs = self._run(self.contract.test_inputs)
        differences = [
            np.abs(outputs[spec.name].astype(np.float64) - self.contract.test_outputs[spec.name].astype(np.float64))
            for spec in self.contract.actions
        ]
        return float(max(difference.max(initial=0.0) for difference in differences))

    def _observation_inputs(
        self, observation: np.ndarray | dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], int, bool]:
        inputs: dict[str, np.ndarray] = {}
        batch, is_batch = 1, False
        for index, spec in enumerate(self._observations):
            given: Any = observation
            if spec.key is not None:
                if not isinstance(observation, dict) or spec.key not in observation:
                    raise ValueError(f"observation must be a dict with the key {spec.key!r}, got {type(observation)}")
                given = observation[spec.key]
            array = np.asarray(given)
            if array.dtype.kind not in "biu" and np.dtype(spec.dtype).kind in "biu":
                raise ValueError(f"observation must be of integers ({spec.dtype}), got {array.dtype}")
            array = array.astype(spec.dtype, copy=False)
            has_batch = array.ndim == len(spec.shape)
            if index == 0:
                is_batch, batch = has_batch, len(array) if has_batch else 1
            array = array if is_batch else array[None]
            if array.shape != spec.shape_for(batch):
                where = "" if spec.key is None else f"[{spec.key!r}]"
                raise ValueError(
                    f"observation{where} must have the shape {spec.shape[1:]}, or one of several such in a "
                    f"batch, got {np.shape(given)}"
                )
            inputs[spec.name] = np.ascontiguousarray(array)
        return inputs, batch, is_batch

    def _put_masks(self, inputs: dict[str, np.ndarray], action_masks: Any, batch: int) -> None:  # noqa: ANN401  # see predict
        specs = [*self._others["action_masks"], *(spec for spec in self._observations if spec.key == MASK_KEY)]
        if not specs:
            raise ValueError("action_masks were given to a policy that takes none")
        spec, masks = specs[0], masks_of_envs(self.action_space, action_masks)
        if len(masks) != batch:
            raise ValueError(f"action_masks must be those of {batch} environment(s), got those of {len(masks)}")
        inputs[spec.name] = np.ascontiguousarray(masks.reshape(spec.shape_for(batch)).astype(spec.dtype))

    def _put_state(
        self,
        inputs: dict[str, np.ndarray],
        state: Sequence[np.ndarray] | None,
        episode_start: np.ndarray | None,
        batch: int,
    ) -> None:
        expected = [spec.shape_for(batch) for spec in self._states]
        if state is None:
            state = [np.zeros(shape, spec.dtype) for shape, spec in zip(expected, self._states, strict=True)]
        given = [np.shape(part) for part in state]
        if given != expected:
            raise ValueError(
                f"predict: state must be None or what predict returned for {batch} environment(s), a tuple of arrays "
                f"of the shapes {expected}; got {given}"
            )
        for spec, part in zip(self._states, state, strict=True):
            inputs[spec.name] = np.ascontiguousarray(part, dtype=spec.dtype)
        starts = np.zeros(batch, bool) if episode_start is None else np.asarray(episode_start, bool).reshape(-1)
        if len(starts) != batch:
            raise ValueError(f"episode_start must have the shape ({batch},), got {starts.shape}")
        inputs[self._others["episode_start"][0].name] = starts

    def _put_noise(self, inputs: dict[str, np.ndarray], deterministic: bool | None, batch: int) -> None:
        if deterministic is False and self.contract.deterministic:
            raise ValueError(
                "deterministic=False needs a policy that was exported with export_policy(..., deterministic=False)"
            )
        for spec in self._others["noise"]:
            if not deterministic:
                inputs[spec.name] = spec.draw(batch, self._rng)
                continue
            if spec.neutral is None:
                raise ValueError("deterministic=True: a Beta policy that was exported with deterministic=False samples")
            inputs[spec.name] = np.full(spec.shape_for(batch), spec.neutral, spec.dtype)


def load_exported(
    path: str | os.PathLike[str], *, trusted: bool = False, seed: int | None = None, num_threads: int = 1
) -> ExportedPolicy:
    """Load a file of ``export_policy``. Neither it nor its contract has to be trusted.

    :param path: the file, ".onnx" (needs onnx and onnxruntime) or ".pt2"; the contract lies beside it
    :param trusted: True: the file may have any operation, also those of your own networks that the closed lists of
        ``operations`` lack; a .pt2 file is then read by PyTorch, which runs code in it
    :param seed: seed of the noise of a stochastic export
    :param num_threads: threads of onnxruntime. One is fastest for small networks
    :raises UntrustedFileError: a ValueError, for a file that is damaged, hostile, or not that of the contract
    :raises ImportError: if a package of the extra ``export`` is missing
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"path must end in .onnx or .pt2, got {str(path)!r}")
    contract = read_contract(contract_path(path))
    content = read_regular_file(path, MAX_BYTES)
    if hashlib.sha256(content).hexdigest() != contract.sha256:
        raise UntrustedFileError(
            f"{path} is not the file that {contract_path(path)} describes: its hash is another one"
        )
    if path.suffix == ".onnx":
        run = open_onnx(content, contract.inputs, contract.outputs, trusted=trusted, num_threads=num_threads)
    else:
        run = open_pt2(content, contract.inputs, contract.outputs, trusted=trusted)
    _try(run, contract, path)
    return ExportedPolicy(contract, run, seed)


def _try(run: Runner, contract: Contract, path: Path) -> None:
    """Run the test vector, to know that the file can run, and gives what the contract says."""
    try:
        outputs = run(contract.test_inputs)
    except Exception as error:
        # Both runtimes raise a dozen types of errors
        raise UntrustedFileError(f"{path} cannot run: {type(error).__name__}: {error}") from error
    for spec in contract.outputs:
        given, expected = outputs[spec.name], contract.test_outputs[spec.name]
        if given.dtype != expected.dtype or given.shape != expected.shape:
            raise UntrustedFileError(
                f"{path}: {spec.name} must be {expected.dtype} of the shape {expected.shape} for the contract's test "
                f"vector, got {given.dtype} of the shape {given.shape}"
            )


def open_onnx(
    content: bytes,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    trusted: bool = False,
    num_threads: int = 1,
) -> Runner:
    """Make an ONNX file ready to run.

    :param content: of the file
    :param inputs: what it must take
    :param outputs: what it must give
    :param trusted: whether it may have any operation
    :param num_threads: threads of onnxruntime
    :raises UntrustedFileError: if it is refused
    """
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(_MISSING) from error
    checked = checked_onnx(content, inputs, outputs, any_operation=trusted)
    options = onnxruntime.SessionOptions()
    # Otherwise onnxruntime may take the bytes for a graph in a format of its own
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.intra_op_num_threads = options.inter_op_num_threads = num_threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(checked, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime raises a dozen types of errors for damaged files
        raise UntrustedFileError(f"onnxruntime cannot read the file: {error}") from error
    names = [spec.name for spec in outputs]

    def run(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, arrays), strict=True))

    return run


def open_pt2(
    content: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, trusted: bool = False
) -> Runner:
    """Make a file of ``torch.export.save`` ready to run.

    :param content: of the file
    :param inputs: what it must take
    :param outputs: what it must give
    :param trusted: whether PyTorch may read it as it is, and run code in it
    :raises UntrustedFileError: if it is refused
    """
    import torch as th

    checked = (
        content if trusted else without_code(content, [spec.name for spec in inputs], [spec.name for spec in outputs])
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = th.export.load(io.BytesIO(checked)).module(check_guards=False)
    except Exception as error:
        # PyTorch raises a dozen types of errors for damaged files
        raise UntrustedFileError(f"torch.export.load cannot read the file: {type(error).__name__}: {error}") from error
    if not trusted:
        one = {spec.name: th.as_tensor(np.zeros(spec.shape_for(1), spec.dtype)) for spec in inputs}
        check_sizes(module, one, "the .pt2 file")
    names = [spec.name for spec in outputs]
    defaults = [spec for spec in inputs if spec.optional]

    def run(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {spec.name: th.as_tensor(arrays[spec.name]) for spec in inputs if spec.name in arrays}
        batch = arrays[inputs[0].name].shape[inputs[0].batch_axis]
        for spec in defaults:
            if spec.name not in given:
                given[spec.name] = th.as_tensor(np.ones(spec.shape_for(batch), spec.dtype))
        # PyTorch wants them in the order in which they were traced
        with th.no_grad():
            results = module({spec.name: given[spec.name] for spec in inputs})
        return {name: results[name].numpy() for name in names}

    return run
