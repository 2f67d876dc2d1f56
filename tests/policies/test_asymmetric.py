"""Actor and critic that see different keys: what each depends on, SB3's bits, what is refused, and what is saved."""

import copy

import numpy as np
import pytest
import torch as th
from environments import BOX, MASKED_ACTION_SPACES, SMALL_NET, MaskedEnv, MaskInObservation, ToyEnv, make_env
from gymnasium import ObservationWrapper, spaces
from interrupted_runs import StopAfter, make_envs
from models import build
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from states import assert_same_training
from trained_alike import train

from sb3_ppo_plus import FillMissingKeys, PPOPlus, TrainingCheckpoint, load_vec_normalize, save_vec_normalize

ROWS = spaces.Box(-1.0, 1.0, (4, 3), np.float32)
ACTORS = spaces.Dict({"kind": spaces.Discrete(4), "vector": BOX})
HIDDEN = spaces.Box(-1.0, 1.0, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (9, 9, 1), np.uint8)
SPACE = spaces.Dict({"hidden": HIDDEN, "kind": spaces.Discrete(4), "rows": ROWS, "vector": BOX})
WITH_IMAGE = spaces.Dict({**SPACE.spaces, "image": IMAGE})
KEYS = {"actor_keys": ["vector", "kind", "rows"], "critic_keys": ["hidden", "vector", "rows"]}
EXTRACTORS = {"rows": {"class": "transformer", "d_model": 8, "n_heads": 2, "n_layers": 1}, "image": "impala_cnn"}
BY_KEY = "transformer and CNN by key"
CASES = {
    "plain": {},
    BY_KEY: {
        "features_extractor_class": "combined",
        "features_extractor_kwargs": {"extractors": EXTRACTORS},
        "critic_keys": ["hidden", "image", "rows"],
    },
    "layers by head": {"net_arch": {"pi": [8], "vf": [16, 8]}},
    "no layers": {"net_arch": []},
    "lstm": {"memory": "lstm", "memory_kwargs": {"hidden_size": 8}},
    "lstm of the actor alone": {"memory": "lstm", "memory_kwargs": {"hidden_size": 8, "critic": False}},
    "gru": {"memory": "gru", "memory_kwargs": {"hidden_size": 8}},
    "gtrxl": {"memory": "gtrxl", "memory_kwargs": {"hidden_size": 8, "n_heads": 2, "memory_length": 4}},
    "beta": {"action_dist": "beta"},
}


def asymmetric(case="plain", env=None, keys=None, **settings):
    space = WITH_IMAGE if case == BY_KEY else SPACE
    policy_kwargs = copy.deepcopy(SMALL_NET | KEYS | CASES[case]) if keys is None else SMALL_NET | CASES[case] | keys
    env = make_env(2, observation_space=space) if env is None else env
    return build(env, policy="MultiInputPolicy", policy_kwargs=policy_kwargs, **settings)


def batch_of(model, n=6):
    space = copy.deepcopy(model.observation_space)
    space.seed(1)
    samples = [space.sample() for _ in range(n)]
    return {key: th.as_tensor(np.stack([sample[key] for sample in samples])) for key in space.spaces}


def changed(batch, key):
    return {**batch, key: batch[key].flip(0)}


