"""Training in several processes, and in parts."""

from sb3_ppo_plus.distributed.process_group import share_of
from sb3_ppo_plus.distributed.ray_report import RayTrainReport

__all__ = ["RayTrainReport", "share_of"]
