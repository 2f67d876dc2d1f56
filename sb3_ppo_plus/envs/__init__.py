"""Environments: in batches, restarts, dead workers, masks from infos, checks of their output and of their wrappers."""

from sb3_ppo_plus.envs.simulators.brax_vec_env import BraxVecEnv
from sb3_ppo_plus.envs.simulators.gymnasium_tensors import GymnasiumTensorVecEnv
from sb3_ppo_plus.envs.simulators.rsl_rl_vec_env import RslRlVecEnv
from sb3_ppo_plus.envs.simulators.simulator_log import SimulatorLog
from sb3_ppo_plus.envs.tensor_vec_env import TensorStep, TensorVecEnv
from sb3_ppo_plus.envs.tensor_vec_normalize import TensorVecNormalize
from sb3_ppo_plus.envs.vector_envs import as_vec_env

__all__ = [
    "BraxVecEnv",
    "GymnasiumTensorVecEnv",
    "RslRlVecEnv",
    "SimulatorLog",
    "TensorStep",
    "TensorVecEnv",
    "TensorVecNormalize",
    "as_vec_env",
]
