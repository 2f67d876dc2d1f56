"""A rollout that is evaluated after its last step has the numbers of one that is evaluated at each step."""

from typing import Any

import numpy as np
import pytest
import torch as th
from environments import ASYMMETRIC, BOX, IMAGE, SMALL_DICT, ConstantRewardEnv, make_env
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus
from sb3_ppo_plus.buffers import PPOPlusDictRolloutBuffer, PPOPlusRolloutBuffer
from sb3_ppo_plus.fast import users_code
from sb3_ppo_plus.fast.compiled_actor import CompiledActor, can_act_alone
from sb3_ppo_plus.rollout.actor import EVALUATION_CHUNK, predict_values


class KeepRollout(BaseCallback):
    """Copies the buffer at the end of each rollout, and notes which values callbacks saw."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, Any]] = []
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        self.seen.append(self.locals["values"])
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        names = ("actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")
        self.rollouts.append({name: np.array(getattr(buffer, name)) for name in names})


def two_rollouts(model: PPOPlus, callback: KeepRollout | None = None) -> KeepRollout:
    """Collect a rollout, learn from it in one minibatch, which is always eager, and collect another."""
    callback = callback or KeepRollout()
    model.learn(model.n_steps * model.n_envs, callback=callback)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return callback


def rollouts(
    env: Any, policy: str = "MlpPolicy", callback: type[KeepRollout] = KeepRollout, **kwargs: Any
) -> tuple[KeepRollout, KeepRollout]:
    kept = []
    for compile in (False, True):
        # The sizes of test_compiled_step.py, whose graphs need not be compiled again
        settings = {"n_steps": 16, "batch_size": 32, "n_epochs": 1, "seed": 0, **kwargs}
        settings["policy_kwargs"] = {"net_arch": [8], **kwargs.get("policy_kwargs", {})}
        kept.append(two_rollouts(PPOPlus(policy, env(), compile=compile, **settings), callback()))
    return kept[0], kept[1]


def assert_same_rollouts(eager: KeepRollout, compiled: KeepRollout) -> None:
    for expected, actual in zip(eager.rollouts, compiled.rollouts, strict=True):
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


class EditingEnvs(VecEnvWrapper):
    """Edits the array of actions that it is given."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        actions[...] = 0
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        return self.venv.step_wait()


class EditActions(KeepRollout):
    """Edits the actions that the buffer is about to store."""

    def _on_step(self) -> bool:
        self.locals["actions"][...] = 0
        return super()._on_step()


@pytest.mark.parametrize("action_space", [ASYMMETRIC, spaces.Discrete(3), spaces.MultiDiscrete([3, 2])], ids=type)
@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("error:compile=True")
def test_actions_that_a_callback_edits_keep_the_log_probs_of_those_that_were_chosen(
    action_space: spaces.Space[Any],
) -> None:
    eager, compiled = rollouts(lambda: make_env(2, action_space=action_space), callback=EditActions)
    assert all((rollout["actions"] == 0).all() for rollout in compiled.rollouts)
    assert np.ptp(eager.rollouts[0]["log_probs"]) > 0.01, "one action has one log-prob here: the case proves nothing"
    assert_same_rollouts(eager, compiled)


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.MultiDiscrete([3, 2])], ids=type)
@pytest.mark.usefixtures("graphs_without_code")
def test_actions_that_an_environment_edits_keep_the_log_probs_of_those_that_were_chosen(
    monkeypatch: pytest.MonkeyPatch, action_space: spaces.Space[Any]
) -> None:
    monkeypatch.setattr(users_code, "is_known_callback", lambda callback: True)
    eager, compiled = rollouts(lambda: EditingEnvs(make_env(2, action_space=action_space)))
    assert all((rollout["actions"] == 0).all() for rollout in compiled.rollouts)
    assert_same_rollouts(eager, compiled)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "policy", "kwargs"),
    [
        (BOX, ASYMMETRIC, "MlpPolicy", {"policy_kwargs": {"action_dist": "squashed_gaussian"}}),
        (BOX, ASYMMETRIC, "MlpPolicy", {"use_sde": True, "sde_sample_freq": 5}),
        (SMALL_DICT, spaces.MultiDiscrete([3, 2]), "MultiInputPolicy", {}),
        (IMAGE, spaces.Discrete(2), "CnnPolicy", {}),
    ],
    ids=["squashed", "gSDE", "dict", "image"],
)
@pytest.mark.filterwarnings("error:compile=True")
def test_compiled_and_eager_rollouts_are_the_same(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], policy: str, kwargs: dict[str, Any]
) -> None:
    def env() -> Any:
        # Episodes of 7 steps: several timeouts in each rollout
        return make_env(2, observation_space=observation_space, action_space=action_space, p_terminate=0.05)

    eager, compiled = rollouts(env, policy, **kwargs)
    # With a features extractor that learns, values are computed at each step
    assert all((values is None) == (policy != "CnnPolicy") for values in compiled.seen)
    assert all(values is not None for values in eager.seen)
    assert_same_rollouts(eager, compiled)


