"""Exports a policy: from the observation in the environment's units to the action in the environment's units."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.envs.questions import innermost_normalizer
from sb3_ppo_plus.export.checks import check_keys, check_path, check_wrappers, normalizer_of, policy_of
from sb3_ppo_plus.export.contract import N_TEST_ROWS, Contract, contract_path
from sb3_ppo_plus.export.files import OPSET, as_onnx, as_pt2, trace
from sb3_ppo_plus.export.graph import PolicyGraph, check_policy, users_parts
from sb3_ppo_plus.export.loading import Runner, open_onnx, open_pt2
from sb3_ppo_plus.export.observations import (
    check_observation_space,
    observation_parts,
    space_before_wrappers,
    statistics_of,
)
from sb3_ppo_plus.export.trial import TOLERANCE, answer_of_predict, draw_inputs, largest_error, margins_of
from sb3_ppo_plus.policies.actor_critic import ActorCriticPlusPolicy
from sb3_ppo_plus.policies.flat_actions import space_of_env

_TRIAL_STEPS, _TRIAL_BATCH = 3, 4


def export_policy(
    model: PlusModel | ActorCriticPlusPolicy,
    path: str | os.PathLike[str],
    vec_normalize: VecEnv | None = None,
    deterministic: bool = True,
    *,
    observation_space: spaces.Space[Any] | None = None,
) -> Path:
    """Write a policy as ONNX or for ``torch.export.load``, and its contract beside it.

    The file takes observations in the environment's units and gives actions in its units, inside its bounds. Everything
    between is in it: the normaliser, images' scaling and order of channels, one-hot vectors, the memory, whose state
    goes in and comes out, and masks. What was written is run, and compared with ``model.predict``.

    :param model: the model, or its policy
    :param path: the file; its suffix is ".onnx" (opset 18; needs onnx, onnxscript and onnxruntime) or ".pt2"
    :param vec_normalize: the VecNormalize of training, or a VecEnv with it inside; None: observations come normalised,
        or the policy was trained without
    :param deterministic: True: the actions of ``predict(..., deterministic=True)``. False: the file takes random
        numbers as further inputs, and gives a sample
    :param observation_space: what the environment gives: the policy's own space, or with the channels of images last.
        None: as in the model's environments, and if it has none, the policy's own
    :return: ``path``
    :raises ValueError: for a folder that does not exist, a part of the policy or a wrapper that is not known, or a file
        whose actions are not those of ``predict``
    :raises TypeError: for a ``vec_normalize`` of another class
    :raises ImportError: if a package of the extra ``export`` is missing
    """
    path = Path(path)
    check_path(path)
    policy, normalize = _checked(model, vec_normalize)
    space = observation_space
    if space is None:
        space = space_before_wrappers(policy.actor_space, getattr(model, "env", None), normalize)
    check_observation_space(space, policy.actor_space)
    graph = PolicyGraph(policy, observation_parts(space, policy.actor_space, normalize), deterministic)
    rng = np.random.default_rng(0)
    program = trace(graph, draw_inputs(graph, normalize, N_TEST_ROWS, rng))
    content = as_onnx(program, graph) if path.suffix == ".onnx" else as_pt2(program, graph)
    open_file = open_onnx if path.suffix == ".onnx" else open_pt2
    runner = open_file(content, graph.inputs, graph.outputs, trusted=True)
    test_inputs, test_outputs = _try(runner, policy, graph, normalize, rng)
    contract = Contract(
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        observation_space=space,
        action_space=space_of_env(policy.action_space),
        deterministic=deterministic,
        normalizer=_describe_normalizer(normalize, graph),
        versions=_versions(path.suffix),
        sha256=hashlib.sha256(content).hexdigest(),
        test_inputs=test_inputs,
        test_outputs=test_outputs,
    )
    _write_together({path: content, contract_path(path): contract.as_json().encode()})
    return path


def _checked(model: object, vec_normalize: VecEnv | None) -> tuple[Any, VecNormalize | None]:
    """Return the policy and the normaliser, in which nothing is unknown."""
    policy = policy_of(model)
    check_policy(policy)
    normalize = normalizer_of(vec_normalize)
    for env in (vec_normalize, getattr(model, "env", None)):
        check_wrappers(env)
    check_keys(policy.actor_space, normalize)
    _warn_of_missing_normalizer(model, normalize)
    return policy, normalize


def _warn_of_missing_normalizer(model: object, normalize: VecNormalize | None) -> None:
    if normalize is None and innermost_normalizer(getattr(model, "env", None)) is not None:
        warnings.warn(
            "export_policy: the model's environments have a VecNormalize, which the export leaves out: it will need "
            "normalised observations. vec_normalize=model.get_vec_normalize_env() includes it",
            stacklevel=4,
        )


def _try(
    runner: Runner,
    policy: ActorCriticPlusPolicy,
    graph: PolicyGraph,
    normalize: VecNormalize | None,
    rng: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Compare what was written with ``predict`` over some steps, and return a test vector.

    :raises ValueError: if they differ
    """
    was_training = policy.training
    neutral = {spec.name: spec.neutral for spec in graph.inputs if spec.role == "noise"}
    try:
        for batch in (1, _TRIAL_BATCH, N_TEST_ROWS):
            states: dict[str, np.ndarray] = {}
            for _ in range(_TRIAL_STEPS if graph.memory is not None else 1):
                inputs = {**draw_inputs(graph, normalize, batch, rng), **states}
                outputs = runner(inputs)
                _compare(outputs, inputs, policy, graph, normalize)
                states = {f"state_{name}": outputs[f"next_state_{name}"] for name in graph.state_names}
                if neutral:
                    # Not all noise has numbers with which an action is the deterministic one
                    without = {name: array for name, array in inputs.items() if name not in neutral}
                    _compare(_run(graph, without), inputs, policy, graph, normalize, is_neutral=True)
                if neutral and None not in neutral.values():
                    still = {name: np.full_like(inputs[name], value) for name, value in neutral.items()}
                    _compare(runner({**inputs, **still}), inputs, policy, graph, normalize, is_neutral=True)
    finally:
        policy.set_training_mode(was_training)
    return inputs, outputs


