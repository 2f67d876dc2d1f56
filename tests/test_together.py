"""Memory, masks, distributions, observations, compile, VecNormalize and save/load at once: all pairs are covered."""

from itertools import combinations, product

import numpy as np
import pytest
import torch as th
from environments import ACTION_SPACES, ASYMMETRIC, BOX, DICT, IMAGE, ToyEnv, logs_of_updates, toy_envs
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus

OBSERVATIONS = {
    "vector": ("MlpPolicy", BOX),
    "image": ("CnnPolicy", IMAGE),
    "dict": ("MultiInputPolicy", DICT),
}
ACTIONS = {
    "discrete": (ACTION_SPACES["discrete"], {}),
    "multi_discrete": (ACTION_SPACES["multi_discrete"], {}),
    "gaussian": (ASYMMETRIC, {}),
    "gSDE": (ASYMMETRIC, {"use_sde": True, "sde_sample_freq": 4}),
    "squashed": (ASYMMETRIC, {"action_dist": "squashed_gaussian"}),
    "beta": (ASYMMETRIC, {"action_dist": "beta"}),
}
MEMORIES = {
    "none": {},
    "lstm": {"memory": "lstm", "memory_kwargs": {"hidden_size": 8, "sequence_length": 5}},
    "gru": {"memory": "gru", "memory_kwargs": {"hidden_size": 8, "shared": True, "sequence_length": 8}},
    "gtrxl": {
        "memory": "gtrxl",
        "memory_kwargs": {"hidden_size": 8, "n_layers": 1, "n_heads": 2, "memory_length": 3, "sequence_length": 8},
    },
}
FACTORS = {
    "memory": list(MEMORIES),
    "masks": [False, True],
    "actions": list(ACTIONS),
    "observations": list(OBSERVATIONS),
    "compile": [False, True],
    "normalize": [False, True],
}


def is_sensible(case):
    """Masks need discrete actions; compiling a memory takes long, and has its own test."""
    return (case["actions"] in ("discrete", "multi_discrete") or not case["masks"]) and not (
        case["compile"] and (case["memory"] != "none" or case["observations"] != "vector")
    )


def covering_cases():
    """Few cases that contain every sensible pair of values, found greedily."""
    cases = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    cases = [case for case in cases if is_sensible(case)]
    pairs_of = [set(combinations(case.items(), 2)) for case in cases]
    missing, chosen = set.union(*pairs_of), []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(pairs_of[index] & missing))
        chosen.append(cases[best])
        missing -= pairs_of[best]
    return chosen


CASES = covering_cases()


class MaskedToyEnv(ToyEnv):
    """Some choices are invalid at each step, and taking one is an error."""

    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        self._draw()
        return result

    def _draw(self):
        sizes = [self.action_space.n] if isinstance(self.action_space, spaces.Discrete) else self.action_space.nvec
        parts = [self.np_random.random(size) < 0.5 for size in sizes]
        for part in parts:
            part[self.np_random.integers(len(part))] = True
        self.parts = parts

    def action_masks(self):
        return np.concatenate(self.parts)

    def step(self, action):
        assert all(part[choice] for part, choice in zip(self.parts, np.atleast_1d(action), strict=True))
        result = super().step(action)
        self._draw()
        return result


def build_env(case):
    action_space, _ = ACTIONS[case["actions"]]
    _, observation_space = OBSERVATIONS[case["observations"]]
    env_class = MaskedToyEnv if case["masks"] else ToyEnv
    env = make_vec_env(lambda: env_class(observation_space, action_space), n_envs=2, seed=0)
    if not case["normalize"]:
        return env
    keys = ["vector"] if case["observations"] == "dict" else None
    return VecNormalize(env, norm_obs=case["observations"] != "image", norm_obs_keys=keys)


def build(case, **settings):
    settings = dict(ACTIONS[case["actions"]][1]) | settings
    policy_kwargs = {"net_arch": [8]} | MEMORIES[case["memory"]] | settings.pop("policy_kwargs", {})
    if case["observations"] == "image":
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": 8}
    if "action_dist" in settings:
        policy_kwargs["action_dist"] = settings.pop("action_dist")
    settings = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"} | settings
    policy, _ = OBSERVATIONS[case["observations"]]
    return PPOPlus(policy, build_env(case), policy_kwargs=policy_kwargs, compile=case["compile"], **settings)


def name_of(case):
    return "-".join(f"{name}" if value is True else str(value) for name, value in case.items() if value is not False)


def test_every_sensible_pair_is_covered():
    everything = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    sensible = set.union(*(set(combinations(case.items(), 2)) for case in everything if is_sensible(case)))
    assert set.union(*(set(combinations(case.items(), 2)) for case in CASES)) == sensible
    assert len(CASES) < 40


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_all_together(case, tmp_path):
    model = build(case)
    # Actions outside their bounds or masks are refused by the environments
    logs = logs_of_updates(model, 64)
    assert len(logs) == 2
    for update in logs:
        numbers = [value for name, value in update.items() if name.startswith("train/") and "explained" not in name]
        assert np.isfinite(numbers).all()
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert sum(env.calls["step"] for env in toy_envs(model.env)) == 64

    # Before the first step of an update the log-ratio is 0: with a learning rate of 0, in every minibatch
    model.learning_rate, model.clip_range = 0.0, 1e-4
    (update,) = logs_of_updates(model, 32, reset_num_timesteps=False)
    assert update["train/clip_fraction"] == 0.0

    predictor = model.masked(model.env) if case["masks"] else model
    evaluate_policy(predictor, model.env, n_eval_episodes=2, warn=False)

    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", model.env)
    observations = model.env.reset()
    masks = {"action_masks": np.stack(model.env.env_method("action_masks"))} if case["masks"] else {}
    # A loaded model draws gSDE's noise anew
    for deterministic in (True,) if case["actions"] == "gSDE" else (True, False):
        predictions = []
        for predicting in (model, loaded):
            th.manual_seed(0)
            predictions.append(predicting.predict(observations, deterministic=deterministic, **masks))
        (actions, state), (loaded_actions, loaded_state) = predictions
        assert np.array_equal(actions, loaded_actions)
        assert (state is None) == (loaded_state is None) == (case["memory"] == "none")
    loaded.learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize(("kind", "shared"), [("lstm", False), ("gru", True), ("gtrxl", True)])
def test_compiled_and_eager_memories_give_the_same_losses(kind, shared):
    case = {"memory": kind, "masks": True, "actions": "discrete", "observations": "vector", "normalize": False}
    policy_kwargs = {"memory_kwargs": MEMORIES[kind]["memory_kwargs"] | {"shared": shared}}
    eager = logs_of_updates(build(case | {"compile": False}, n_epochs=1, policy_kwargs=policy_kwargs), 64)
    model = build(case | {"compile": True}, n_epochs=1, policy_kwargs=policy_kwargs)
    compiled = logs_of_updates(model, 64)
    for before, after in zip(eager, compiled, strict=True):
        for name in ("train/loss", "train/value_loss", "train/entropy_loss", "train/grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-5), name
    assert model._execution.gradient_step.n_compilations >= 1
    assert model._execution.compiled_actor.n_compilations == 1