@pytest.mark.parametrize("case", CASES)
def test_each_head_depends_on_its_keys_and_on_no_others(case):
    model = asymmetric(case).learn(64)
    policy, batch = model.policy, batch_of(model)
    actions = policy(batch, deterministic=True)[0]
    policy.set_training_mode(False)
    with th.no_grad():
        before = policy.evaluate_actions(batch, actions)
        before_alone = policy.get_distribution(batch).log_prob(actions), policy.predict_values(batch)
        for key in batch:
            now = policy.evaluate_actions(changed(batch, key), actions)
            distribution = policy.get_distribution(changed(batch, key))
            log_probs, values = distribution.log_prob(actions), policy.predict_values(changed(batch, key))
            for of_actor in ((before[1], now[1]), (before[2], now[2]), (before_alone[0], log_probs)):
                if key not in policy.actor_keys:
                    assert th.equal(*of_actor), key
            assert th.equal(before_alone[0], log_probs) == (key not in policy.actor_keys), key
            assert th.equal(before[0], now[0]) == (key not in policy.critic_keys), key
            assert th.equal(before_alone[1], values) == (key not in policy.critic_keys), key
    unseen = {key: part.numpy() for key, part in batch.items()}
    for key in set(unseen) - set(policy.actor_keys):
        np.testing.assert_array_equal(
            model.predict(unseen, deterministic=True)[0],
            model.predict({**unseen, key: unseen[key][::-1]}, deterministic=True)[0],
        )


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_one_head_moves_nothing_of_the_other(case):
    model = asymmetric(case)
    policy, batch = model.policy, batch_of(model)
    actions = policy(batch)[0].detach()
    values, log_prob, _ = policy.evaluate_actions(batch, actions)
    names = dict(policy.named_parameters())
    gradients = [
        th.autograd.grad(loss.sum(), list(names.values()), allow_unused=True, retain_graph=True)
        for loss in (log_prob, values)
    ]
    of_actor, of_critic = ({name for name, grad in zip(names, of, strict=True) if grad is not None} for of in gradients)
    assert of_actor and of_critic and not of_actor & of_critic
    assert of_actor | of_critic == set(names), "a part of the policy is used by neither head"


class Everything(BaseFeaturesExtractor):
    """Reads all that it is given, whatever space it was built for."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=spaces.flatdim(observation_space))

    def forward(self, observations):
        assert list(observations) == list(self._observation_space)
        return th.cat([part.flatten(1) for part in observations.values()], dim=1)


def test_an_extractor_of_the_users_gets_the_keys_of_its_head():
    kwargs = {"features_extractor_class": Everything}
    policy = asymmetric(keys=KEYS | kwargs).learn(64).policy
    assert list(policy.pi_features_extractor._observation_space) == ["kind", "rows", "vector"]
    assert list(policy.vf_features_extractor._observation_space) == ["hidden", "rows", "vector"]
    same = {"actor_keys": ["vector", "rows"], "critic_keys": ["rows", "vector"]}
    policy = asymmetric(keys=same | kwargs).learn(64).policy
    assert policy.pi_features_extractor is policy.vf_features_extractor


def test_what_neither_head_sees_changes_no_bit_of_training():
    class OtherNoise(ObservationWrapper):
        def observation(self, observation):
            return {**observation, "hidden": -observation["hidden"]}

    keys = {"actor_keys": ["vector"], "critic_keys": ["vector", "kind"]}
    trained = []
    for wrapper in (None, OtherNoise):
        # The env's reward must not depend on what is changed
        def make(wrapper=wrapper):
            env = Blind(observation_space=SPACE)
            return env if wrapper is None else wrapper(env)

        trained.append(asymmetric(env=make_vec_env(make, n_envs=2, seed=0), keys=keys).learn(128))
    assert_same_training(*trained)


class Blind(ToyEnv):
    """ToyEnv whose reward depends on the action alone."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(np.mean(action)), *rest


class Only(ObservationWrapper):
    """Leaves out the keys that a space lacks."""

    def __init__(self, env, space):
        super().__init__(env)
        self.observation_space = space

    def observation(self, observation):
        return {key: observation[key] for key in self.observation_space}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("order", [list, lambda keys: list(keys)[::-1]])
def test_heads_that_see_all_keys_have_the_bits_of_sb3(share, order):
    def env():
        return make_env(2, observation_space=spaces.Dict({"vector": BOX, "kind": spaces.Discrete(4), "rows": ROWS}))

    keys = {"actor_keys": order(["vector", "kind", "rows"]), "critic_keys": order(["vector", "kind", "rows"])}
    shared = SMALL_NET | {"share_features_extractor": share}
    sb3 = train(PPO, "MultiInputPolicy", env, policy_kwargs=shared)
    ours = train(PPOPlus, "MultiInputPolicy", env, policy_kwargs=shared | keys)
    assert_same_training(sb3, ours)


