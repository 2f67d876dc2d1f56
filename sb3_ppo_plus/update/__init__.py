"""The update of the policy from a rollout: losses, gradient steps, learning rates."""
