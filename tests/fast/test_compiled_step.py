"""Invariant 4: compile=True changes no semantics, compiles once, and leaves to eager mode what a graph cannot do."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import models
import numpy as np
import pytest
import torch as th
from environments import make_env
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus
from sb3_ppo_plus.fast.compiled_step import CompiledGradientStep
from sb3_ppo_plus.fast.graphs import MAX_COMPILATIONS, CompilationReporter, inductor_options

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
DISCRETE = spaces.Discrete(3)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
BOX = spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 3.0], np.float32))
TRANSFORMER = {"features_extractor_class": "transformer", "features_extractor_kwargs": {"d_model": 8, "n_layers": 1}}

CASES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any], str, dict[str, Any]]] = {
    "discrete, short last minibatch": (VECTOR, DISCRETE, "MlpPolicy", {"batch_size": 24}),
    "gaussian, schedules, value clipping, critic's learning rate": (
        VECTOR,
        BOX,
        "MlpPolicy",
        {
            "learning_rate": "lin_1e-2",
            "critic_learning_rate": "cos_3e-3",
            "ent_coef": "lin_0.01",
            "clip_range": "lin_0.2",
            "clip_range_vf": 0.1,
        },
    ),
    "beta, AdamW": (
        VECTOR,
        BOX,
        "MlpPolicy",
        {"policy_kwargs": {"action_dist": "beta", "optimizer_class": "adamw"}},
    ),
    "squashed gaussian, whose entropy is sampled": (
        VECTOR,
        BOX,
        "MlpPolicy",
        {"policy_kwargs": {"action_dist": "squashed_gaussian"}, "ent_coef": 0.1},
    ),
    "gSDE": (VECTOR, BOX, "MlpPolicy", {"use_sde": True, "sde_sample_freq": 4}),
    "squashed gSDE, RMSprop": (
        VECTOR,
        BOX,
        "MlpPolicy",
        {"use_sde": True, "policy_kwargs": {"squash_output": True, "optimizer_class": "rmsprop"}},
    ),
    "MultiDiscrete, SGD": (
        VECTOR,
        spaces.MultiDiscrete([2, 3]),
        "MlpPolicy",
        {"policy_kwargs": {"optimizer_class": "sgd", "optimizer_kwargs": {"momentum": 0.9}}},
    ),
    "MultiBinary, target_kl": (
        VECTOR,
        spaces.MultiBinary(2),
        "MlpPolicy",
        {"target_kl": 1e-6, "learning_rate": 3e-3, "normalize_advantage": False},
    ),
    "Dict, separate extractors": (
        spaces.Dict({"image": IMAGE, "vector": VECTOR, "index": spaces.Discrete(3)}),
        spaces.Discrete(2),
        "MultiInputPolicy",
        {"policy_kwargs": {"share_features_extractor": False}},
    ),
    "CNN": (IMAGE, spaces.Discrete(2), "CnnPolicy", {}),
    "Transformer": (
        spaces.Box(-1, 1, (4, 3), np.float32),
        spaces.Discrete(2),
        "MlpPolicy",
        {"policy_kwargs": TRANSFORMER},
    ),
    "bf16": (VECTOR, DISCRETE, "MlpPolicy", {"amp": True, "learning_rate": 1e-3}),
}


# Most models act in two environments and learn in minibatches of one size. So several tests find their graphs in
# TorchInductor's cache on the disk
SETTINGS: dict[str, Any] = models.SETTINGS | {"n_steps": 16}


def build(
    policy: str | type[ActorCriticPlusPolicy] = "MlpPolicy",
    observation_space: spaces.Space[Any] = VECTOR,
    action_space: spaces.Space[Any] = DISCRETE,
    **settings: Any,
) -> PPOPlus:
    env = make_env(n_envs=2, observation_space=observation_space, action_space=action_space)
    policy_kwargs = {"net_arch": [8], **settings.pop("policy_kwargs", {})}
    return PPOPlus(policy, env, policy_kwargs=policy_kwargs, **{**SETTINGS, **settings})


def build_case(case: str, compile: bool | dict[str, Any]) -> PPOPlus:
    observation_space, action_space, policy, settings = CASES[case]
    return build(policy, observation_space, action_space, compile=compile, **settings)


@cache
def trained(case: str, *, compile: bool) -> PPOPlus:
    """A model after three updates. Several tests use it."""
    return build_case(case, compile).learn(3 * 32)


def parameters(model: PPOPlus) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


# TorchInductor takes about 10 s for the code of each. What they add, flat updates, masks of target_kl and several
# extractors, is traced, and runs operation by operation. ``make test-all`` generates their code too.
WITHOUT_CODE = (
    "squashed gSDE, RMSprop",
    "MultiDiscrete, SGD",
    "MultiBinary, target_kl",
    "Dict, separate extractors",
)

# Policies whose rollouts are evaluated at each step, in the graph that acts
LEARNED_FEATURES = ("Dict, separate extractors", "CNN", "Transformer")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.filterwarnings("error:compile=True")
def test_compiled_training_equals_eager_training_to_rounding(case: str, request: pytest.FixtureRequest) -> None:
    if case in WITHOUT_CODE:
        request.getfixturevalue("graphs_without_code")
    assert_trains_as_eager(case, trained(case, compile=True))


@pytest.mark.heavy
@pytest.mark.parametrize("case", WITHOUT_CODE)
@pytest.mark.filterwarnings("error:compile=True")
def test_generated_code_equals_eager_training_to_rounding(case: str) -> None:
    assert_trains_as_eager(case, build_case(case, compile=True).learn(3 * 32))


def assert_trains_as_eager(case: str, compiled: PPOPlus) -> None:
    eager = trained(case, compile=False)
    is_short = CASES[case][3].get("batch_size") == 24
    assert compiled._execution.gradient_step.n_compilations == 1 + is_short
    assert compiled._execution.compiled_actor.n_compilations == (1 if case in LEARNED_FEATURES else 2)
    # Autocast rounds each product to 8 bits, in whatever order the compiler chose
    tolerance = 5e-4 if case == "bf16" else 2e-5
    moved = (parameters(eager) - parameters(build_case(case, compile=False))).abs().max()
    assert moved > 5 * tolerance, "training moved too little to tell"
    assert (parameters(eager) - parameters(compiled)).abs().max() < tolerance
    for name in ("train/loss", "train/value_loss", "train/entropy_loss", "train/approx_kl", "train/grad_norm"):
        expected, actual = eager.logger.name_to_value[name], compiled.logger.name_to_value[name]
        assert actual == pytest.approx(expected, rel=2e-2 if case == "bf16" else 1e-3, abs=1e-4), name
    assert compiled.logger.name_to_value["train/n_epochs_done"] == eager.logger.name_to_value["train/n_epochs_done"]


@pytest.mark.usefixtures("graphs_without_code")
def test_target_kl_stops_the_compiled_update_where_it_stops_the_eager_one() -> None:
    eager, compiled = (trained("MultiBinary, target_kl", compile=compile) for compile in (False, True))
    assert eager.logger.name_to_value["train/early_stopped"] == 1, "the case proves nothing"
    assert compiled.logger.name_to_value["train/early_stopped"] == 1
    steps = [next(iter(model.policy.optimizer.state.values()))["step"].item() for model in (eager, compiled)]
    assert steps[0] == steps[1]


def test_nothing_is_compiled_after_the_first_update() -> None:
    counts = []

    class Count(BaseCallback):
        def on_update_end(self) -> bool:
            counts.append(
                (
                    self.model._execution.gradient_step.n_compilations,
                    self.model._execution.compiled_actor.n_compilations,
                )
            )
            evaluate_policy(self.model, make_env(3, observation_space=VECTOR, action_space=DISCRETE), n_eval_episodes=3)
            return True

        def _on_step(self) -> bool:
            return True

    kwargs = {"learning_rate": "lin_1e-3", "clip_range": "lin_0.2", "ent_coef": "lin_0.01", "vf_coef": "exp_0.5_0.1"}
    with pytest.warns(UserWarning, match="mini-batch size"):
        model = build(batch_size=24, compile=True, **kwargs)
    model.learn(32 * 4, callback=Count())
    assert counts == [(2, 2)] * 4


def test_one_warning_and_the_same_results_where_there_is_no_compiler() -> None:
    options = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = build_case("discrete, short last minibatch", options).learn(3 * 32)
    about_compile = [str(warning.message) for warning in caught if "compile=True" in str(warning.message)]
    assert len(about_compile) == 1, about_compile
    assert "eager" in about_compile[0] and "no-such-compiler" in about_compile[0]
    eager = trained("discrete, short last minibatch", compile=False)
    assert (parameters(eager) - parameters(compiled)).abs().max() < 2e-5


class CountsItsCalls(ActorCriticPlusPolicy):
    n_calls = 0

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        self.n_calls += 1
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values * self.n_calls, log_prob, entropy


class BranchesOnValues(ActorCriticPlusPolicy):
    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return (values * 2 if values.mean() > 0 else values), log_prob, entropy


@pytest.mark.parametrize("policy", [CountsItsCalls, BranchesOnValues])
def test_a_policy_that_no_graph_can_hold_trains_eagerly_after_one_warning(policy: type[ActorCriticPlusPolicy]) -> None:
    eager = build(policy).learn(96)
    with pytest.warns(UserWarning, match="compile=True: .* runs eagerly") as caught:
        compiled = build(policy, compile=True).learn(96)
    assert compiled._execution.gradient_step.n_compilations == 0
    assert len([warning for warning in caught if "compile=True" in str(warning.message)]) == 1
    if policy is BranchesOnValues:
        assert (parameters(eager) - parameters(compiled)).abs().max() < 2e-5


@pytest.mark.parametrize("value", ["yes", 1, ["max_autotune"]])
def test_compile_takes_a_bool_or_options(value: Any) -> None:
    with pytest.raises(TypeError, match="compile must be True, False or a dict"):
        PPOPlus("MlpPolicy", "CartPole-v1", compile=value)


class RunningMean(nn.Module):
    """Keeps a running mean as a buffer that it replaces in each call of training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(3))

    def forward(self, x: th.Tensor) -> th.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return x - self.mean