def _run(graph: PolicyGraph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with th.no_grad():
        answer = graph({name: th.as_tensor(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in answer.items()}


def _compare(
    outputs: dict[str, np.ndarray],
    inputs: dict[str, np.ndarray],
    policy: ActorCriticPlusPolicy,
    graph: PolicyGraph,
    normalize: VecNormalize | None,
    is_neutral: bool = False,
) -> None:
    margins = margins_of(graph, inputs)
    expected, after = answer_of_predict(policy, graph, normalize, inputs)
    if any(spec.role == "noise" for spec in graph.inputs) and not is_neutral:
        # Samples are compared with PyTorch's for the same noise
        expected = _run(graph, inputs)
        margins = {name: None if margin is None else np.full_like(margin, np.inf) for name, margin in margins.items()}
    error = largest_error(outputs, expected, graph, margins)
    for name, part in zip(graph.state_names, after, strict=True):
        difference = np.abs(outputs[f"next_state_{name}"] - part).max()
        error = max(error, float(difference / max(1.0, np.abs(part).max())))
    # NaN too is an error
    if not error <= TOLERANCE:
        own = ", ".join(users_parts(graph, policy))
        raise ValueError(
            f"export_policy: the exported {type(policy).__name__} differs from predict by {error:.3g} of the range of "
            "actions. Something in it computes another result in a graph, such as a branch in Python; parts that are "
            f"not PPOPlus's: {own or 'none'}"
        )


def _describe_normalizer(normalize: VecNormalize | None, graph: PolicyGraph) -> dict[str, Any] | None:
    keys = [key for key in graph.keys if statistics_of(normalize, key) is not None]
    if normalize is None or not keys:
        return None
    clip = float(normalize.clip_obs)
    return {
        "keys": None if keys == [None] else keys,
        "clip_obs": clip if np.isfinite(clip) else None,
        "epsilon": float(normalize.epsilon),
    }


def _versions(suffix: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"torch": str(th.__version__)}
    names = ["sb3-ppo-plus", *(["onnx", "onnxscript"] if suffix == ".onnx" else [])]
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return {**versions, **({"opset": str(OPSET)} if suffix == ".onnx" else {})}


def _write_together(contents: dict[Path, bytes]) -> None:
    """Replace files, once all of them are written. A failure before that leaves the old ones.

    :param contents: what each file is to hold
    """
    unfinished = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, content in contents.items():
            unfinished[path].write_bytes(content)
        for path, part in unfinished.items():
            os.replace(part, path)
    finally:
        for part in unfinished.values():
            part.unlink(missing_ok=True)
