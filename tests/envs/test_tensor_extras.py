"""Every extra has the same bits on tensors as through the array methods; on a device, it differs by rounding only."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from tensor_walks import N_ENVS, SETTINGS, MaskedTensorWalk, Plain, SingleWalk, TensorWalk, assert_same_training

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.buffers import PPOPlusRolloutBuffer
from sb3_ppo_plus.envs import tensor_vec_env
from sb3_ppo_plus.errors import NonFiniteError

BOX = {"action_space": spaces.Box(-1, 2, (2,))}
NEAR = spaces.Box(-9, 9, (2,))
KEYS = {"observation_space": spaces.Dict({"near": NEAR, "sign": spaces.Discrete(2)})}
MASK_KEY = {"observation_space": spaces.Dict({**KEYS["observation_space"], "action_mask": spaces.MultiBinary(2)})}


def mirror(observations, actions):
    return th.stack((-observations[:, 0], observations[:, 1]), 1), actions


CASES = {
    "plain": (TensorWalk, {}, {}),
    "Box": (TensorWalk, BOX, {}),
    "gSDE": (TensorWalk, BOX, {"use_sde": True, "sde_sample_freq": 4}),
    "squashed gSDE": (TensorWalk, BOX, {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "beta": (TensorWalk, BOX, {"policy_kwargs": {"action_dist": "beta"}}),
    "squashed Gaussian": (TensorWalk, BOX, {"policy_kwargs": {"action_dist": "squashed_gaussian"}}),
    "masks": (MaskedTensorWalk, {}, {}),
    "masks of a key": (TensorWalk, MASK_KEY, {}),
    "LSTM": (TensorWalk, {}, {"policy_kwargs": {"memory": "lstm"}}),
    "GRU with keys": (TensorWalk, KEYS, {"policy_kwargs": {"memory": "gru", "memory_kwargs": {"hidden_size": 8}}}),
    "GTrXL with masks": (MaskedTensorWalk, {}, {"policy_kwargs": {"memory": "gtrxl"}}),
    "heads with other keys": (TensorWalk, KEYS, {"policy_kwargs": {"actor_keys": ["sign"], "critic_keys": ["near"]}}),
    "symmetry": (TensorWalk, BOX, {"symmetry": mirror}),
    "smooth actions": (TensorWalk, BOX, {"caps_temporal": 0.1, "caps_spatial": 0.1}),
    "micro-batches": (TensorWalk, {}, {"micro_batches": 3, "batch_size": 48}),
    "LSTM in micro-batches": (
        TensorWalk,
        {},
        {"micro_batches": 3, "batch_size": 48, "policy_kwargs": {"memory": "lstm"}},
    ),
    "bf16": (TensorWalk, {}, {"amp": "bf16"}),
    "clipped values, a limit of the KL": (TensorWalk, {}, {"clip_range_vf": 0.2, "target_kl": 0.01}),
}


def trained(name, env, timesteps=200, **arguments):
    settings = {**SETTINGS, **CASES[name][2], **arguments}
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    model = PPOPlus(policy, env, **settings).learn(timesteps)
    # A timeout and a termination at least, so that the case proves something
    assert len(model.ep_info_buffer) >= 6
    assert model._was_given_masks is ("masks" in name)
    return model


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Let nothing be read during a rollout, as on a GPU."""
    monkeypatch.setattr(tensor_vec_env, "FREE_TO_READ", set())


@pytest.mark.parametrize("name", CASES)
def test_each_extra_has_the_bits_of_the_array_methods(name):
    kind, arguments, _ = CASES[name]
    assert_same_training(trained(name, kind(**arguments)), trained(name, Plain(kind(**arguments))))


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.parametrize("name", ["plain", "Box", "gSDE", "beta", "masks", "masks of a key", "GTrXL with masks"])
def test_compiled_extras_have_the_bits_of_the_array_methods(name):
    kind, arguments, _ = CASES[name]
    native = trained(name, kind(**arguments), compile=True)
    assert_same_training(native, trained(name, Plain(kind(**arguments)), compile=True))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("name", CASES)
def test_a_device_differs_by_rounding_only(name):
    kind, arguments, _ = CASES[name]
    model, other = trained(name, kind(**arguments)), trained(name, Plain(kind(**arguments)))
    for key, tensor in model.policy.state_dict().items():
        th.testing.assert_close(tensor, other.policy.state_dict()[key], rtol=1e-4, atol=1e-5, msg=key)
    assert [each["l"] for each in model.ep_info_buffer] == [each["l"] for each in other.ep_info_buffer]
    assert list(model.ep_success_buffer) == list(other.ep_success_buffer)
    assert isinstance(model._last_obs, np.ndarray | dict) and isinstance(model._last_episode_starts, np.ndarray)


WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Waits(th.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split("::")[1].split(".")[0] in WAITING:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


def counted(method, found):
    """Return a method of tensors that notes each of its calls."""
    original = getattr(th.Tensor, method)

    def noting(tensor, *args, **kwargs):
        found.append(method)
        return original(tensor, *args, **kwargs)

    return noting


class CountsWaits(BaseCallback):
    """Notes how many operations have waited before each step's end."""

    def __init__(self, waits):
        super().__init__()
        self.waits, self.counts = waits, []

    def _on_step(self):
        self.counts.append(len(self.waits.found))
        return True


@pytest.mark.usefixtures("as_on_a_device", "graphs_without_code")
@pytest.mark.parametrize("name", ["plain", "Box", "squashed gSDE", "beta", "squashed Gaussian", "masks"])
def test_on_a_device_no_step_waits(name, monkeypatch):
    class Masked(Silent):
        def action_masks(self):
            return self._masks()

    waits = Waits()
    callback = CountsWaits(waits)
    _, arguments, others = CASES[name]
    env = Masked() if name == "masks" else Silent(**arguments)
    model = PPOPlus("MlpPolicy", env, compile=True, **SETTINGS, **others)
    model.learn(96, callback)
    callback.counts.clear()
    _, callbacks = model._setup_learn(10**6, callback)
    for method in ("cpu", "numpy", "tolist", "__array__"):
        monkeypatch.setattr(th.Tensor, method, counted(method, waits.found))
    with waits:
        model.collect_rollouts(model.env, callbacks, model.rollout_buffer, 32)
    assert len(callback.counts) == 32 and len(set(callback.counts)) == 1, waits.found


@pytest.mark.usefixtures("as_on_a_device", "graphs_without_code")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_device_values_of_timeouts_are_those_of_the_policy_of_their_step(compiled):
    class Changes(BaseCallback):
        def _on_step(self):
            if self.n_calls == 20:
                with th.no_grad():
                    self.model.policy.value_net.bias += 7.0
            return True

    def rewards(env):
        model = PPOPlus("MlpPolicy", env, compile=compiled, **SETTINGS)
        _, callbacks = model._setup_learn(10**6, Changes())
        model.collect_rollouts(model.env, callbacks, model.rollout_buffer, 32)
        return model.rollout_buffer.rewards

    native, expected = rewards(TensorWalk()), rewards(Plain(TensorWalk()))
    assert expected.max() > 5, "a timeout after the change"
    np.testing.assert_allclose(native, expected, rtol=1e-5, atol=1e-5)


class Silent(TensorWalk):
    """A walk that waits for nothing."""

    checks_actions = False

    def _begin(self, which):
        if not hasattr(self, "place"):
            self.place, self.left = th.zeros(self.num_envs), th.zeros(self.num_envs, dtype=th.int64)
        self.n_episodes = self.n_episodes + which
        self.place = th.where(which, self._noise(0), self.place)
        self.left = th.where(which, 5 + (self.numbers * 3 + self.n_episodes * 5) % 5, self.left)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("name", ["rewards", "observations", "final_observations"])
def test_on_a_device_nan_is_found_after_the_rollout(name):
    class Odd(TensorWalk):
        n_steps = 0

        def step_tensor(self, actions):
            step = super().step_tensor(actions)
            self.n_steps += 1
            if self.n_steps != 8:
                return step
            tensor = getattr(step, name).clone()
            tensor[1] = th.nan
            cut = th.ones(N_ENVS, dtype=th.bool)
            return step._replace(**{name: tensor}, truncated=cut, terminated=~cut)

    words = {"rewards": "the reward", "observations": "the observation", "final_observations": "terminal observation"}
    # The policy would see a NaN among observations before the end
    n_steps = 8 if name == "observations" else 32
    with pytest.raises(NonFiniteError, match=f"{words[name]} of env 1 at step 7"):
        PPOPlus("MlpPolicy", Odd(), **{**SETTINGS, "n_steps": n_steps}).learn(32)


@pytest.mark.parametrize("device", ["cpu", "as on a device"])
@pytest.mark.parametrize("kind", ["method", "key"])
def test_masks_without_a_valid_action_are_refused(device, kind, monkeypatch):
    if device != "cpu":
        monkeypatch.setattr(tensor_vec_env, "FREE_TO_READ", set())

    class NoChoice(MaskedTensorWalk if kind == "method" else TensorWalk):
        def _masks(self):
            masks = super()._masks()
            # In one step alone
            masks[1] &= (self.n_episodes[1] != 2) | (self.left[1] != 3)
            return masks

    policy, arguments = ("MultiInputPolicy", MASK_KEY) if kind == "key" else ("MlpPolicy", {})
    with pytest.raises(ValueError, match="action mask of env 1 leaves no valid action at step"):
        PPOPlus(policy, NoChoice(**arguments), **SETTINGS).learn(64)


class OwnBuffer(PPOPlusRolloutBuffer):
    """A user's own class."""


@pytest.mark.parametrize("name", ["plain", "masks", "LSTM"])
def test_a_buffer_of_the_users_own_gets_arrays(name):
    kind, arguments, _ = CASES[name]
    model = trained(name, kind(**arguments), rollout_buffer_class=OwnBuffer)
    assert type(model.rollout_buffer) is OwnBuffer
    assert_same_training(model, trained(name, kind(**arguments)))


def test_masks_of_a_wrong_shape_are_refused():
    class OddMasks(TensorWalk):
        def action_masks(self):
            return self._masks()[0]

    with pytest.raises(ValueError, match=r"<OddMasks>: action_masks\(\) must return a tensor of shape \(3, 2\)"):
        PPOPlus("MlpPolicy", OddMasks(), **SETTINGS).learn(64)


def test_a_model_asks_for_masks_when_evaluating():
    model, env = trained("masks", MaskedTensorWalk()), MaskedTensorWalk()
    returns, _ = evaluate_policy(model.masked(env), env, 9, return_episode_rewards=True)
    singles = DummyVecEnv([lambda first=first: Monitor(SingleWalk(first, MaskedTensorWalk)) for first in range(N_ENVS)])
    assert returns == evaluate_policy(model.masked(singles), singles, 9, return_episode_rewards=True)[0]