class PlainAttribute(RunningMean):
    """Keeps a running mean as a tensor that is no buffer, and replaces it in each call of training."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.mean = th.zeros(3)


class Extractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Space[Any], part: type[nn.Module]) -> None:
        super().__init__(observation_space, 3)
        self.part = part()

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.part(observations)


@pytest.mark.parametrize(
    "part", [RunningMean, PlainAttribute, lambda: nn.BatchNorm1d(3)], ids=["buffer", "plain", "batch norm"]
)
@pytest.mark.filterwarnings("ignore:compile=True")
def test_an_extractor_with_a_state_learns_the_same_state(part: Any) -> None:
    states = []
    for compile in (False, True):
        policy_kwargs = {"features_extractor_class": Extractor, "features_extractor_kwargs": {"part": part}}
        model = build(compile=compile, policy_kwargs=policy_kwargs).learn(96)
        mean = getattr(model.policy.features_extractor.part, "mean", None)
        states.append(model.policy.features_extractor.part.running_mean if mean is None else mean)
    assert states[0].abs().max() > 1e-3
    th.testing.assert_close(states[1], states[0], atol=2e-5, rtol=0)


@pytest.mark.usefixtures("graphs_without_code")
def test_a_change_of_the_policy_between_updates_reaches_the_graphs() -> None:
    class ChangeActivation(BaseCallback):
        def on_update_end(self) -> bool:
            for parent in self.model.policy.mlp_extractor.policy_net, self.model.policy.mlp_extractor.value_net:
                parent[1] = nn.ReLU()
            return True

        def _on_step(self) -> bool:
            return True

    eager, compiled = (
        build(learning_rate=1e-2, compile=compile).learn(96, callback=ChangeActivation()) for compile in (False, True)
    )
    assert (parameters(eager) - parameters(compiled)).abs().max() < 2e-5
    # One for the policy of each of the three updates
    assert compiled._execution.gradient_step.n_compilations == 3


def test_a_hook_on_a_parameter_keeps_the_step_eager_and_its_effect() -> None:
    model = build(compile=True)
    before = model.policy.value_net.weight.detach().clone()
    model.policy.value_net.weight.register_hook(th.zeros_like)
    with pytest.warns(UserWarning, match="compile=True: the gradient step runs eagerly, since a parameter has a hook"):
        model.learn(96)
    assert th.equal(model.policy.value_net.weight, before)


@pytest.mark.filterwarnings("error:compile=True")
def test_gradients_are_those_of_the_last_minibatch() -> None:
    eager, compiled = (trained("discrete, short last minibatch", compile=compile) for compile in (False, True))
    for expected, actual in zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True):
        th.testing.assert_close(actual.grad, expected.grad, atol=1e-4, rtol=1e-3)


class ChangeOptimizer(BaseCallback):
    """Changes the policy's optimiser before each rollout but the first.

    :param change: takes the optimiser, and how many rollouts there were
    """

    def __init__(self, change: Callable[[th.optim.Optimizer, int], None]) -> None:
        super().__init__()
        self.change, self.n_rollouts = change, 0

    def _on_rollout_start(self) -> None:
        if self.n_rollouts:
            self.change(self.model.policy.optimizer, self.n_rollouts)
        self.n_rollouts += 1

    def _on_step(self) -> bool:
        return True


def load_itself(optimizer: th.optim.Optimizer, _: int) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def replace_group(optimizer: th.optim.Optimizer, _: int) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])


def clear_state(optimizer: th.optim.Optimizer, _: int) -> None:
    optimizer.state.clear()


def halve_moments(optimizer: th.optim.Optimizer, _: int) -> None:
    for entry in optimizer.state.values():
        for name in entry.keys() - {"step"}:
            entry[name] *= 0.5


def switch_settings(optimizer: th.optim.Optimizer, n_rollouts: int) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5 * (n_rollouts % 2)
    if "momentum" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["momentum"] = 0.9 * (n_rollouts % 2)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("change", [load_itself, replace_group, clear_state, halve_moments, switch_settings])
@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("error:compile=True")
def test_what_is_changed_on_the_optimizer_reaches_the_graphs(
    change: Callable[[th.optim.Optimizer, int], None], optimizer: str
) -> None:
    settings = {"learning_rate": "lin_3e-2", "policy_kwargs": {"optimizer_class": optimizer}}
    eager, compiled = (
        build(compile=compile, **settings).learn(5 * 32, callback=ChangeOptimizer(change)) for compile in (False, True)
    )
    assert compiled._execution.gradient_step.n_compilations > 0
    assert (parameters(eager) - parameters(compiled)).abs().max() < 1e-4
    assert [group["lr"] for group in compiled.policy.optimizer.param_groups] == [
        group["lr"] for group in eager.policy.optimizer.param_groups
    ]


@pytest.mark.usefixtures("graphs_without_code")
def test_settings_that_change_with_every_update_are_not_compiled_again_and_again() -> None:
    def change(optimizer: th.optim.Optimizer, n_rollouts: int) -> None:
        optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * n_rollouts, 0.999)

    eager = build().learn(7 * 32, callback=ChangeOptimizer(change))
    with pytest.warns(UserWarning, match="settings of the optimizer change again and again"):
        compiled = build(compile=True).learn(7 * 32, callback=ChangeOptimizer(change))
    assert compiled._execution.gradient_step.n_compilations == MAX_COMPILATIONS
    assert (parameters(eager) - parameters(compiled)).abs().max() < 2e-5


@pytest.mark.usefixtures("graphs_without_code")
def test_a_setting_that_is_a_tensor_is_told_from_another_by_all_its_digits() -> None:
    def change(optimizer: th.optim.Optimizer, n_rollouts: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = th.tensor(0.1 + 1e-6 * (n_rollouts % 2))

    compiled = build(compile=True).learn(3 * 32, callback=ChangeOptimizer(change))
    assert compiled._execution.gradient_step.n_compilations == 3


@pytest.mark.usefixtures("graphs_without_code")
def test_an_update_that_the_limit_of_kl_stops_leaves_the_gradient_of_its_last_step() -> None:
    gradients = []
    for compile in (False, True):
        model = build(compile=compile, target_kl=1e-6, learning_rate=3e-3, n_epochs=3).learn(3 * 32)
        assert model.logger.name_to_value["train/early_stopped"] == 1, "the case proves nothing"
        gradients.append(th.cat([parameter.grad.flatten() for parameter in model.policy.parameters()]))
    th.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_a_gradient_scaler_is_named_as_what_keeps_the_step_eager() -> None:
    """Float16 needs a GradScaler. PPOPlus makes one only on CUDA, so the test makes it."""
    model = build(compile=True)
    step = CompiledGradientStep(model.policy, th.amp.GradScaler("cpu"), {}, CompilationReporter(0))
    with pytest.warns(UserWarning, match=r"since a GradScaler scales the loss under amp='fp16'.*amp='bf16'"):
        step.begin_update()
    step.end_update()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"policy_kwargs": {"optimizer_class": th.optim.NAdam}}, "NAdam has no flat form"),
        ({"rollout_buffer_class": type("OwnBuffer", (RolloutBuffer,), {})}, "OwnBuffer may have methods of its own"),
    ],
    ids=["optimizer", "buffer"],
)
def test_what_cannot_be_compiled_is_said_once(settings: dict[str, Any], what: str) -> None:
    model = build(compile=True, **settings)
    with pytest.warns(UserWarning, match=what) as caught:
        model.learn(96)
    assert len([warning for warning in caught if "compile=True" in str(warning.message)]) == 1


def test_options_are_torch_compiles() -> None:
    assert inductor_options({"max_autotune": True}) == {"max_autotune": True}
    assert inductor_options({"options": {"max_autotune": True}}) == {"max_autotune": True}
    assert inductor_options({"mode": "max-autotune-no-cudagraphs"}) == {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "triton.cudagraphs": False,
    }
    with pytest.raises(ValueError, match="no_such_option"):
        PPOPlus("MlpPolicy", "CartPole-v1", compile={"no_such_option": 1})
