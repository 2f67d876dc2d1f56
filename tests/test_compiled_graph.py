"""Compiling is paid for by those who compile, and once for all processes."""

import subprocess
import sys

import pytest
from envs import make_env
from torch._dynamo.utils import counters

from sb3_ppo_plus import PPOPlus


def build() -> PPOPlus:
    # As small as in test_compiled_step.py
    return PPOPlus(
        "MlpPolicy", make_env(2), n_steps=16, batch_size=16, policy_kwargs={"net_arch": [8]}, device="cpu", compile=True
    )


@pytest.mark.filterwarnings("error:compile=True")
def test_every_graph_is_found_in_pytorchs_cache_the_second_time() -> None:
    build().learn(64)
    counters.clear()
    model = build().learn(64)
    n_graphs = model._gradient_step.n_compilations + model._compiled_actor.n_compilations
    assert n_graphs == 3
    found = {name: n for name, n in counters["inductor"].items() if name.startswith("fxgraph_cache")}
    assert found == {"fxgraph_cache_hit": n_graphs}


def test_who_does_not_compile_does_not_load_inductor() -> None:
    # It takes as long to import, and a third of the memory, of all the rest
    code = """
import sys
from sb3_ppo_plus import PPOPlus, recording
recording.RECORD_AFTER = 2
model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(128)
assert model._gradient_step.recordings.n_recordings == 1
assert "torch._inductor.compile_fx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
