"""Loads models without trust: from a plain description and tensors. Nothing is unpickled, or imported by its name."""

from __future__ import annotations

import io
import math
import pathlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces, get_device, get_system_info
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from sb3_ppo_plus.attributes import COUNTERS, FLAGS
from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.saving.described_spaces import decode_space
from sb3_ppo_plus.saving.model_description import (
    FORMAT,
    LEFT_OUT,
    Tables,
    closed_tables,
    constructor_arguments,
    decode,
    describe,
)
from sb3_ppo_plus.saving.state_dict_checks import (
    OPTIMIZER_FILE,
    POLICY_FILE,
    check_finite,
    check_optimizer_entries,
    check_optimizer_groups,
    check_plain_tensors,
    check_policy_state,
)
from sb3_ppo_plus.untrusted.safe_zip import opened_model, read_members
from sb3_ppo_plus.untrusted.strict_json import get, parse, short
from sb3_ppo_plus.untrusted.tensor_file import load_tensors

DESCRIPTION = "ppo_plus.json"
# All members that SB3 and PPOPlus write; without trust, most of them are never used
MEMBERS = {
    DESCRIPTION,
    "data",
    POLICY_FILE,
    OPTIMIZER_FILE,
    "pytorch_variables.pth",
    "_stable_baselines3_version",
    "system_info.txt",
}
MAX_MEMBERS = 20
# These hold no state dict; the second is older than SB3 0.9
PYTORCH_VARIABLES = ("pytorch_variables.pth", "tensors.pth")
MAX_ENVS = 2**20
# Of the rollout buffer: 2048 steps of 64 environments with Atari's images take half of it
MAX_BUFFER_BYTES = 2**33
# What a policy may build beside the file's tensors: tables of positions, which are buffers and not saved. Policies of
# other people, in ``allow``, may also build layers only to replace them
SPARE_BUFFER_BYTES, SPARE_PARAMETER_BYTES, SPARE_BYTES_IF_ALLOWED = 2**22, 2**16, 2**26
SPARE_TENSORS = 100

Model = TypeVar("Model", bound=PPO)
File = str | pathlib.Path | io.BufferedIOBase


def add_description(archive: io.BytesIO, model: PPO, exclude: Iterable[str]) -> None:
    """Add a model's plain description to the zip that SB3's ``save`` wrote.

    :param archive: the zip, changed in place
    :param model: the model in it
    :param exclude: attributes that were not saved
    """
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(DESCRIPTION, describe(model, exclude))


def load_without_trust(
    cls: type[Model],
    path: File,
    env: GymEnv | None,
    device: th.device | str,
    allow: Iterable[type] | None,
    replaced: dict[str, Any],
    *,
    print_system_info: bool,
) -> Model:
    """Load a model from its plain description and its tensors.

    A value without a plain description is an error. ``tensorboard_log`` and the compiler's options are not taken from
    the file.

    :param cls: class of the model
    :param path: the file
    :param env: environment to train in, or None
    :param device: device of the model
    :param allow: classes that the description may name, see :func:`closed_tables`
    :param replaced: arguments of the constructor that replace those of the file
    :param print_system_info: whether to print on what system the model was saved
    :raises UntrustedFileError: if the file is damaged or hostile, or its description has gaps
    :raises ValueError: if ``env`` has other spaces
    """
    tables = closed_tables(cls, allow)
    with opened_model(path) as file:
        members = read_members(file, str(path), MEMBERS.__contains__, MAX_MEMBERS)
    if print_system_info:
        get_system_info()
        saved_on = members.get("system_info.txt", b"").decode(errors="replace").split("\n")
        print("== SAVED MODEL SYSTEM INFO ==", *("".join(filter(str.isprintable, line)) for line in saved_on), sep="\n")
    if DESCRIPTION not in members:
        raise UntrustedFileError(
            f"{path} has no {DESCRIPTION}: SB3's PPO saved it, or an older PPOPlus. Without trust only its "
            f"parameters can be loaded: {cls.__name__}(policy, env).set_parameters({str(path)!r})"
        )
    for name in (POLICY_FILE, OPTIMIZER_FILE):
        if name not in members:
            raise UntrustedFileError(f"{path} lacks {name}")
    description = parse(members[DESCRIPTION], f"{path}: {DESCRIPTION}")
    arguments = _arguments(cls, description, tables, replaced)
    if not isinstance(arguments.get("verbose", 0), int):
        raise UntrustedFileError(f"{DESCRIPTION}: verbose must be an int, got {short(arguments['verbose'])}")
    if env is not None:
        env = cls._wrap_env(env, arguments.get("verbose", 0))
        check_for_correct_spaces(env, *_spaces(description))
    try:
        return _build(cls, description, arguments, env, get_device(device), members, bool(tuple(allow or ())))
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path}: {error}") from error
    except Exception as error:
        # The constructors of policies and networks may still refuse values of the right type
        raise UntrustedFileError(
            f"the model that {path} describes cannot be built: {type(error).__name__}: {error}"
        ) from error


