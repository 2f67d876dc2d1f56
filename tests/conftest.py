"""What all tests share: one thread, as networks are small; no display; and no switch that a test leaves behind."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import pytest
import torch as th
from torch.distributions import Distribution

from sb3_ppo_plus.fast import graphs

# Their asserts say what they compared, as those of tests do
pytest.register_assert_rewrite("differential.comparing", "environments", "models", "states")

th.set_num_threads(1)


@pytest.fixture(autouse=True)
def checks_of_distributions(monkeypatch):
    """The first torch.compile of a process turns off, for good, the checks that find NaN."""
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)


@pytest.fixture
def graphs_without_code(monkeypatch):
    """Compiled graphs run operation by operation: for tests of when and of what they are made, not of their code.

    TorchInductor takes seconds for each.
    """
    monkeypatch.setattr(graphs, "_generate_code", lambda graph, options: graph)
