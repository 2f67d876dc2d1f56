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
        # What a module's get_extra_state has returned, for its own set_extra_state
        if key.rpartition(".")[2] != "_extra_state":
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
            raise UntrustedFileError(
                f"{OPTIMIZER_FILE}: a group must hold the parameters {short(own['params'])}. The file's policy has "
                "other layers than this one, or another optimiser: make the model with the file's net_arch and classes"
            )
        for key, value in group.items():
            if key not in own:
                raise UntrustedFileError(
                    f"{OPTIMIZER_FILE} is of another optimiser than the model's, which has no setting {short(key)}"
                )
            if not (key == "params" or _is_like(value, own[key])):
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
        expected: dict[tuple[th.Size, th.dtype], dict[str, Any] | None] = {}
        for index, parameter in zip(group["params"], own_group["params"], strict=True):
            entries = state["state"].get(index, {})
            if not entries:
                continue
            kind = parameter.shape, parameter.dtype
            if kind not in expected:
                expected[kind] = _entries_after_a_step(type(optimizer), group, parameter)
            _check_entries(entries, expected[kind], parameter, index)


def _entries_after_a_step(
    optimizer_class: type[Optimizer], group: dict[str, Any], parameter: th.Tensor
) -> dict[str, Any] | None:
    """Return the state that an optimiser keeps for a parameter with these settings; None: it cannot be tried out."""
    trial_parameter = th.nn.Parameter(th.zeros(parameter.shape, dtype=parameter.dtype))
    trial_parameter.grad = th.zeros_like(trial_parameter)
    names = inspect.signature(optimizer_class).parameters.keys() - {"params", "foreach", "fused", "capturable"}
    try:
        # The constructor also checks the settings' ranges
        make: Callable[..., Optimizer] = optimizer_class
        trial = make([trial_parameter], **{name: value for name, value in group.items() if name in names})
        trial.step()
    except Exception as error:
        if optimizer_class not in OPTIMIZERS.values():
            return None
        raise UntrustedFileError(f"{OPTIMIZER_FILE}: {error}") from error
    return dict(trial.state[trial_parameter])


def _check_entries(entries: dict[Any, Any], expected: dict[str, Any] | None, parameter: th.Tensor, index: int) -> None:
    if expected is not None and entries.keys() != expected.keys():
        raise UntrustedFileError(
            f"{OPTIMIZER_FILE}: state {index} must hold {', '.join(expected)}, got {short(list(entries))}"
        )
    for key, value in entries.items():
        name = f"{OPTIMIZER_FILE}: {short(key)} of parameter {index}"
        own = None if expected is None else expected[key]
        if isinstance(value, th.Tensor) or isinstance(own, th.Tensor):
            tensor = _check_plain(value, name)
            if isinstance(own, th.Tensor):
                _check_like(tensor, own, name)
            elif tensor.numel() > max(parameter.numel(), 1):
                raise UntrustedFileError(f"{name} has {tensor.numel()} numbers, more than the parameter")
            if not bool(th.isfinite(tensor).all()):
                raise UntrustedFileError(f"{name} holds NaN or infinity")
        elif value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise UntrustedFileError(f"{name} is {short(value)}, no number")