def read_parameters(path: File, device: th.device | str, model: PPO) -> dict[str, Any]:
    """Read only the state dicts of a model that PPOPlus or SB3 saved.

    :param path: the file
    :param device: device of the tensors
    :param model: the model that will load them
    :return: state dicts by name, such as "policy" and "policy.optimizer"
    :raises UntrustedFileError: for another kind of file, for what only unpickling could read, for parameters that are
        NaN or infinite, and for the state of another optimiser than the model's
    """
    with opened_model(path) as file:
        # Any name is allowed here, since a subclass may save further members
        members = read_members(file, str(path), lambda name: True, MAX_MEMBERS)
    names = [name for name in members if name.endswith(".pth") and name not in PYTORCH_VARIABLES]
    known = model.get_parameters()
    for name in names:
        # SB3 would follow the name to any object in the model
        if name.removesuffix(".pth") not in known:
            raise UntrustedFileError(f"{path}: the model has no parameters of the name {short(name)}")
    states = {
        name.removesuffix(".pth"): load_tensors(members[name], name, get_device(device), allows_legacy=True)
        for name in names
    }
    for name, state in states.items():
        if not isinstance(state, dict):
            raise UntrustedFileError(f"{path}: {name}.pth holds no state dict")
    if "policy" in states:
        check_plain_tensors(states["policy"], POLICY_FILE)
        check_finite(states["policy"], model.policy)
    if "policy.optimizer" in states:
        states["policy.optimizer"] = _checked_optimizer_state(model, states["policy.optimizer"])
    return states


def _checked_optimizer_state(model: Any, state: object) -> dict[str, Any]:  # noqa: ANN401  # a PPOPlus
    checked = check_optimizer_groups(state, model.get_parameters()["policy.optimizer"])
    optimizer = model.policy.optimizer
    check_optimizer_entries(model._coefficients.groups(model).split_state_dict(optimizer, checked), optimizer)
    return checked


