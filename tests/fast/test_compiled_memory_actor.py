"""Acting with a memory in graphs: the rollouts of eager acting, to rounding, whatever happens during them."""

import pickle

import numpy as np
import pytest
import torch as th
from environments import SMALL_NET, make_env, make_masked_env
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.fast.compiled_memory_actor import CompiledMemoryActor
from sb3_ppo_plus.trees import tree_leaves

N_ENVS, N_STEPS = 3, 40
MEMORIES = {
    "lstm": {"memory": "lstm", "memory_kwargs": {"hidden_size": 8}},
    "gru, shared": {"memory": "gru", "memory_kwargs": {"hidden_size": 8, "shared": True}},
    "lstm, no critic": {"memory": "lstm", "memory_kwargs": {"hidden_size": 8, "critic": False, "n_layers": 2}},
    "gtrxl": {"memory": "gtrxl", "memory_kwargs": {"hidden_size": 8, "n_layers": 1, "n_heads": 2, "memory_length": 5}},
}


def rolled_out(compile, memory="lstm", env=None, callback=None, n_rollouts=2, **settings):
    """Collect rollouts without updates."""
    model = PPOPlus(
        "MlpPolicy",
        make_env(N_ENVS) if env is None else env,
        policy_kwargs=SMALL_NET | MEMORIES[memory],
        compile=compile,
        **{"n_steps": N_STEPS, "batch_size": N_STEPS, "seed": 0, "device": "cpu"} | settings,
    )
    model.train = lambda: None
    model.learn(n_rollouts * N_STEPS * N_ENVS, callback)
    return model


def assert_same_rollouts(model, other):
    actor = model._execution.compiled_actor
    assert isinstance(actor, CompiledMemoryActor)
    assert actor.n_compilations > 0
    for name in ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages"):
        found, expected = (np.asarray(getattr(each.rollout_buffer, name)) for each in (model, other))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=name)
    for found, expected in zip(tree_leaves(model._last_states), tree_leaves(other._last_states), strict=True):
        th.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize("memory", MEMORIES)
def test_rollouts_are_those_of_eager_acting(memory):
    assert_same_rollouts(rolled_out(True, memory), rolled_out(False, memory))


@pytest.mark.parametrize("settings", [{"use_sde": True, "sde_sample_freq": 7}, {"gamma": 0.9}], ids=["gSDE", "gamma"])
def test_with_gsde_and_timeouts(settings):
    assert_same_rollouts(rolled_out(True, **settings), rolled_out(False, **settings))


def test_with_masks():
    assert_same_rollouts(rolled_out(True, env=make_masked_env(N_ENVS)), rolled_out(False, env=make_masked_env(N_ENVS)))


class Change(BaseCallback):
    """Changes the policy in the middle of a rollout.

    :param change: takes the model
    """

    def __init__(self, change):
        super().__init__()
        self.change = change

    def _on_step(self):
        if self.n_calls == N_STEPS + 13:
            self.change(self.model)
        return True


def scale_weights(model):
    with th.no_grad():
        model.policy.action_net.weight.add_(1.0)
        model.policy.lstm_actor.weight_hh_l0.mul_(3.0)


def add_a_hook(model):
    model.policy.lstm_actor.register_forward_hook(lambda *_: None)
    model.policy.action_net.register_forward_hook(lambda module, inputs, output: output + 1.0)


def replace_the_policy(model):
    other = PPOPlus("MlpPolicy", make_env(1), policy_kwargs=SMALL_NET | MEMORIES["lstm"], seed=5, device="cpu")
    model.policy = other.policy


@pytest.mark.filterwarnings("ignore:compile=True")
@pytest.mark.parametrize("change", [scale_weights, add_a_hook, replace_the_policy])
def test_changes_in_the_middle_of_a_rollout_count_at_once(change):
    model = rolled_out(True, callback=Change(change), n_rollouts=3)
    assert_same_rollouts(model, rolled_out(False, callback=Change(change), n_rollouts=3))
    if change is not replace_the_policy:
        unchanged = rolled_out(False, n_rollouts=3)
        assert not np.allclose(unchanged.rollout_buffer.actions, model.rollout_buffer.actions, atol=1e-3)


def test_states_go_on_after_an_interruption_of_learn():
    models = []
    for compile in (True, False):
        models.append(rolled_out(compile, n_rollouts=1))
        models[-1].learn(N_STEPS * N_ENVS, reset_num_timesteps=False)
    assert_same_rollouts(*models)


def test_a_copy_of_a_model_acts_compiled_too():
    model = rolled_out(True)
    model.env.close()
    copied = pickle.loads(pickle.dumps(model._execution))
    assert type(copied.compiled_actor) is CompiledMemoryActor
