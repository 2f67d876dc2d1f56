"""Where two nested values differ, to the bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from sb3_ppo_plus.untrusted.strict_json import short


def first_difference(expected: Any, found: Any, name: str) -> str | None:  # noqa: ANN401  # any value
    """Say where two nested values differ first; NaN equals NaN, and True is not 1.

    :param expected: plain values, arrays and tensors
    :param found: the same of another time
    :param name: what to call the value
    :return: the part's name, what was expected, what was found; None: nothing differs
    """
    if expected is found:
        return None
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if expected.keys() != found.keys():
            return _difference_of_keys(expected, found, name)
        return _first((expected[key], found[key], f"{name}[{key!r}]") for key in expected)
    if isinstance(expected, list | tuple | deque) and type(expected) is type(found):
        if len(expected) != len(found):
            return f"{name} has {len(found)} parts, expected {len(expected)}"
        pairs = enumerate(zip(expected, found, strict=True))
        return _first(((a, b, f"{name}[{index}]") for index, (a, b) in pairs))
    return None if _are_same(expected, found) else f"{name} is {short(found)}, expected {short(expected)}"


def _difference_of_keys(expected: Mapping[Any, Any], found: Mapping[Any, Any], name: str) -> str:
    missing = [key for key in expected if key not in found]
    if missing:
        return f"{name} lacks {missing[0]!r}, which was there before"
    added = next(key for key in found if key not in expected)
    return f"{name} has {added!r} = {short(found[added])}, which was not there before"


def _first(parts: Any) -> str | None:  # noqa: ANN401  # triples of expected, found, name
    differences = (first_difference(*part) for part in parts)
    return next((difference for difference in differences if difference is not None), None)


def _are_same(expected: Any, found: Any) -> bool:  # noqa: ANN401  # any value
    if type(expected) is not type(found):
        return False
    if isinstance(expected, th.Tensor):
        expected, found = expected.detach().cpu(), found.detach().cpu()
        is_like = expected.dtype == found.dtype and expected.shape == found.shape
        return is_like and th.equal(_bits(expected), _bits(found))
    if isinstance(expected, np.ndarray | np.generic):
        if expected.dtype != found.dtype or expected.shape != found.shape:
            return False
        return bool(expected.tobytes() == found.tobytes())
    if isinstance(expected, float):
        return repr(expected) == repr(found)
    # What tells no content, such as a plain object, is equal only to itself
    return bool(expected == found)


def _bits(tensor: th.Tensor) -> th.Tensor:
    return tensor.contiguous().view(th.uint8) if tensor.dim() > 0 else tensor.reshape(1).view(th.uint8)
