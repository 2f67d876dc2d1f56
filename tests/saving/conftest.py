"""A model file that tests alter."""

import io
import zipfile

import pytest
from environments import SMALL_NET, make_env

from sb3_ppo_plus import PPOPlus


@pytest.fixture(scope="module")
def model_file():
    model = PPOPlus(
        "MlpPolicy", make_env(), n_steps=32, batch_size=16, n_epochs=1, policy_kwargs=SMALL_NET, device="cpu"
    )
    file = io.BytesIO()
    model.learn(32).save(file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
