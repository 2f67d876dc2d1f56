"""YAML of the RL Zoo: plain values, and nothing built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.regular_files import read_regular_file
from sb3_ppo_plus.untrusted.strict_json import short

#: PyYAML reads about this much in a second; the files of the RL Zoo have two or three thousand bytes
MAX_YAML_BYTES = 2**15
#: Characters of a number
MAX_NUMBER_LENGTH = 64


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

    def construct_yaml_int(self, node: Any) -> int:  # noqa: ANN401  # a node
        # Numbers in base 60, such as 1:30:00, take time that grows with the square of their length
        _check_length(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:  # noqa: ANN401  # a node
        _check_length(node)
        return super().construct_yaml_float(node)


def _check_length(node: yaml.Node) -> None:
    if len(node.value) > MAX_NUMBER_LENGTH:
        problem = f"a number has {len(node.value)} characters"
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _ordered_dict(loader: yaml.SafeLoader, node: Any) -> Any:  # noqa: ANN401  # a node, and what it holds
    (pairs,) = loader.construct_sequence(node, deep=True)
    return dict(pairs)


def _tuple(loader: yaml.SafeLoader, node: Any) -> Any:  # noqa: ANN401  # the same
    return loader.construct_sequence(node)


def _not_plain(loader: yaml.SafeLoader, node: Any) -> _NotPlain:  # noqa: ANN401  # a node
    return _NotPlain(short(node.tag))


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)
_PlainLoader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _ordered_dict)
_PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
_PlainLoader.add_constructor(None, _not_plain)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of the RL Zoo without building any object in it.

    :param path: the file, at most 32 KiB
    :raises UntrustedFileError: if it holds no YAML, or no mapping of names; if it is no regular file
    """
    text = read_regular_file(path, MAX_YAML_BYTES)
    try:
        members = yaml.load(text, Loader=_PlainLoader)
    except Exception as error:
        # PyYAML's constructors raise many types of errors
        raise UntrustedFileError(f"{path} is no plain YAML: {type(error).__name__}: {error}") from error
    if not isinstance(members, dict) or not all(isinstance(key, str) for key in members):
        raise UntrustedFileError(f"{path} holds no mapping of names")
    return members
