"""Models without pickles: what is in them, and that they load by themselves."""

import io
import zipfile

import pytest
import torch as th
from environments import make_env
from hostile import Payload
from stable_baselines3 import PPO

from sb3_ppo_plus import PPOPlus, UntrustedFileError, schedules
from sb3_ppo_plus.saving.plain_file import is_without_pickles, without_pickles


@pytest.fixture
def model():
    model = PPOPlus(
        "MlpPolicy",
        make_env(2),
        n_steps=8,
        batch_size=8,
        n_epochs=2,
        learning_rate=schedules.Linear(3e-4),
        policy_kwargs={"net_arch": [8]},
        device="cpu",
        seed=0,
    )
    return model.learn(32)


def bits(model):
    state = model.policy.optimizer.state_dict()["state"]
    optimizer = [value for entry in state.values() for value in entry.values()]
    return [*model.policy.state_dict().values(), *optimizer]


def test_the_same_parameters_and_optimizer_load_without_saying_so(model, tmp_path):
    model.save(tmp_path / "model")
    (tmp_path / "plain.zip").write_bytes(without_pickles(tmp_path / "model.zip"))
    for path in (tmp_path / "plain.zip", tmp_path / "plain", io.BytesIO((tmp_path / "plain.zip").read_bytes())):
        loaded = PPOPlus.load(path, make_env(2), device="cpu")
        assert all(th.equal(ours, theirs) for ours, theirs in zip(bits(loaded), bits(model), strict=True))
        assert loaded.learning_rate == model.learning_rate and loaded.num_timesteps == 32
    loaded.learn(16, reset_num_timesteps=False)
    assert PPOPlus.load(tmp_path / "plain.zip", device="cpu", learning_rate=0.5).learning_rate == 0.5


def test_no_pickle_of_sb3_is_in_the_file(model, tmp_path):
    model.custom = Payload(tmp_path / "mark")
    model.save(tmp_path / "model.zip")
    content = without_pickles(tmp_path / "model.zip")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert not {"data", "pytorch_variables.pth"} & set(archive.namelist())
        # The same model gives the same bytes at any time
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
    assert b"system" not in content.replace(b"system_info", b"")
    with pytest.raises(AssertionError, match="No data found"):
        PPO.load(io.BytesIO(content))
    assert content == without_pickles(io.BytesIO(content)) == without_pickles(tmp_path / "model.zip")


def test_only_models_without_pickles_are_taken_for_such(model, tmp_path):
    model.save(tmp_path / "model.zip")
    assert not is_without_pickles(tmp_path / "model.zip")
    (tmp_path / "none.zip").write_bytes(b"no zip")
    assert not is_without_pickles(tmp_path / "none.zip")
    assert is_without_pickles(io.BytesIO(without_pickles(tmp_path / "model.zip")))
    with pytest.raises(FileNotFoundError):
        PPOPlus.load(tmp_path / "nowhere.zip")


def test_a_model_that_only_pickles_describe_is_refused(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "sb3.zip")
    with pytest.raises(UntrustedFileError, match=r"sb3\.zip has no ppo_plus\.json, so that only its pickles"):
        without_pickles(tmp_path / "sb3.zip")
