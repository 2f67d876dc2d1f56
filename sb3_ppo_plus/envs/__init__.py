"""Environments: restarts, dead workers, masks from infos, checks of their output and of their wrappers."""
