"""When compiled graphs are captured, what of them is copied, and what becomes of failures. No GPU is needed."""

import pytest
import torch as th
from gpu_checks.capture import PretendedReplay, replays_of
from gpu_checks.cases import CASES, ROLLOUT
from states import assert_same_training

from sb3_ppo_plus import torch_private
from sb3_ppo_plus.fast import captured, graphs
from sb3_ppo_plus.fast.effects import changed_inputs, obstacle
from sb3_ppo_plus.fast.tracing import trace

GENERATOR = th.Generator()


def build(name="box"):
    return CASES[name].build("cpu", compile=True)


@pytest.mark.parametrize("options", [{"triton.cudagraphs": False}, {"mode": "max-autotune-no-cudagraphs"}])
def test_an_option_turns_it_off(captures, options):
    model = CASES["box"].build("cpu", compile=options).learn(ROLLOUT * 3)
    assert model._execution.gradient_step.n_compilations == 1
    assert replays_of(model) == [0, 0]


@pytest.mark.parametrize("options", [True, {"triton.cudagraphs": True}, {"mode": "reduce-overhead"}])
def test_inductor_captures_nothing_itself(captures, monkeypatch, options):
    given = []
    monkeypatch.setattr(graphs, "_generate_code", lambda graph, options: given.append(options) or graph)
    model = CASES["box"].build("cpu", compile=options).learn(ROLLOUT * 3)
    assert min(replays_of(model)) > 0
    assert [one["triton.cudagraphs"] for one in given] == [False] * 3


class Failing(PretendedReplay):
    fails_at = "capture"

    def __init__(self, function, device):
        if self.fails_at == "capture":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        super().__init__(function, device)
        self.n_replays = 0

    def replay(self):
        self.n_replays += 1
        if self.fails_at == "replay" or self.n_replays == self.fails_at:
            # As PyTorch, which moves the generator before it launches
            if self.is_random:
                th.rand(1)
            raise RuntimeError("CUDA error: out of memory")
        super().replay()

    @staticmethod
    def free_bytes(device):
        return 2**10 if Failing.fails_at == "memory" else 2**33


@pytest.mark.parametrize("name", ["box", "beta"])
@pytest.mark.parametrize("fails_at", ["capture", "replay", "memory", 5])
@pytest.mark.usefixtures("graphs_without_code")
def test_a_failure_leaves_the_compiled_graphs_and_one_warning(monkeypatch, recwarn, fails_at, name):
    called = build(name).learn(ROLLOUT * 4)
    numbers = th.get_rng_state()
    monkeypatch.setitem(captured.REPLAYS, "cpu", Failing)
    monkeypatch.setattr(Failing, "fails_at", fails_at)
    recwarn.clear()
    replayed = build(name).learn(ROLLOUT * 4)
    assert_same_training(called, replayed)
    assert th.equal(numbers, th.get_rng_state())
    said = [str(one.message) for one in recwarn if "compile=True" in str(one.message)]
    assert len(said) == 1 and "compiled, but not as a CUDA graph" in said[0] and "\n" not in said[0]


# What a graph does with its inputs


def changed_by(function, n_inputs=2):
    return changed_inputs(trace(function, [th.ones(4, 4) for _ in range(n_inputs)], th.nn.Identity()))


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        (lambda a, b: a + b, set()),
        (lambda a, b: a.copy_(b), {0}),
        (lambda a, b: b.mul_(2) + a, {1}),
        (lambda a, b: a[1].view(2, 2).t().add_(1), {0}),
        (lambda a, b: a.split(2)[1].add_(b[0]), {0}),
        (lambda a, b: th.add(a, 1, out=b), {1}),
        (lambda a, b: (a + 1).mul_(2) + b.clone().zero_(), set()),
        (lambda a, b: th._foreach_add_([a, b], 1) or a.sum(), {0, 1}),
    ],
)
def test_what_a_graph_changes_is_read_from_its_operations(function, changed):
    assert changed_by(function) == changed


