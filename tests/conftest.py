"""What all tests share: one thread, as networks are small; no display; and no switch that a test leaves behind."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
# TorchInductor compiles no graph twice, in no later run either: the names of its files are hashes of what is compiled,
# of its settings and of its version
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache/inductor"))

import pytest
import torch as th
from gpu_checks.capture import PretendedReplay
from hypothesis import HealthCheck, settings
from torch.distributions import Distribution

from sb3_ppo_plus.fast import captured, execution, graphs, replays
from sb3_ppo_plus.rollout.actor import RolloutActor

# Their asserts say what they compared, as those of tests do
pytest.register_assert_rewrite(
    *("differential.comparing", "environments", "models", "states", "trained_alike"),
    *("altered_files", "changed_training", "compiled_like_sb3", "interrupted_runs"),
)

th.set_num_threads(1)

# A loaded machine takes longer
settings.register_profile("without_clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without_clock")

TESTS = Path(__file__).resolve().parent
# Files and folders whose tests are marked "quick" (make quick). They test the core: the bits of SB3, the losses, the
# gradient step, the policies, the buffers, and what users may pass.
QUICK = (
    "policies",
    "saving/test_described_spaces.py",
    "test_argument_checks.py",
    "test_attributes.py",
    "test_buffers.py",
    "test_callback_hooks.py",
    "test_house.py",
    "test_invariants.py",
    "test_logging.py",
    "test_ppo_plus.py",
    "test_sb3_equality.py",
    "test_sb3_equality_over_time.py",
    "test_schedules.py",
    "test_trees.py",
    "update",
)
# Words in the names of tests and files there that are not quick: compiling takes seconds
NOT_QUICK = ("compile", "graph", "inductor", "test_a_transformer_", "test_changes_")


def pytest_collection_modifyitems(items):
    missing = [part for part in QUICK if not (TESTS / part).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py: QUICK names {', '.join(missing)}, which do not exist")
    for item in items:
        is_core = any(item.path.is_relative_to(TESTS / part) for part in QUICK)
        if is_core and not any(word in item.nodeid for word in NOT_QUICK):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def checks_of_distributions(monkeypatch):
    """The first torch.compile of a process turns off, for good, the checks that find NaN."""
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)


@pytest.fixture(autouse=True)
def one_thread():
    """Forks of a process in which PyTorch has more threads would wait for those."""
    yield
    if th.get_num_threads() != 1:
        th.set_num_threads(1)


@pytest.fixture
def graphs_without_code(monkeypatch):
    """Compiled graphs run operation by operation: for tests of when and of what they are made, not of their code.

    TorchInductor takes seconds for each.
    """
    monkeypatch.setattr(graphs, "_generate_code", lambda graph, options: graph)


@pytest.fixture
def captures(monkeypatch, graphs_without_code):
    """Compiled graphs are captured and replayed as on a GPU."""
    monkeypatch.setitem(captured.REPLAYS, "cpu", PretendedReplay)


@pytest.fixture
def replayed_after_a_while(monkeypatch):
    """Make the first minibatches and steps eager, and replay the others if they can be recorded."""
    monkeypatch.setattr(replays, "REPLAY_AFTER", 3)


@pytest.fixture
def acts_eagerly(monkeypatch):
    """Record no actor: for tests of updates alone. A recording takes as long as 100 eager steps."""
    monkeypatch.setattr(execution, "ReplayedActor", lambda policy, users_code: RolloutActor(policy))