def _arguments(cls: type[PPO], description: object, tables: Tables, replaced: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments that a description and the caller give."""
    written = get(description, "format", str, DESCRIPTION)
    if written != FORMAT:
        raise UntrustedFileError(f"{DESCRIPTION}: format must be {FORMAT!r}, got {short(written)}")
    described = get(description, "arguments", dict, DESCRIPTION)
    unknown = sorted(described.keys() - (set(constructor_arguments(cls)) - {*LEFT_OUT}))
    if unknown:
        raise UntrustedFileError(f"{DESCRIPTION}: {cls.__name__} has no arguments {short(unknown)}")
    if isinstance(described.get("compile"), dict) and "compile" not in replaced:
        # One of these options is the command of a program to run
        raise UntrustedFileError(
            f"{DESCRIPTION}: compile: options of torch.compile are not taken from a file; give your own"
        )
    decoded = {name: decode(value, tables, (name,)) for name, value in described.items() if name not in replaced}
    policy = decode(get(description, "policy", dict, DESCRIPTION), tables, ("policy",))
    return {**decoded, **replaced, "policy": policy}


def _spaces(description: object) -> tuple[Any, Any]:
    decoded = []
    for name in ("observation_space", "action_space"):
        space = get(description, name, dict, DESCRIPTION)
        if space.get("$") == "unknown":
            raise UntrustedFileError(f"{name} is {short(space.get('what'))}, which has no plain description")
        decoded.append(decode_space(space, name))
    return decoded[0], decoded[1]


def _build(
    cls: type[Model],
    description: object,
    arguments: dict[str, Any],
    env: Any,  # noqa: ANN401  # None too, which the constructor does not declare
    device: th.device,
    members: Mapping[str, bytes],
    is_others_policy: bool,
) -> Model:
    policy_state = load_tensors(members[POLICY_FILE], POLICY_FILE, device)
    optimizer_state = load_tensors(members[OPTIMIZER_FILE], OPTIMIZER_FILE, device)
    model: Any = cls(env=env, device=device, _init_setup_model=False, **arguments)
    if env is None:
        model.observation_space, model.action_space = _spaces(description)
        model.n_envs = get(description, "n_envs", int, DESCRIPTION)
        if not 0 < model.n_envs <= MAX_ENVS:
            raise UntrustedFileError(f"n_envs must be in [1, {MAX_ENVS}], got {model.n_envs}")
    _check_buffer(model)
    _set_counters_and_flags(model, description)
    check_plain_tensors(policy_state, POLICY_FILE)
    with _limited_tensors(policy_state, SPARE_BYTES_IF_ALLOWED if is_others_policy else SPARE_PARAMETER_BYTES):
        model._setup_model()
    check_policy_state(policy_state, model.policy)
    optimizer_state = _checked_optimizer_state(model, optimizer_state)
    model.set_parameters({"policy": policy_state, "policy.optimizer": optimizer_state}, device=device)
    if model.use_sde:
        # As SB3's load does, so that the exploration matrix is on the right device
        model.policy.reset_noise()
    built: Model = model
    return built


def _check_buffer(model: PPO) -> None:
    n_bytes = model.n_steps * model.n_envs * (_bytes_of(model.observation_space) + _bytes_of(model.action_space) + 32)
    if n_bytes > MAX_BUFFER_BYTES:
        raise UntrustedFileError(
            f"the rollout buffer of n_steps={model.n_steps} and n_envs={model.n_envs} would take {n_bytes} bytes; "
            f"allowed without trust: {MAX_BUFFER_BYTES}. load(..., n_steps=N) gives it another size"
        )


def _bytes_of(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return sum(map(_bytes_of, space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces))
    # Python's integers have no largest one
    return math.prod(map(int, space.shape or ())) * (space.dtype or np.dtype(np.float32)).itemsize


def _set_counters_and_flags(model: PPO, description: object) -> None:
    counters = get(description, "counters", dict, DESCRIPTION)
    for name in COUNTERS:
        value = get(counters, name, int, "counters")
        if value < 0:
            raise UntrustedFileError(f"counters: {name} must not be negative, got {value}")
        setattr(model, name, value)
    flags = get(description, "flags", dict, DESCRIPTION)
    for name in FLAGS:
        setattr(model, name, get(flags, name, (bool, type(None)), "flags"))
    progress = float(get(description, "progress_remaining", (int, float), DESCRIPTION))
    if not 0 <= progress <= 1:
        raise UntrustedFileError(f"progress_remaining must be in [0, 1], got {progress}")
    model._current_progress_remaining = progress


@contextmanager
def _limited_tensors(state: dict[str, th.Tensor], spare_parameter_bytes: int) -> Iterator[None]:
    """Stop the construction of a network that is not the one of the file.

    A few bytes of JSON could ask for any amount of memory, and for hours to fill it. A tensor is checked after its
    memory was reserved, before anything is written there.

    :param state: state dict of the file's policy
    :param spare_parameter_bytes: memory that parameters of other shapes may have
    """
    expected = Counter(tensor.shape for tensor in state.values())
    n_spare = 0
    spare = {"parameters": spare_parameter_bytes, "buffers": SPARE_BUFFER_BYTES}

    def count(kind: str, tensor: th.Tensor | None) -> None:
        nonlocal n_spare
        if tensor is None:
            return
        if expected[tensor.shape] > 0:
            expected[tensor.shape] -= 1
            return
        n_spare += 1
        spare[kind] -= tensor.numel() * tensor.element_size()
        if n_spare > SPARE_TENSORS or spare[kind] < 0:
            raise UntrustedFileError(f"the policy described is larger than the one in {POLICY_FILE}")

    hooks = (
        register_module_parameter_registration_hook(lambda module, name, tensor: count("parameters", tensor)),
        register_module_buffer_registration_hook(lambda module, name, tensor: count("buffers", tensor)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