def compiled(function, *inputs, monkeypatch, said=None):
    monkeypatch.setattr(graphs, "_generate_code", lambda graph, options: graph)
    monkeypatch.setitem(captured.REPLAYS, "cpu", PretendedReplay)
    return graphs.compile_graph(function, inputs, th.nn.Identity(), report=(said if said is not None else []).append)


def test_what_is_changed_is_changed_where_the_caller_has_it(monkeypatch):
    def function(total, x):
        total.add_(x)
        return (total * 2,)

    totals = [th.zeros(3) for _ in range(3)]
    graph = compiled(function, totals[0], th.ones(3), monkeypatch=monkeypatch)
    kept, expected = [], []
    for n, index in enumerate([0, 0, 0, 1, 1, 2, 0, 2, 1]):
        sums = [total.clone() for total in totals]
        x = th.full((3,), float(n + 1))
        sums[index] += x
        kept.append(graph(totals[index], x)[0])
        expected.append(sums[index] * 2)
        assert all(map(th.equal, totals, sums))
    assert all(map(th.equal, kept, expected))
    assert graph.n_captures == 2


def test_a_changed_input_that_shares_memory_is_not_captured(monkeypatch):
    said = []

    def function(total, x):
        total.add_(x)
        return (total * 2,)

    memory = th.zeros(6)
    graph = compiled(function, memory[:3], memory[3:], monkeypatch=monkeypatch, said=said)
    for _ in range(4):
        graph(memory[:3], memory[3:].fill_(1))
    assert graph.n_replays == 0 and len(said) == 1
    assert memory.tolist() == [4, 4, 4, 1, 1, 1]


def test_an_input_that_is_changed_in_place_between_calls_is_read_again(monkeypatch):
    graph = compiled(lambda x: (x + 1,), th.ones(3), monkeypatch=monkeypatch)
    x = th.zeros(3)
    assert [float(graph(x.add_(1))[0][0]) for _ in range(5)] == [2, 3, 4, 5, 6]
    assert graph.n_replays == 4


def test_strides_are_kept(monkeypatch):
    def function(x):
        assert x.stride() == (1, 4)
        return (x.t() + 0,)

    graph = compiled(function, th.ones(4, 3).t().contiguous().t(), monkeypatch=monkeypatch)
    for _ in range(3):
        x = th.rand(3, 4).t()
        assert th.equal(graph(x)[0], x.t())


@pytest.mark.parametrize(
    ("function", "is_safe"),
    [
        (lambda x: (x + th.empty(3).normal_(),), True),
        (lambda x: (th.bernoulli(x),), True),
        (lambda x: (th.normal(x, x),), False),
        (lambda x: (th.multinomial(x, 2),), False),
        (lambda x: (x + th.rand(3, generator=GENERATOR),), False),
    ],
)
def test_only_known_random_operations_are_captured(monkeypatch, function, is_safe):
    said = []
    graph = compiled(function, th.full((3,), 0.5), monkeypatch=monkeypatch, said=said)
    assert isinstance(graph, captured.CapturedGraph) is is_safe
    assert (not said) is is_safe


def test_without_schemas_of_operations_nothing_is_captured(monkeypatch):
    said = []
    monkeypatch.setattr(torch_private, "SCHEMA", "_gone")
    graph = compiled(lambda x: (x + 1,), th.ones(3), monkeypatch=monkeypatch, said=said)
    assert not isinstance(graph, captured.CapturedGraph) and len(said) == 1


class OnTwoDevices(th.nn.Module):
    """Has constants on the CPU and on the device "meta", which stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.number, self.vector = th.tensor(2.0), th.ones(3)


@pytest.mark.parametrize("name", ["number", "vector", None])
def test_what_computes_with_tensors_of_another_device_is_not_captured(name):
    module = OnTwoDevices()
    constant = getattr(module, name) if name else th.tensor(3.0)
    graph = trace(lambda x: (x * 2,), [th.ones(3)], th.nn.Identity())
    graph.register_buffer("constant", constant)
    on_device = [th.ones(3, device="meta")]
    for node in graph.graph.nodes:
        node.meta["val"] = on_device[0]
    assert (obstacle(graph, on_device, module) is None) is (name is None)
    assert obstacle(graph, [*on_device, th.tensor(1.0)], module) is not None
