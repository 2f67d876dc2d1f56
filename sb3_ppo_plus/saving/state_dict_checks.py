"""Checks of state dicts from untrusted files, against the model that will load them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.optim import Optimizer

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.policies.names import OPTIMIZERS
from sb3_ppo_plus.untrusted.strict_json import short

POLICY_FILE = "policy.pth"
OPTIMIZER_FILE = "policy.optimizer.pth"


def check_plain_tensors(state: object, name: str) -> None:
    """Check that a state dict holds dense tensors by name.

    :param state: state dict from the file
    :param name: what to call it in messages
    :raises UntrustedFileError: if it holds anything else
    """
    if not isinstance(state, dict):
        raise UntrustedFileError(f"{name} holds no state dict")
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise UntrustedFileError(f"{name}: the name of a tensor is {short(key)}, no string")
        _check_plain(tensor, f"{name}: {short(key)}")


def _check_plain(tensor: object, name: str) -> th.Tensor:
    if type(tensor) not in (th.Tensor, th.nn.Parameter):
        raise UntrustedFileError(f"{name} is a {type(tensor).__name__}, no tensor")
    assert isinstance(tensor, th.Tensor)
    if tensor.layout is not th.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise UntrustedFileError(f"{name} is no dense tensor")
    # With strides of 0, one number in memory can pass for a tensor of any size
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UntrustedFileError(f"{name} has more elements than numbers")
    return tensor


def check_policy_state(state: dict[str, th.Tensor], policy: ActorCriticPolicy) -> None:
    """Check the names, shapes and dtypes of a policy's tensors.

    :param state: state dict from the file
    :param policy: the policy that will load it
    :raises UntrustedFileError: if one differs from the policy's, or a parameter is not finite
    """
    expected = policy.state_dict()
    different = [*(expected.keys() - state.keys()), *(state.keys() - expected.keys())]
    if different:
        key = different[0]
        raise UntrustedFileError(
            f"{POLICY_FILE} {'has no' if key in expected else 'has an unknown'} tensor {short(key)}"
        )
    for key, own in expected.items():
        _check_like(state[key], own, f"{POLICY_FILE}: {short(key)}")
    check_finite(state, policy)


def check_finite(state: dict[str, Any], policy: ActorCriticPolicy) -> None:
    """Refuse NaN and infinity among a policy's parameters. A buffer, such as an attention mask, may hold infinity.

    :param state: state dict from the file
    :param policy: the policy that will load it
    :raises UntrustedFileError: for a parameter that is NaN or infinite somewhere
    """
    for key, _ in policy.named_parameters():
        tensor = state.get(key)
        if isinstance(tensor, th.Tensor) and not bool(th.isfinite(tensor).all()):
            raise UntrustedFileError(
                f"{POLICY_FILE}: {short(key)} holds NaN or infinity. Where the file is your own, load(path) takes it"
            )


def _check_like(tensor: th.Tensor, own: th.Tensor, name: str) -> None:
    if tensor.shape != own.shape or tensor.dtype != own.dtype:
        raise UntrustedFileError(
            f"{name} must have shape {tuple(own.shape)} and {own.dtype}, got {tuple(tensor.shape)} and {tensor.dtype}"
        )


def check_optimizer_groups(state: object, expected: dict[str, Any]) -> dict[str, Any]:
    """Check the groups and settings of an optimiser's state dict. PyTorch does not check them.

    :param state: state dict from the file
    :param expected: state dict of the model's own optimiser
    :return: the state dict; settings that an older version of PyTorch did not have are those of ``expected``
    :raises UntrustedFileError: if it has other groups, or settings of other types
    """
    if not (isinstance(state, dict) and state.keys() == {"state", "param_groups"}):
        raise UntrustedFileError(f"{OPTIMIZER_FILE} holds no state dict of an optimiser")
    groups, states, own_groups = state["param_groups"], state["state"], expected["param_groups"]
    if not (isinstance(groups, list) and len(groups) == len(own_groups) and isinstance(states, dict)):
        raise UntrustedFileError(f"{OPTIMIZER_FILE} must have {len(own_groups)} parameter groups")
    for group, own in zip(groups, own_groups, strict=True):
        if not isinstance(group, dict) or group.get("params") != own["params"]:
            raise UntrustedFileError(f"{OPTIMIZER_FILE}: a group must hold the parameters {short(own['params'])}")
        for key, value in group.items():
            if key not in own or not (key == "params" or _is_like(value, own[key])):
                raise UntrustedFileError(f"{OPTIMIZER_FILE}: {short(key)} cannot be {short(value)}")
    known = {index for group in own_groups for index in group["params"]}
    for index, entries in states.items():
        if type(index) is not int or index not in known or not isinstance(entries, dict):
            raise UntrustedFileError(f"{OPTIMIZER_FILE}: state {short(index)} is of no parameter")
    return {
        "state": states,
        "param_groups": [{**own, **group} for group, own in zip(groups, own_groups, strict=True)],
    }


def _is_like(value: object, own: object) -> bool:
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(own) and all(map(_is_like, value, own))
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_optimizer_entries(state: dict[str, Any], optimizer: Optimizer) -> None:
    """Check the tensors of an optimiser's state dict. PyTorch does not check their shapes.

    :param state: state dict that has passed :func:`check_optimizer_groups`, with the groups of ``optimizer``
    :param optimizer: the optimiser that will load it
    :raises UntrustedFileError: if names, shapes or dtypes are not those that the optimiser makes itself, or a tensor
        is not finite
    """
    for group, own_group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        own_entries = _entries_after_a_step(type(optimizer), group)
        for index, parameter in zip(group["params"], own_group["params"], strict=True):
            entries = state["state"].get(index, {})
            if entries and own_entries is not None and entries.keys() != own_entries.keys():
                raise UntrustedFileError(
                    f"{OPTIMIZER_FILE}: state {index} must hold {', '.join(own_entries)}, got {short(list(entries))}"
                )
            for key, value in entries.items():
                if value is not None:
                    _check_entry(value, parameter, key, f"{OPTIMIZER_FILE}: {short(key)} of parameter {index}")


def _entries_after_a_step(optimizer_class: type[Optimizer], group: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state that an optimiser of PyTorch keeps for a parameter with these settings; None for others."""
    if optimizer_class not in OPTIMIZERS.values():
        return None
    parameter = th.nn.Parameter(th.zeros(1))
    parameter.grad = th.zeros(1)
    names = inspect.signature(optimizer_class).parameters.keys() - {"params", "foreach", "fused", "capturable"}
    try:
        # The constructor also checks the settings' ranges
        make: Callable[..., Optimizer] = optimizer_class
        trial = make([parameter], **{name: value for name, value in group.items() if name in names})
        trial.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UntrustedFileError(f"{OPTIMIZER_FILE}: {error}") from error
    return dict(trial.state[parameter])


def _check_entry(value: object, parameter: th.Tensor, key: object, name: str) -> None:
    tensor = _check_plain(value, name)
    # The count of steps is one number; all other entries have the shape of the parameter
    is_one_number = tensor.shape == () and parameter.shape != ()
    if tensor.shape not in ((), parameter.shape) or (key == "step") != is_one_number:
        raise UntrustedFileError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != (th.float32 if key == "step" else parameter.dtype):
        raise UntrustedFileError(f"{name} must be {parameter.dtype}, got {tensor.dtype}")
    if not bool(th.isfinite(tensor).all()):
        raise UntrustedFileError(f"{name} holds NaN or infinity")
