"""Training in several processes, and in parts."""

from sb3_ppo_plus.distributed.process_group import share_of

__all__ = ["share_of"]
