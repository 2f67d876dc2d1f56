"""Action masks: where they come from, whether they are used, and evaluation with them."""

from sb3_ppo_plus.envs.mask_from_info import MaskFromInfo

__all__ = ["MaskFromInfo"]
