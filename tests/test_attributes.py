"""Every attribute of a model is in the table of attributes.py, and is treated as the table says."""

import json
import zipfile
from collections import Counter

import pytest
from environments import MASKED_ACTION_SPACES, MaskedEnv
from models import build
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_plus import PPOPlus, TrainingCheckpoint, attributes

KNOWN = {name for names in attributes.ATTRIBUTES.values() for name in names}


def masked_envs():
    return DummyVecEnv([lambda: MaskedEnv(MASKED_ACTION_SPACES["discrete"])] * 2)


MODELS = {
    "default": dict,
    "compiled": lambda: {"compile": True},
    "memory": lambda: {"policy": "MlpLstmPolicy"},
    "masks and schedules": lambda: {"env": masked_envs(), "ent_coef": "lin_0.1", "critic_learning_rate": "cos_1e-3"},
    "normalised": lambda: {"env": VecNormalize(masked_envs()), "on_non_finite": "skip", "target_kl": 0.01},
}


@pytest.mark.parametrize("case", MODELS)
def test_every_attribute_is_in_the_table(case, tmp_path, graphs_without_code):
    model = build(**MODELS[case]())
    assert vars(model).keys() - {"action_noise"} <= KNOWN, "before learn"
    model.learn(128, TrainingCheckpoint(1, tmp_path / "runs"))
    assert vars(model).keys() <= KNOWN, "after learn"
    model.predict(model.observation_space.sample())
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    assert vars(loaded).keys() <= KNOWN, "after load"


def test_the_table_names_no_attribute_twice_and_none_that_is_gone():
    counts = Counter(name for names in attributes.ATTRIBUTES.values() for name in names)
    assert not [name for name, count in counts.items() if count > 1]
    model = build()
    model.learn(64)
    assert KNOWN - vars(model).keys() == set()


def test_a_saved_model_holds_what_the_table_says(tmp_path):
    model = build()
    model.learn(64)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        saved = json.loads(archive.read("data")).keys()
        described = json.loads(archive.read("ppo_plus.json"))
    assert saved == KNOWN - set(attributes.NOT_SAVED)
    assert tuple(described["counters"]) == attributes.COUNTERS
    assert tuple(described["flags"]) == attributes.FLAGS


def test_a_subclass_may_have_more_state(tmp_path):
    class Counting(PPOPlus):
        TRAINING_STATE = (*PPOPlus.TRAINING_STATE, "n_seen")
        n_seen = 0

        def train(self):
            self.n_seen += 1
            super().train()

    env = build().get_env()
    model = Counting("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu")
    model.learn(64, TrainingCheckpoint(1, tmp_path / "runs"))
    resumed = Counting.resume(tmp_path / "runs", env)
    assert resumed.n_seen == model.n_seen > 0
