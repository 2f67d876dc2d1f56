"""The RL Zoo's ``enjoy`` without trust in the log folder, and what ``train`` writes for it.

The RL Zoo itself evaluates and unpickles what lies there, and imports the classes that it names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.saving.vec_normalize import load_vec_normalize, save_vec_normalize
from sb3_ppo_plus.untrusted.plain_yaml import read_yaml
from sb3_ppo_plus.untrusted.strict_json import short
from sb3_ppo_plus.zoo.registration import with_members

STATISTICS = "vecnormalize.json"
MAX_VALUES = 1000
MAX_WRAPPERS = 20
#: Limits of integers: how often one step may step the environment, how many observations are put together, and so on
MAX_REPEATS, MAX_STACKED, MAX_PIXELS, MAX_INTEGER, MAX_STEPS = 64, 100, 1024, 10_000, 10**9
#: Steps at the beginning of an episode, each of which may repeat
MAX_NOOPS = 100
#: Pixels of all images that are put together
MAX_STACKED_PIXELS = 2**23
_REPEATS = ("skip", "frame_skip", "frameskip", "repeat_action_duration")
_STACKED = ("horizon", "stack_size", "n_stack", "frame_stack", "delay")
_NOOPS = ("noop_max",)
_SHAPES = ("shape", "width", "height", "screen_size")
_STEPS = ("max_episode_steps", "max_steps", "seed")
# A name, no path and no module
_PLAIN_STRING = re.compile(r"[\w-]{1,64}", re.ASCII)

#: Environment wrappers that a log folder may name
ENV_WRAPPERS = frozenset(
    {
        *(
            f"rl_zoo3.wrappers.{name}"
            for name in (
                *("ActionNoiseWrapper", "ActionSmoothingWrapper", "DelayedRewardWrapper", "FrameSkip"),
                *("HistoryWrapper", "HistoryWrapperObsDict", "MaskVelocityWrapper", "TruncatedOnSuccessWrapper"),
                "YAMLCompatResizeObservation",
            )
        ),
        *(
            f"stable_baselines3.common.atari_wrappers.{name}"
            for name in (
                *("AtariWrapper", "ClipRewardEnv", "EpisodicLifeEnv", "FireResetEnv", "MaxAndSkipEnv", "NoopResetEnv"),
                *("StickyActionEnv", "WarpFrame"),
            )
        ),
        *(
            f"gymnasium.wrappers.{name}"
            for name in (
                *("ClipAction", "ClipReward", "DelayObservation", "FlattenObservation", "FrameStackObservation"),
                *("GrayscaleObservation", "MaxAndSkipObservation", "RescaleAction", "RescaleObservation"),
                *("ResizeObservation", "StickyAction", "TimeAwareObservation", "TimeLimit"),
            )
        ),
        "gymnasium.wrappers.transform_observation.GrayscaleObservation",
        "minigrid.wrappers.FlatObsWrapper",
        "minigrid.wrappers.ImgObsWrapper",
        "sb3_contrib.common.wrappers.TimeFeatureWrapper",
        # RestartingEnv is none: it builds its environment, and the RL Zoo gives a wrapper one that is built
        "sb3_ppo_plus.ResumableEnv",
        "sb3_ppo_plus.masking.MaskFromInfo",
    }
)
#: Wrappers of vectorised environments that a log folder may name
VEC_ENV_WRAPPERS = frozenset(
    f"stable_baselines3.common.vec_env.{name}"
    for name in ("VecCheckNan", "VecExtractDictObs", "VecFrameStack", "VecTransposeImage")
)


def check_plain(value: object, name: str, key: str = "") -> None:
    """Refuse all but numbers, flags, None, lists and mappings of them, and strings that are no paths.

    :param value: what a file of the folder holds
    :param name: what to call it in messages
    :param key: the name of the argument that it is, which may have limits
    :raises UntrustedFileError: for what is not plain, or exceeds a limit
    """
    unchecked: list[tuple[str, object]] = [(key, value)]
    n_values = 0
    while unchecked:
        key, item = unchecked.pop()
        n_values += 1
        is_plain = (
            _PLAIN_STRING.fullmatch(item) if isinstance(item, str) else item is None or isinstance(item, int | float)
        )
        if isinstance(item, dict):
            for inner, member in item.items():
                unchecked.extend([(key, inner), (str(inner), member)])
        elif isinstance(item, list):
            unchecked.extend((key, member) for member in item)
        elif not is_plain:
            raise UntrustedFileError(
                f"{name} holds {short(item)}: only numbers, flags, None and names are taken from the folder"
            )
        elif isinstance(item, int | float):
            _check_number(item, name, key)
        # A list may hold itself
        if n_values > MAX_VALUES:
            raise UntrustedFileError(f"{name} holds more than {MAX_VALUES} values")


def _check_number(value: float, name: str, key: str) -> None:
    """Refuse integers that would take for ever or fill the memory, such as a FrameSkip of 10**12."""
    largest = MAX_INTEGER
    groups = ((_REPEATS, MAX_REPEATS), (_NOOPS, MAX_NOOPS), (_STACKED, MAX_STACKED), (_SHAPES, MAX_PIXELS))
    for keys, limit in (*groups, (_STEPS, MAX_STEPS)):
        if key in keys:
            largest = limit
    is_integer = isinstance(value, int) or value.is_integer()
    if is_integer and abs(value) > largest:
        raise UntrustedFileError(
            f"{name}: {key or 'a number'} must be in [-{largest}, {largest}], got {short(value)}. With --trust, enjoy "
            "takes larger ones"
        )


def _check_product(members: dict[str, Any], path: Path) -> None:
    """Refuse wrappers inside wrappers whose repeats, stacks or pixels multiply."""
    repeats, stacked = _product(members, _REPEATS), _product(members, _STACKED)
    pixels = _product(members, _SHAPES)
    for keys, product, largest in (
        (_REPEATS, repeats, MAX_REPEATS),
        (_STACKED, stacked, MAX_STACKED),
        ((*_STACKED, *_SHAPES), stacked * pixels, MAX_STACKED_PIXELS),
    ):
        if product > largest:
            raise UntrustedFileError(f"{path}: {', '.join(keys)} multiply to {product}; at most {largest} is allowed")


def _product(members: dict[str, Any], keys: tuple[str, ...]) -> int:
    product = 1
    unchecked: list[tuple[object, object]] = list(members.items())
    while unchecked:
        key, item = unchecked.pop()
        if isinstance(item, dict):
            unchecked.extend(item.items())
        elif isinstance(item, list):
            unchecked.extend((key, member) for member in item)
        elif key in keys and isinstance(item, int | float):
            product = max(product * int(item), product)
    return product


def checked_env_kwargs(members: dict[str, Any], path: Path, key: str = "env_kwargs") -> dict[str, Any] | None:
    """Return the arguments of the environment that a file of the folder holds.

    :param members: the file's members
    :param path: the file, for messages
    :param key: the name of the member
    :raises UntrustedFileError: if they are not plain
    """
    kwargs = members.get(key)
    if not isinstance(kwargs, dict | None):
        raise UntrustedFileError(f"{path}: {key} must be a mapping, got {short(kwargs)}")
    check_plain(kwargs, f"{path}: {key}")
    return kwargs


def _check_wrappers(value: object, allowed: frozenset[str], name: str) -> None:
    entries = value if isinstance(value, list) else [value]
    if len(entries) > MAX_WRAPPERS:
        raise UntrustedFileError(f"{name} has {len(entries)} wrappers; at most {MAX_WRAPPERS} are allowed")
    for entry in entries:
        wrapper, kwargs = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if wrapper is not None and (not isinstance(wrapper, str) or wrapper not in allowed):
            raise UntrustedFileError(f"{name}: {short(wrapper)} is none of {', '.join(sorted(allowed))}")
        if not isinstance(kwargs, dict):
            raise UntrustedFileError(f"{name}: arguments of {wrapper} must be a mapping, got {short(kwargs)}")
        check_plain(kwargs, f"{name}: {wrapper}")


def read_hyperparams(stats_path: str, **_: object) -> tuple[dict[str, Any], str | None]:
    """What ``enjoy`` needs of a run's config.yml; the RL Zoo's ``get_saved_hyperparams``, without evaluating anything.

    :param stats_path: folder of config.yml
    :return: normalize, env_kwargs, frame_stack and wrappers; and the folder, or None where there is none
    :raises UntrustedFileError: if one of these is not plain, or a wrapper is not in the lists above
    """
    path = Path(stats_path) / "config.yml"
    if not path.parent.is_dir():
        return {}, None
    members = read_yaml(path) if os.path.lexists(path) else {}
    normalize, frame_stack = members.get("normalize", False), members.get("frame_stack", 0)
    if not isinstance(normalize, bool | str | dict):
        raise UntrustedFileError(f"{path}: normalize must be True, False or settings, got {short(normalize)}")
    if type(frame_stack) is not int or not 0 <= frame_stack <= MAX_STACKED:
        raise UntrustedFileError(
            f"{path}: frame_stack must be an integer in [0, {MAX_STACKED}], got {short(frame_stack)}"
        )
    hyperparams: dict[str, Any] = {"normalize": bool(normalize), "frame_stack": frame_stack}
    env_kwargs = checked_env_kwargs(members, path)
    if env_kwargs is not None:
        hyperparams["env_kwargs"] = env_kwargs
    for key, allowed in (("env_wrapper", ENV_WRAPPERS), ("vec_env_wrapper", VEC_ENV_WRAPPERS)):
        if key in members:
            _check_wrappers(members[key], allowed, f"{path}: {key}")
            hyperparams[key] = members[key]
    _check_product(hyperparams, path)
    return hyperparams, stats_path


@contextmanager
def enjoying_without_trust(enjoy: Any) -> Iterator[None]:  # noqa: ANN401  # a module, whose attributes are replaced
    """Have ``enjoy`` read the log folder by the functions of this module.

    :param enjoy: ``rl_zoo3.enjoy``
    """
    create_test_env: Callable[..., VecEnv] = enjoy.create_test_env

    def create(env_id: str, *, stats_path: str | None, hyperparams: dict[str, Any], **kwargs: Any) -> VecEnv:
        env = create_test_env(env_id, stats_path=None, hyperparams=hyperparams, **kwargs)
        if stats_path is None:
            return env
        if hyperparams["normalize"]:
            env = _normalized(env, Path(stats_path) / STATISTICS)
        return VecFrameStack(env, hyperparams["frame_stack"]) if hyperparams["frame_stack"] else env

    def load_args(file: Any, Loader: object) -> dict[str, Any]:  # noqa: ANN401  # an open file; yaml.load's name
        path = Path(file.name)
        return {"env_kwargs": checked_env_kwargs(read_yaml(path), path)}

    replaced = {
        "create_test_env": create,
        "get_saved_hyperparams": read_hyperparams,
        "yaml": SimpleNamespace(load=load_args, UnsafeLoader=None),
    }
    with with_members(enjoy, replaced):
        yield


def _normalized(env: VecEnv, path: Path) -> VecNormalize:
    if not path.is_file():
        raise UntrustedFileError(f"{path} is missing: the environment was normalised, and only a pickle may say how")
    normalize = load_vec_normalize(path, env)
    # As the RL Zoo does for its own
    normalize.training = normalize.norm_reward = False
    return normalize


@contextmanager
def saving_statistics_twice() -> Iterator[None]:
    """Have every ``VecNormalize.save`` also write what :func:`load_vec_normalize` reads, beside its pickle."""
    save = VecNormalize.save

    def save_both(self: VecNormalize, save_path: str) -> None:
        save(self, save_path)
        if type(self) is VecNormalize:
            save_vec_normalize(self, Path(save_path).with_suffix(".json"))

    VecNormalize.save = save_both  # type: ignore[method-assign]  # the RL Zoo has no other hook
    try:
        yield
    finally:
        VecNormalize.save = save  # type: ignore[method-assign]  # restored
