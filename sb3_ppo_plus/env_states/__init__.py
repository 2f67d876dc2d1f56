"""The state of environments, of their wrappers and of random generators, as plain values."""