@pytest.mark.usefixtures("graphs_without_code")
def test_timeouts_are_bootstrapped_after_a_compiled_rollout_and_terminations_are_not() -> None:
    for truncates in (True, False):
        eager, compiled = rollouts(
            lambda truncates=truncates: make_vec_env(ConstantRewardEnv, 2, env_kwargs={"truncates": truncates})
        )
        rewards = compiled.rollouts[0]["rewards"]
        assert (rewards != 1.0).any() == truncates
        np.testing.assert_allclose(rewards, eager.rollouts[0]["rewards"], atol=1e-6)


def narrow_env(dtype: Any, parts: Any = None) -> Any:
    """Return an env with narrow observations. VecNormalize makes floats of them, which the buffer cannot store."""
    space: Any = spaces.Box(0, 100, (3,), dtype)
    normalized = None
    if parts is not None:
        space, normalized = spaces.Dict({"narrow": space, **parts}), ["narrow"]
    env = make_env(2, observation_space=space, action_space=ASYMMETRIC, p_terminate=0.05)
    return VecNormalize(env, norm_obs_keys=normalized)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("error:compile=True")
def test_values_use_the_exact_observations_not_the_rounded_ones_in_the_buffer(dtype: Any) -> None:
    eager, compiled = rollouts(lambda: narrow_env(dtype))
    assert all(isinstance(values, th.Tensor) for values in compiled.seen)
    assert_same_rollouts(eager, compiled)


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("error:compile=True")
def test_one_dict_key_that_the_buffer_rounds_keeps_eager_values() -> None:
    eager, compiled = rollouts(lambda: narrow_env(np.uint8, {"wide": BOX}), "MultiInputPolicy")
    assert_same_rollouts(eager, compiled)


@pytest.mark.usefixtures("graphs_without_code")
def test_values_are_computed_at_each_step_once_the_buffer_rounds_observations() -> None:
    class Widen(KeepRollout):
        def _on_step(self) -> bool:
            if self.n_calls == 5:
                self.model.env.norm_obs = True
            return super()._on_step()

    def env() -> Any:
        venv = narrow_env(np.uint8)
        venv.norm_obs = False
        return venv

    eager, compiled = rollouts(env, callback=Widen)
    # The sixth step returns the first observation that is normalised
    assert [values is None for values in compiled.seen[:16]] == [True] * 6 + [False] * 10
    assert_same_rollouts(eager, compiled)


@pytest.mark.parametrize(
    ("stored", "given", "is_narrowed"),
    [
        (np.float32, np.float64, False),
        (np.float32, np.int64, False),
        (np.float64, np.float32, False),
        (np.uint8, np.uint8, False),
        (np.int64, np.uint8, False),
        (np.uint8, np.int64, True),
        (np.uint8, np.float32, True),
        (np.int64, np.float64, True),
        (np.float16, np.float32, True),
        (np.float16, np.uint8, False),
        (bool, np.float32, True),
    ],
)
def test_a_buffer_knows_what_it_cannot_hold(stored: Any, given: Any, is_narrowed: bool) -> None:
    box = spaces.Box(0, 1, (3,), stored)
    observations = th.from_numpy(np.zeros((1, 3), given))
    assert PPOPlusRolloutBuffer(4, box, ASYMMETRIC).narrows(observations) == is_narrowed
    both = spaces.Dict({"a": BOX, "b": box})
    buffer = PPOPlusDictRolloutBuffer(4, both, ASYMMETRIC)
    assert buffer.narrows({"a": th.zeros(1, 3), "b": observations}) == is_narrowed


