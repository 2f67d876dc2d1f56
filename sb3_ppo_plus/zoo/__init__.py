"""PPOPlus in the RL Zoo: registration, hyperparameters and the commands of ``python -m sb3_ppo_plus.zoo``.

The RL Zoo (``rl_zoo3``) is an optional dependency, imported only when something here is called.
Its own ``enjoy`` evaluates and unpickles what lies in the log folder; ours and ``resume`` do so only with ``--trust``.
"""

from sb3_ppo_plus.zoo.commands import main
from sb3_ppo_plus.zoo.hyperparams import (
    ALGO,
    convert_ppo_plus_params,
    hyperparams_file,
    load_hyperparams,
    sample_ppo_plus_params,
)
from sb3_ppo_plus.zoo.registration import SCHEDULED_ARGUMENTS, register

__all__ = [
    "ALGO",
    "SCHEDULED_ARGUMENTS",
    "convert_ppo_plus_params",
    "hyperparams_file",
    "load_hyperparams",
    "main",
    "register",
    "sample_ppo_plus_params",
]