@pytest.mark.parametrize("ordered", [False, True])
def test_heads_that_see_the_same_keys_have_the_bits_of_sb3_on_an_environment_with_these_keys(ordered):
    pairs = [("vector", BOX), ("kind", spaces.Discrete(4)), ("hidden", HIDDEN)]
    # Gymnasium sorts the keys of a dict, and keeps the order of pairs
    whole, part = (spaces.Dict(list(each) if ordered else dict(each)) for each in (pairs, pairs[:2]))
    assert list(whole) == [key for key, _ in (pairs if ordered else sorted(pairs))]
    keys = {"actor_keys": ["kind", "vector"], "critic_keys": ["vector", "kind"]}
    sb3 = train(PPO, "MultiInputPolicy", lambda: make_vec_env(lambda: Only(Blind(whole), part), n_envs=2))
    ours = train(
        PPOPlus,
        "MultiInputPolicy",
        lambda: make_vec_env(lambda: Blind(whole), n_envs=2),
        policy_kwargs=SMALL_NET | keys,
    )
    assert_same_training(sb3, ours)


def test_heads_with_different_keys_compute_what_two_policies_of_sb3_compute():
    """To the bit: the actor's answers are those of a policy of SB3 with its keys, the critic's those of another."""
    keys = {"actor_keys": ["kind", "vector"], "critic_keys": ["hidden", "vector"]}
    model = asymmetric(keys=keys)
    batch = batch_of(model)
    actions, values, log_probs = model.policy(batch)
    for head, prefixes in (("actor_keys", ("mlp_extractor.policy", "action_net", "log_std")), ("critic_keys", ())):
        part = spaces.Dict({key: model.observation_space[key] for key in keys[head]})
        env = make_env(observation_space=part)
        sb3 = PPO("MultiInputPolicy", env, policy_kwargs=SMALL_NET, device="cpu").policy
        own = {name: value for name, value in model.policy.state_dict().items() if name in sb3.state_dict()}
        prefixes = prefixes or ("mlp_extractor.value", "value_net")
        sb3.load_state_dict({name: value for name, value in own.items() if name.startswith(prefixes)}, strict=False)
        seen = {key: batch[key] for key in keys[head]}
        if head == "actor_keys":
            assert th.equal(sb3.evaluate_actions(seen, actions)[1], log_probs)
        else:
            assert th.equal(sb3.predict_values(seen), values)


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.parametrize("case", ["plain", BY_KEY, "gtrxl", "beta"])
@pytest.mark.filterwarnings("error:compile=True")
def test_compiled_training_equals_eager_training_to_rounding(case):
    eager, compiled = (asymmetric(case, compile=compile).learn(192) for compile in (False, True))
    assert compiled._execution.gradient_step.n_compilations == 1
    vectors = [model.policy.parameters_to_vector() for model in (eager, compiled, asymmetric(case))]
    assert np.abs(vectors[0] - vectors[2]).max() > 5e-4, "training moved too little to tell"
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-5)