def test_predictions_do_not_depend_on_the_size_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PPOPlus("MultiInputPolicy", make_env(observation_space=SMALL_DICT), seed=0).policy
    observations = [SMALL_DICT.sample() for _ in range(7)]
    whole = predict_values(policy, observations)
    assert EVALUATION_CHUNK > 7 * 4
    monkeypatch.setattr("sb3_ppo_plus.rollout.actor.EVALUATION_CHUNK", 9)
    np.testing.assert_allclose(predict_values(policy, observations), whole, atol=1e-6)
    single = [policy.predict_values(policy.obs_to_tensor(obs)[0]).item() for obs in observations]
    np.testing.assert_allclose(whole, single, atol=1e-6)


class OwnForward(ActorCriticPlusPolicy):
    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values + 100.0, log_prob


def test_a_policy_with_a_forward_of_its_own_is_asked_at_every_step_after_one_warning() -> None:
    model = PPOPlus(OwnForward, make_env(), n_steps=16, batch_size=16, n_epochs=1, compile=True)
    with pytest.warns(UserWarning, match="compile=True: acting runs eagerly, since OwnForward") as caught:
        callback = two_rollouts(model)
    assert len([warning for warning in caught if "compile=True" in str(warning.message)]) == 1
    assert not can_act_alone(model.policy)
    assert len(callback.rollouts) == 2
    assert all(rollout["values"].min() > 90 for rollout in callback.rollouts)
    assert all(isinstance(values, th.Tensor) for values in callback.seen)


def raises_values(method: str) -> Any:
    """Make a subclass with a method that adds 100 to the values, which it returns first."""

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        values, *others = getattr(ActorCriticPlusPolicy, method)(self, *args, **kwargs)
        return values + 100.0, *others

    return type("Own", (ActorCriticPlusPolicy,), {method: own})


@pytest.mark.parametrize("method", ["_evaluate", "value_and_distribution"])
@pytest.mark.filterwarnings("ignore:compile=True. acting runs eagerly")
def test_a_policy_that_evaluates_in_its_own_way_acts_the_same_compiled_and_eager(method: str) -> None:
    kept = []
    for compile in (False, True):
        callback = KeepRollout()
        model = PPOPlus(
            raises_values(method), make_env(), n_steps=16, batch_size=16, n_epochs=1, seed=0, compile=compile
        )
        model.learn(16, callback=callback)
        kept.append(callback.rollouts[0])
    eager, compiled = kept
    for name, expected in eager.items():
        # Advantages are estimated by another algorithm
        np.testing.assert_allclose(compiled[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "method", ["extract_features", "forward_step", "get_distribution", "predict_values", "_masked_distribution"]
)
def test_a_policy_with_methods_of_its_own_is_asked_for_all_at_once(method: str) -> None:
    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(ActorCriticPlusPolicy, method)(self, *args, **kwargs)

    policy = PPOPlus(type("Own", (ActorCriticPlusPolicy,), {method: own}), make_env()).policy
    assert not can_act_alone(policy)
    assert can_act_alone(PPOPlus(type("Same", (ActorCriticPlusPolicy,), {}), make_env()).policy)


@pytest.mark.filterwarnings("error:compile=True")
def test_observations_of_any_layout_and_precision_give_the_same_actions() -> None:
    model = PPOPlus("MlpPolicy", make_env(4, action_space=spaces.Discrete(50)), n_steps=16, batch_size=64, compile=True)
    actor = model._execution.actor_for(model, model.rollout_buffer)
    assert isinstance(actor, CompiledActor)
    observations = th.rand(4, 3)
    layouts = [observations, observations.t().contiguous().t(), observations.double(), observations]
    assert layouts[1].stride() != layouts[0].stride()
    actions = []
    for layout in layouts:
        th.manual_seed(0)
        actions.append(actor.act(layout, None, {})[0].tolist())
    assert actions[1:] == actions[:-1]
