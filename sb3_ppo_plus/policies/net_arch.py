"""Sizes of networks by name."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from sb3_ppo_plus.argument_checks import did_you_mean

#: The sizes that the RL Zoo gives these names. Its Optuna studies store the name
NET_ARCHS: dict[str, dict[str, list[int]]] = {
    "tiny": {"pi": [64], "vf": [64]},
    "small": {"pi": [64, 64], "vf": [64, 64]},
    "medium": {"pi": [256, 256], "vf": [256, 256]},
}


def resolve_net_arch(net_arch: Any) -> Any:  # noqa: ANN401  # SB3 takes several types
    """Replace a registered name by the layers that it stands for, and warn of keys that SB3 passes over in silence.

    :param net_arch: a key of ``NET_ARCHS``, or layers in SB3's form
    :return: layers in SB3's form
    :raises ValueError: for another name
    """
    unused = sorted(map(repr, net_arch.keys() - {"pi", "vf"})) if isinstance(net_arch, dict) else []
    if unused:
        # Without a key of its own, a network has no hidden layers
        warnings.warn(
            f"policy_kwargs: net_arch has the keys {', '.join(unused)}, which are not used; allowed: 'pi' and 'vf'",
            stacklevel=2,
        )
    if not isinstance(net_arch, str):
        return net_arch
    if net_arch not in NET_ARCHS:
        raise ValueError(
            f"policy_kwargs: net_arch must be a list of sizes, a dict with the lists 'pi' and 'vf', or one of "
            f"{list(NET_ARCHS)}, got {net_arch!r}{did_you_mean(net_arch, NET_ARCHS)}"
        )
    return copy.deepcopy(NET_ARCHS[net_arch])
