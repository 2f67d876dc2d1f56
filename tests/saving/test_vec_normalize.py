import json
import pickle

import numpy as np
import pytest
from environments import BOX, IMAGE, SMALL_DICT, make_env
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_ppo_plus import UntrustedFileError, load_vec_normalize, save_vec_normalize
from sb3_ppo_plus.untrusted.strict_json import encode_array

SPACES = {
    "box": (BOX, {}),
    "settings": (BOX, {"clip_obs": 3.0, "clip_reward": np.inf, "gamma": 0.9, "epsilon": 1e-4, "norm_reward": False}),
    "no observations": (BOX, {"norm_obs": False}),
    "not training": (BOX, {"training": False}),
    "image": (IMAGE, {}),
    "dict": (SMALL_DICT, {"norm_obs_keys": ["vector"]}),
    "all keys": (spaces.Dict({"b": BOX, "a": BOX}), {}),
}


def normalized(observation_space=BOX, n_steps=5, **settings):
    env = VecNormalize(make_env(2, observation_space=observation_space), **settings)
    env.seed(0)
    env.reset()
    for _ in range(n_steps):
        env.step(np.stack([env.action_space.sample()] * 2))
    return env


@pytest.mark.parametrize(("observation_space", "settings"), SPACES.values(), ids=SPACES)
def test_a_loaded_normaliser_equals_that_of_sb3s_own_file(observation_space, settings, tmp_path):
    env = normalized(observation_space, **settings)
    save_vec_normalize(VecFrameStack(env, 2) if observation_space is BOX else env, tmp_path / "plain.json")
    env.save(str(tmp_path / "pickle"))
    loaded = [
        load_vec_normalize(tmp_path / "plain.json", make_env(2, observation_space=observation_space)),
        load_vec_normalize(tmp_path / "pickle", make_env(2, observation_space=observation_space), trusted=True),
    ]
    names = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")
    for name in names:
        assert getattr(loaded[0], name) == getattr(loaded[1], name) == getattr(env, name)
    outputs = []
    for each in loaded:
        each.seed(1)
        first = each.reset()
        actions = np.stack([each.action_space.low] * 2)
        outputs.append([first, *(each.step(actions)[:2] for _ in range(10))])
        assert each.observation_space == env.observation_space
    np.testing.assert_equal(*outputs)
    assert [path.name for path in tmp_path.iterdir()].count("plain.json.part") == 0


def test_an_env_without_a_vec_normalize_is_refused(tmp_path):
    with pytest.raises(ValueError, match="env must be or contain a VecNormalize"):
        save_vec_normalize(make_env(), tmp_path / "plain.json")


def test_a_subclass_is_refused(tmp_path):
    class Own(VecNormalize):
        pass

    with pytest.raises(ValueError, match="Own"):
        save_vec_normalize(Own(make_env()), tmp_path / "plain.json")


def test_pickles_are_refused_unless_trusted(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path / "mark").touch, ()

    (tmp_path / "evil").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UntrustedFileError, match="needs trusted=True and runs the code in it"):
        load_vec_normalize(tmp_path / "evil", make_env())
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("saved", "env"),
    [
        ("box", spaces.Box(-1, 1, (4,))),
        ("box", SMALL_DICT),
        ("dict", BOX),
        ("dict", spaces.Dict({"other": BOX})),
        ("dict", spaces.Dict({"vector": spaces.Box(-1, 1, (5,))})),
        ("box", spaces.Discrete(3)),
    ],
)
def test_statistics_of_other_observations_are_refused(saved, env, tmp_path):
    space, settings = SPACES[saved]
    save_vec_normalize(normalized(space, **settings), tmp_path / "plain.json")
    with pytest.raises(ValueError):
        load_vec_normalize(tmp_path / "plain.json", make_env(observation_space=env))


def statistics(mean, var=1.0, count=1.0, dtype=np.float64):
    return {
        name: encode_array(np.asarray(value, dtype)) for name, value in (("mean", mean), ("var", var), ("count", count))
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "sb3_ppo_plus.vec_normalize/2"),
        ("training", 1),
        ("norm_obs", None),
        ("clip_obs", -1),
        ("clip_obs", "x"),
        ("gamma", 2),
        ("gamma", "inf"),
        ("epsilon", True),
        ("norm_obs_keys", "a"),
        ("obs_rms", {}),
        ("obs_rms", statistics([0.0] * 4, [1.0] * 4)),
        ("obs_rms", statistics([np.nan] * 3, [1.0] * 3)),
        ("obs_rms", statistics([0.0] * 3, [-1.0] * 3)),
        ("obs_rms", statistics([0.0] * 3, [1.0] * 3, np.inf)),
        ("obs_rms", statistics([0.0] * 3, [1.0] * 3, dtype=np.float32)),
        ("ret_rms", statistics([0.0])),
        ("ret_rms", "x"),
    ],
    ids=str,
)
def test_wrong_and_missing_entries_are_refused(name, value, tmp_path):
    save_vec_normalize(normalized(), tmp_path / "plain.json")
    description = json.loads((tmp_path / "plain.json").read_text())
    (tmp_path / "altered.json").write_text(json.dumps(description | {name: value}))
    with pytest.raises(UntrustedFileError):
        load_vec_normalize(tmp_path / "altered.json", make_env())
    del description[name]
    (tmp_path / "altered.json").write_text(json.dumps(description))
    with pytest.raises(UntrustedFileError, match=f"lacks '{name}'"):
        load_vec_normalize(tmp_path / "altered.json", make_env())
