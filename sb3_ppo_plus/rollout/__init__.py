"""Acting in a rollout."""
