"""What environments need: restarts, dead workers, checks of their output."""
