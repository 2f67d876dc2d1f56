"""Which methods of a policy decide what ``predict`` returns: an export refuses subclasses that replace one of them."""

import sys

import numpy as np
import pytest
from environments import DICT, MaskedEnv, MaskInObservation, make_env
from export_cases import DISTRIBUTIONS, MASKABLE, NETWORKS, Case, make_model
from models import build
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_plus import ActorCriticPlusPolicy, export_policy
from sb3_ppo_plus.export.graph import METHODS_OF_PREDICT


def called_methods(policy, call):
    """Names of the methods and properties of a policy, PyTorch's left out, that a call runs."""
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_varnames or "/torch/nn/" in code.co_filename:
            return
        is_method = code.co_varnames[0] == "self" and frame.f_locals.get("self") is policy
        if is_method and hasattr(type(policy), code.co_name):
            found.add(code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def methods_of(model, env, masks=None):
    observations = env.reset()
    starts = np.zeros(env.num_envs, bool)

    def predict():
        for deterministic in (True, False):
            _, state = model.policy.predict(observations, None, None, deterministic, masks)
            model.policy.predict(observations, state, starts, deterministic, masks)

    return called_methods(model.policy, predict)


def cases():
    yield from (Case("gaussian", network) for network in NETWORKS)
    yield from (Case(distribution, "mlp") for distribution in DISTRIBUTIONS)
    yield from (Case(distribution, "lstm", is_masked=True) for distribution in MASKABLE)


def test_the_exporter_knows_all_methods_that_predict_runs():
    found = set()
    for case in cases():
        model, env, _, _ = make_model(case)
        masks = np.stack(env.env_method("action_masks")) if case.is_masked else None
        found |= methods_of(model, env, masks)
    in_observation = DummyVecEnv([lambda: MaskInObservation(MaskedEnv())])
    of_keys = make_env(observation_space=DICT)
    found |= methods_of(build(in_observation, "MultiInputPolicy"), in_observation)
    found |= methods_of(build(of_keys, "MultiInputPolicy", policy_kwargs={"actor_keys": ["vector"]}), of_keys)
    assert found == set(METHODS_OF_PREDICT)


@pytest.mark.parametrize("name", METHODS_OF_PREDICT)
def test_a_subclass_that_replaces_such_a_method_is_refused(name, tmp_path):
    replaced = getattr(ActorCriticPlusPolicy, name)
    own = property(replaced.fget) if isinstance(replaced, property) else lambda self, *given: replaced(self, *given)
    model = build(policy=type("Own", (ActorCriticPlusPolicy,), {name: own}))
    with pytest.raises(ValueError, match=f"does not know the method {name} of Own"):
        export_policy(model, tmp_path / "policy.pt2")
