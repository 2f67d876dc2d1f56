"""What all tests share: small networks want one thread, and there is no display."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import torch as th

th.set_num_threads(1)
