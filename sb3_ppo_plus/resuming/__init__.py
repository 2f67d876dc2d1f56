"""Checkpoints, from which a run goes on bit for bit."""
