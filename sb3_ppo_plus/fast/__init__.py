"""The fast paths: replays of recorded operations, and compiled graphs."""
