"""The RL Zoo's ``enjoy`` without trust in the log folder, and what ``train`` writes for it.

The RL Zoo itself evaluates and unpickles what lies there, and imports the classes that it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.saving.vec_normalize import load_vec_normalize, save_vec_normalize
from sb3_ppo_plus.strict_json import short

STATISTICS = "vecnormalize.json"
MAX_YAML_BYTES = 2**20
MAX_VALUES = 1000
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


class _NotPlain:
    """Stands for what a YAML file holds beside plain values; only an error where it is needed."""

    def __init__(self, tag: str) -> None:
        self.tag = tag

    def __repr__(self) -> str:
        return f"<{self.tag}>"


class _PlainLoader(yaml.SafeLoader):
    """Plain values, and the OrderedDict and tuples that the RL Zoo writes."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merges of merges grow exponentially, and the RL Zoo writes none
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(problem="a mapping merges others", problem_mark=node.start_mark)


def _ordered_dict(loader: yaml.SafeLoader, node: Any) -> Any:  # noqa: ANN401  # a node, and what it holds
    (pairs,) = loader.construct_sequence(node, deep=True)
    return dict(pairs)


def _tuple(loader: yaml.SafeLoader, node: Any) -> Any:  # noqa: ANN401  # the same
    return loader.construct_sequence(node)


def _not_plain(loader: yaml.SafeLoader, node: Any) -> _NotPlain:  # noqa: ANN401  # a node
    return _NotPlain(short(node.tag))


_PlainLoader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _ordered_dict)
_PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
_PlainLoader.add_constructor(None, _not_plain)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of the RL Zoo without building any object in it.

    :param path: the file, at most 1 MiB
    :raises UntrustedFileError: if it holds no YAML, or no mapping of names
    """
    with path.open("rb") as file:
        text = file.read(MAX_YAML_BYTES + 1)
    if len(text) > MAX_YAML_BYTES:
        raise UntrustedFileError(f"{path} has more than {MAX_YAML_BYTES} bytes")
    try:
        members = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UntrustedFileError(f"{path} is no plain YAML: {error}") from error
    if not isinstance(members, dict) or not all(isinstance(key, str) for key in members):
        raise UntrustedFileError(f"{path} holds no mapping of names")
    return members


def _check_plain(value: object, name: str) -> None:
    """Refuse all but numbers, flags, None, lists and mappings of them, and strings that are no paths."""
    unchecked, n_values = [value], 0
    while unchecked:
        item = unchecked.pop()
        n_values += 1
        is_plain = (
            _PLAIN_STRING.fullmatch(item) if isinstance(item, str) else item is None or isinstance(item, int | float)
        )
        if isinstance(item, dict):
            unchecked.extend([*item.keys(), *item.values()])
        elif isinstance(item, list):
            unchecked.extend(item)
        elif not is_plain:
            raise UntrustedFileError(
                f"{name} holds {short(item)}: only numbers, flags, None and names are taken from the folder"
            )
        # A list may hold itself
        if n_values > MAX_VALUES:
            raise UntrustedFileError(f"{name} holds more than {MAX_VALUES} values")


def _checked_env_kwargs(members: dict[str, Any], path: Path) -> dict[str, Any] | None:
    kwargs = members.get("env_kwargs")
    if not isinstance(kwargs, dict | None):
        raise UntrustedFileError(f"{path}: env_kwargs must be a mapping, got {short(kwargs)}")
    _check_plain(kwargs, f"{path}: env_kwargs")
    return kwargs


def _check_wrappers(value: object, allowed: frozenset[str], name: str) -> None:
    for entry in value if isinstance(value, list) else [value]:
        wrapper, kwargs = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if wrapper is not None and (not isinstance(wrapper, str) or wrapper not in allowed):
            raise UntrustedFileError(f"{name}: {short(wrapper)} is none of {', '.join(sorted(allowed))}")
        if not isinstance(kwargs, dict):
            raise UntrustedFileError(f"{name}: arguments of {wrapper} must be a mapping, got {short(kwargs)}")
        _check_plain(kwargs, f"{name}: {wrapper}")


def read_hyperparams(stats_path: str, **_: object) -> tuple[dict[str, Any], str | None]:
    """What ``enjoy`` needs of a run's config.yml; the RL Zoo's ``get_saved_hyperparams``, without evaluating anything.

    :param stats_path: folder of config.yml
    :return: normalize, env_kwargs, frame_stack and wrappers; and the folder, or None where there is none
    :raises UntrustedFileError: if one of these is not plain, or a wrapper is not in the lists above
    """
    path = Path(stats_path) / "config.yml"
    if not path.parent.is_dir():
        return {}, None
    members = read_yaml(path) if path.is_file() else {}
    normalize, frame_stack = members.get("normalize", False), members.get("frame_stack", 0)
    if not isinstance(normalize, bool | str | dict):
        raise UntrustedFileError(f"{path}: normalize must be True, False or settings, got {short(normalize)}")
    if type(frame_stack) is not int or not 0 <= frame_stack <= MAX_VALUES:
        raise UntrustedFileError(
            f"{path}: frame_stack must be an integer in [0, {MAX_VALUES}], got {short(frame_stack)}"
        )
    hyperparams: dict[str, Any] = {"normalize": bool(normalize), "frame_stack": frame_stack}
    env_kwargs = _checked_env_kwargs(members, path)
    if env_kwargs is not None:
        hyperparams["env_kwargs"] = env_kwargs
    for key, allowed in (("env_wrapper", ENV_WRAPPERS), ("vec_env_wrapper", VEC_ENV_WRAPPERS)):
        if key in members:
            _check_wrappers(members[key], allowed, f"{path}: {key}")
            hyperparams[key] = members[key]
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
        return {"env_kwargs": _checked_env_kwargs(read_yaml(path), path)}

    replaced = {
        "create_test_env": create,
        "get_saved_hyperparams": read_hyperparams,
        "yaml": SimpleNamespace(load=load_args, UnsafeLoader=None),
    }
    originals = {name: getattr(enjoy, name) for name in replaced}
    try:
        for name, replacement in replaced.items():
            setattr(enjoy, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(enjoy, name, original)


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
