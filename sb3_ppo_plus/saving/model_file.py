"""What PPOPlus's ``load`` and ``save`` add to SB3's."""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.save_util import open_path

from sb3_ppo_plus import policies
from sb3_ppo_plus.argument_checks import did_you_mean
from sb3_ppo_plus.saving.model_description import constructor_arguments
from sb3_ppo_plus.saving.untrusted_model import add_description
from sb3_ppo_plus.untrusted.safe_zip import opened_model

File = str | pathlib.Path | io.BufferedIOBase

_POLICY_CLASSES: set[type] = {getattr(policies, name) for name in policies.__all__}
# A signal handler may save while another save is going on
_naming = RLock()


def loading_arguments(
    cls: type[PPO],
    path: File,
    custom_objects: dict[str, Any] | None,
    kwargs: dict[str, Any],
    *,
    trusted: bool,
    allow: Iterable[type] | None,
) -> dict[str, Any]:
    """Return the arguments that replace those of a saved model, from what the user gave to ``load``.

    :param cls: class of the model
    :param path: the file
    :param custom_objects: SB3's argument; without trust it replaces arguments of the constructor
    :param kwargs: arguments of the constructor to replace
    :param trusted: whether the file may be unpickled
    :param allow: classes that a description may name
    :raises TypeError: for a keyword that is no argument of the constructor
    :raises ValueError: for ``allow`` with trust
    """
    allowed = set(constructor_arguments(cls)) - {"policy", "env"}
    unknown = sorted(kwargs.keys() - allowed)
    if unknown:
        raise TypeError(
            f"load() got unknown keyword arguments {unknown}; allowed: {sorted(allowed)}"
            f"{did_you_mean(unknown[0], allowed)}"
        )
    if not trusted:
        return {name: value for name, value in (custom_objects or {}).items() if name in allowed} | kwargs
    if allow is not None:
        raise ValueError("allow is for trusted=False: with trusted=True every class is allowed")
    return values_of_other_releases(path) | kwargs


def values_of_other_releases(path: File) -> dict[str, Any]:
    """Return values of attributes that a saved model lacks, because SB3 or an older release wrote it.

    :param path: the file
    :return: values by name; with them the model goes on as it would in the release that saved it
    """
    saved = _saved_attributes(path)
    values: dict[str, Any] = {"pessimistic_value_clip": False, "_built_for_masks": False}
    return {name: value for name, value in values.items() if name not in saved}


@contextmanager
def policies_named_by_package() -> Iterator[None]:
    """Let pickle name a policy's class as ``sb3_ppo_plus.policies.CLASS``: all releases find it there.

    Pickle takes the name of a class from ``__module__``. Outside of this it is the module with the definition, where
    ``inspect`` and ``typing`` look for source and types.
    """
    with _naming:
        modules = {policy_class: policy_class.__module__ for policy_class in _POLICY_CLASSES}
        try:
            for policy_class in modules:
                policy_class.__module__ = policies.__name__
            yield
        finally:
            for policy_class, module in modules.items():
                policy_class.__module__ = module


def write_model(archive: io.BytesIO, path: File, model: PPO, exclude: Iterable[str]) -> None:
    """Add a model's plain description to the zip that SB3's ``save`` made, and write it.

    Of several processes that train together, only the first one writes a file: all hold the same model.

    :param archive: the zip
    :param path: where to write it
    :param model: the model in it
    :param exclude: names of attributes that were not saved
    """
    add_description(archive, model, exclude)
    a_ppo_plus: Any = model
    ranks = a_ppo_plus._parts.ranks
    if ranks.rank > 0 and not ranks.has_failed and isinstance(path, str | pathlib.Path):
        return
    file = open_path(path, "w", verbose=0, suffix="zip")
    file.write(archive.getbuffer())
    if file is not path:
        file.close()


def _saved_attributes(path: File) -> set[str]:
    """Return the names of a saved model's attributes. For other files there are none, and SB3's load has the error."""
    try:
        with opened_model(path) as file, zipfile.ZipFile(file) as archive:
            return set(json.loads(archive.read("data")))
    except (zipfile.BadZipFile, KeyError, ValueError):
        return set()
