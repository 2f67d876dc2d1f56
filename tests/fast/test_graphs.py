"""Only those who compile pay for it, and only once for all processes."""

import subprocess
import sys

import cloudpickle
import pytest
import torch as th
from environments import make_env
from torch._dynamo.utils import counters

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast.tracing import trace

# As small as in test_compiled_step.py
SETTINGS = {"n_steps": 16, "batch_size": 16, "seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}


def build(*, compile: bool = True) -> PPOPlus:
    return PPOPlus("MlpPolicy", make_env(2), compile=compile, **SETTINGS)


def assert_close(first: PPOPlus, second: PPOPlus) -> None:
    for expected, actual in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        th.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("error:compile=True")
def test_every_graph_is_found_in_pytorchs_cache_the_second_time() -> None:
    build().learn(64)
    counters.clear()
    model = build().learn(64)
    n_graphs = model._execution.gradient_step.n_compilations + model._execution.compiled_actor.n_compilations
    assert n_graphs == 3
    found = {name: n for name, n in counters["inductor"].items() if name.startswith("fxgraph_cache")}
    assert found == {"fxgraph_cache_hit": n_graphs}


def test_a_model_that_does_not_compile_does_not_load_inductor() -> None:
    # TorchInductor takes as long to import as all the rest, and a third of its memory
    code = """
import sys
from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast import replays
replays.REPLAY_AFTER = 2
model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(128)
assert model._execution.gradient_step.replays.n_replays == 1
assert "torch._inductor.compile_fx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.filterwarnings("error:compile=True")
def test_a_compiled_model_is_pickled_without_its_graphs_and_trains_on() -> None:
    model = build().learn(64)
    twin = cloudpickle.loads(cloudpickle.dumps(model))
    for one in (model, twin):
        one.set_random_seed(1)
        one.learn(64)
    assert twin._execution.gradient_step.n_compilations == 1
    # The copy's first step is eager
    assert_close(model, twin)


@pytest.mark.filterwarnings("error:compile=True")
def test_weights_of_another_layout_than_the_graphs_were_compiled_for_get_graphs_of_their_own() -> None:
    models = [build(compile=compile) for compile in (False, True)]
    for model in models:
        model.set_random_seed(0)
        model.learn(64)
        weight = model.policy.mlp_extractor.policy_net[0].weight
        weight.data = weight.data.t().contiguous().t()
        model.learn(64)
    assert models[1]._execution.compiled_actor.n_compilations == 4
    assert_close(*models)


def n_compilations(model: PPOPlus) -> int:
    return sum(part.n_compilations for part in (model._execution.gradient_step, model._execution.compiled_actor))


@pytest.mark.usefixtures("graphs_without_code")
def test_a_hook_that_is_removed_again_costs_no_compilation() -> None:
    model = build().learn(64)
    n_before = n_compilations(model)
    handle = model.policy.value_net.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a module has a hook"):
        model.learn(64)
    handle.remove()
    model.learn(64)
    assert n_compilations(model) == n_before == 3
    assert model._execution.gradient_step._graphs.is_usable


@pytest.mark.usefixtures("graphs_without_code")
def test_a_tensor_that_is_replaced_and_is_no_parameter_or_buffer_ends_the_graphs() -> None:
    model = build()
    model.policy.scale = th.ones(1)
    model.learn(64)
    model.policy.scale = th.ones(1)
    with pytest.warns(UserWarning, match="neither parameter nor buffer"):
        model.learn(64)
    assert model._execution.compiled_actor.has_given_up
    assert n_compilations(model) == 3


def test_tracing_draws_no_random_numbers() -> None:
    # As an operation does of which PyTorch knows no fake form, on CUDA: it is run
    def draws(inputs: th.Tensor) -> th.Tensor:
        th.default_generator.manual_seed(int(th.initial_seed()) + 1)
        return inputs + 1

    before = th.get_rng_state()
    trace(draws, [th.zeros(2)], th.nn.Identity())
    assert th.equal(th.get_rng_state(), before)
