"""Saving and loading of PPO, with trust and without."""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any, Self

import torch as th
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv

from sb3_ppo_plus.saving.model_description import constructor_arguments
from sb3_ppo_plus.saving.safe_zip import opened_model
from sb3_ppo_plus.saving.untrusted_model import add_description, load_without_trust
from sb3_ppo_plus.update.scheduled_ppo import ScheduledPPO

# Set up again by _setup_model or learn, so not saved
REBUILT_ATTRIBUTES = (
    "_callback",
    "_compiled_actor",
    "_continuation",
    "_critic_lr_schedule",
    "_env_with_masks",
    "_grad_scaler",
    "_gradient_step",
    "_last_states",
    "_learning_rate_groups",
    "_log_interval",
    "_n_iterations",
    "_recorded_actor",
    "_reporter",
    "_restart_counter",
    "_scheduled_learning_rates",
    "_tb_log_name",
    "_update_end_said_stop",
    "_warned_of_no_masks",
    "last_checkpoint",
)


class SavedPPO(ScheduledPPO):
    """The part of :class:`PPOPlus` that saves and loads models."""

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trusted: bool = True,
        allow: Iterable[type] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model that PPOPlus or SB3's PPO saved; SB3's ``load``.

        A model of SB3's PPO keeps SB3's form of value clipping unless ``pessimistic_value_clip`` is given.

        :param trusted: True: as SB3, which runs whatever code the file holds. False: nothing is unpickled or imported
            by name; what the file's plain description lacks is an error. ``custom_objects`` and ``kwargs`` replace
            arguments that it holds, ``tensorboard_log`` is not taken from it
        :param allow: with ``trusted=False``, classes of your own that the description may name: policies, features
            extractors, activations, optimisers, rollout buffers, schedules that are dataclasses
        :param kwargs: constructor arguments to change
        :raises TypeError: for a keyword that is no argument of the constructor, or a class that ``allow`` can't hold
        :raises UntrustedFileError: a ValueError, with ``trusted=False``: if the file is damaged or hostile, or holds
            what only pickle can describe
        """
        allowed = set(constructor_arguments(cls)) - {"policy", "env"}
        unknown = sorted(kwargs.keys() - allowed)
        if unknown:
            raise TypeError(f"load() got unknown keyword arguments {unknown}; allowed: {sorted(allowed)}")
        if not trusted:
            replaced = {name: value for name, value in (custom_objects or {}).items() if name in allowed} | kwargs
            return load_without_trust(
                cls, path, env, device=device, allow=allow, print_system_info=print_system_info, replaced=replaced
            )
        if allow is not None:
            raise ValueError("allow is for trusted=False: with trusted=True every class is allowed")
        saved = _saved_attributes(path)
        if "pessimistic_value_clip" not in saved:
            kwargs.setdefault("pessimistic_value_clip", False)
        if "_built_for_masks" not in saved:
            kwargs["_built_for_masks"] = False
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save the model in a zip as SB3's ``save``, with a plain description for loading without trust."""
        archive = io.BytesIO()
        super().save(archive, exclude, include)
        add_description(archive, self, exclude or ())
        file = open_path(path, "w", verbose=0, suffix="zip")
        file.write(archive.getbuffer())
        if file is not path:
            file.close()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *REBUILT_ATTRIBUTES]


def _saved_attributes(path: str | pathlib.Path | io.BufferedIOBase) -> set[str]:
    """Names of a saved model's attributes; of a file that is no model, of which SB3's load tells more, none."""
    with opened_model(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return set(json.loads(archive.read("data")))
        except (zipfile.BadZipFile, KeyError, ValueError):
            return set()
