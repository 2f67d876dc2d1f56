"""Adapters of simulators that step in tensors: rsl_rl, Isaac Lab, ManiSkill, Brax."""