# Without trust, a checkpoint's environments lack what only a pickle holds
@pytest.mark.filterwarnings("ignore:without trust these parts")
@pytest.mark.parametrize("case", ["plain", "lstm"])
def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not_interrupted(case, tmp_path):
    def envs():
        return make_envs(observation_space=spaces.Dict({"hidden": HIDDEN, "vector": BOX}))

    settings = {"keys": {"actor_keys": ["vector"]}, "n_steps": 8, "batch_size": 8}
    whole = asymmetric(case, env=envs(), **settings).learn(96)
    asymmetric(case, env=envs(), **settings).learn(96, [TrainingCheckpoint(1, tmp_path), StopAfter(48)])
    for trusted in (True, False):
        resumed = PPOPlus.resume(tmp_path, envs(), device="cpu", trusted=trusted).continue_learning()
        assert_same_training(whole, resumed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trusted", [True, False])
def test_a_saved_model_is_loaded_with_its_keys(case, trusted, tmp_path):
    model = asymmetric(case).learn(64)
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", device="cpu", trusted=trusted)
    assert loaded.policy.actor_keys == model.policy.actor_keys
    assert loaded.policy.critic_keys == model.policy.critic_keys
    assert_same_training(model, loaded)
    batch = {key: part.numpy() for key, part in batch_of(model).items() if key in model.policy.actor_keys}
    np.testing.assert_array_equal(
        model.predict(batch, deterministic=True)[0], loaded.predict(batch, deterministic=True)[0]
    )


def test_a_policy_that_is_saved_by_itself_keeps_its_keys(tmp_path):
    policy = asymmetric().policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy", device="cpu")
    assert (loaded.actor_keys, loaded.critic_keys) == (policy.actor_keys, policy.critic_keys)


def test_predict_and_evaluate_policy_need_the_actors_keys_alone():
    model = asymmetric("lstm", keys={"actor_keys": ["vector", "kind"]}).learn(64)
    env = make_vec_env(lambda: Only(ToyEnv(observation_space=SPACE), ACTORS), n_envs=2)
    rewards, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert np.isfinite(rewards).all() and min(lengths) > 0
    callback = EvalCallback(env, eval_freq=16, n_eval_episodes=2, verbose=0)
    model.learn(64, callback)
    assert np.isfinite(callback.last_mean_reward)
    alone = {"vector": np.zeros(3, np.float32), "kind": 2, "new": np.zeros(9)}
    assert model.predict(alone)[0].shape == (2,)
    assert isinstance(model.policy.actor_space, spaces.Dict)
    assert list(model.policy.actor_space) == ["kind", "vector"]


def masked_envs(**kwargs):
    space = spaces.Dict({"hidden": HIDDEN, "vector": BOX})
    action_space = MASKED_ACTION_SPACES["discrete"]
    return make_vec_env(
        lambda: MaskInObservation(MaskedEnv(observation_space=space, action_space=action_space)), n_envs=2, **kwargs
    )


def test_a_mask_among_the_observations_goes_with_the_actor():
    env = masked_envs(seed=0)
    model = asymmetric(env=env, keys={"actor_keys": ["vector"]}).learn(128)
    assert model.policy.has_mask_key
    assert model.policy.actor_keys == ("vector",) and model.policy.critic_keys == ("hidden", "vector")
    assert list(model.policy.actor_space) == ["action_mask", "vector"]
    # MaskedEnv refuses invalid actions
    evaluate_policy(model, env, n_eval_episodes=5)
    only = {"vector": np.zeros((1, 3), np.float32), "action_mask": np.array([[0, 0, 1, 0, 0]])}
    assert model.predict(only)[0] == [2]
    with pytest.raises(ValueError, match="lacks the key 'action_mask'"):
        model.predict({"vector": np.zeros(3, np.float32)})


@pytest.mark.parametrize("keys", [{"actor_keys": ["action_mask"]}, {"critic_keys": ["vector", "action_mask"]}])
def test_a_mask_is_no_feature_unless_masks_are_off(keys):
    with pytest.raises(ValueError, match=f"{next(iter(keys))} holds 'action_mask'.*action_masking=False"):
        asymmetric(env=masked_envs(), keys=keys)
    policy = asymmetric(env=masked_envs(), keys=keys, action_masking=False).policy
    assert "action_mask" in (policy.actor_keys if "actor_keys" in keys else policy.critic_keys)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"actor_keys": ["vektor"]}, ValueError, "actor_keys holds 'vektor'.*allowed: .*did you mean 'vector'"),
        ({"critic_keys": ["vector", "x"]}, ValueError, r"critic_keys holds 'x'.*allowed: \['hidden', 'kind'"),
        ({"actor_keys": []}, ValueError, r"actor_keys must hold at least one of the keys \['hidden'.*got \[\]"),
        ({"critic_keys": ()}, ValueError, "critic_keys must hold at least one"),
        ({"actor_keys": "vector"}, TypeError, "actor_keys must be None or a list .*got 'vector'"),
        ({"critic_keys": {"vector"}}, TypeError, "critic_keys must be None or a list"),
        ({"actor_keys": [1]}, TypeError, r"actor_keys must be None or a list .*got \[1\]"),
        (
            {"actor_keys": ["vector"], "share_features_extractor": True},
            ValueError,
            r"share_features_extractor=True needs heads that see the same keys, got actor_keys=\['vector'\]",
        ),
        (
            {"actor_keys": ["vector"], "memory": "lstm", "memory_kwargs": {"shared": True}},
            ValueError,
            r"shared=True needs heads that see the same keys, got actor_keys=\['vector'\]",
        ),
        (
            {"actor_key": ["vector"]},
            TypeError,
            "has no argument 'actor_key'; did you mean 'actor_keys'",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused_before_the_first_step(kwargs, error, message):
    env = make_env(observation_space=SPACE)
    with pytest.raises(error, match=message):
        build(env, policy="MultiInputPolicy", policy_kwargs=kwargs)
    assert env.envs[0].unwrapped.calls["step"] == 0


def test_observations_that_are_no_dict_have_no_keys():
    for name in ("actor_keys", "critic_keys"):
        with pytest.raises(ValueError, match=f"{name} needs Dict observations, got Box"):
            build(policy_kwargs={name: ["vector"]})


def test_a_policy_of_sb3_has_no_keys_for_its_heads():
    class Own(ActorCriticPolicy):
        pass

    with pytest.raises(TypeError, match="Own has no actor_keys; subclass"):
        build(make_env(observation_space=SPACE), policy=Own, policy_kwargs={"actor_keys": ["vector"]})


def test_an_observation_that_lacks_a_key_of_the_actor_is_refused_by_name():
    model = asymmetric(keys={"actor_keys": ["vector", "kind"]})
    with pytest.raises(ValueError, match=r"lacks the key 'vector'.*\['kind', 'vector'\], got \['kind', 'vectr'\]; did"):
        model.predict({"kind": 1, "vectr": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"must be a dict with the keys \['kind', 'vector'\], got ndarray"):
        model.predict(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="tuple to the predict"):
        model.predict(({"kind": 1}, {}))


def deployed():
    return Only(ToyEnv(observation_space=SPACE), ACTORS)


def test_filled_keys_let_a_model_be_loaded_with_an_environment_that_lacks_them(tmp_path):
    normalize = VecNormalize(make_env(2, observation_space=SPACE), norm_obs_keys=["vector", "hidden"])
    model = asymmetric(env=normalize, keys={"actor_keys": ["vector", "kind"]}).learn(64)
    model.save(tmp_path / "model")
    save_vec_normalize(normalize, tmp_path / "normalize.json")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        PPOPlus.load(tmp_path / "model", deployed(), device="cpu")
    envs = make_vec_env(lambda: FillMissingKeys(deployed(), SPACE), n_envs=2)
    env = load_vec_normalize(tmp_path / "normalize.json", envs)
    env.training = False
    for trusted in (True, False):
        loaded = PPOPlus.load(tmp_path / "model", env, device="cpu", trusted=trusted)
        evaluate_policy(loaded, loaded.get_env(), n_eval_episodes=3)
        with pytest.raises(ValueError, match=r"learn needs environments with all keys.*FillMissingKeys"):
            loaded.learn(64)
    model.set_env(env)
    observation = envs.reset()
    assert SPACE.contains({key: part[0] for key, part in observation.items()} | {"kind": observation["kind"][0]})
    assert not observation["hidden"].any() and observation["vector"].any()


def test_filling_keys_needs_spaces_that_agree():
    with pytest.raises(ValueError, match="needs two Dict spaces, got Box"):
        FillMissingKeys(ToyEnv(), SPACE)
    other = spaces.Dict({"vector": HIDDEN, "hidden": HIDDEN})
    with pytest.raises(ValueError, match="the key 'vector' must have the space"):
        FillMissingKeys(deployed(), other)
    extra = FillMissingKeys(deployed(), spaces.Dict({"vector": BOX, "hidden": HIDDEN}))
    assert list(extra.reset(seed=0)[0]) == ["hidden", "vector"]


def test_the_critics_learning_rate_is_that_of_the_critics_extractor_too():
    model = asymmetric(BY_KEY, critic_learning_rate=1e-5)
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in model.policy.optimizer.param_groups]
    assert any(name.startswith("vf_features_extractor") for name in groups[1])
    assert all(name.startswith(("vf_features", "mlp_extractor.value", "value_net")) for name in groups[1])
