"""A plugin of pytest for gpu_check.py: models that tests put on the CPU are put on the device $CHECK_DEVICE instead."""

import os

import torch as th
from stable_baselines3.common import base_class, utils

_get_device = utils.get_device


def get_device(device: th.device | str = "auto") -> th.device:
    """Stand in for SB3's function of this name."""
    return _get_device(os.environ["CHECK_DEVICE"] if str(device) in ("cpu", "auto") else device)


base_class.get_device = get_device
