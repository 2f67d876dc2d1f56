"""Processes that were launched together, and train apart."""

import warnings

import pytest
from environments import make_env

from sb3_ppo_plus import PPOPlus

SETTINGS = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu"}


@pytest.mark.parametrize("n_processes", ["1", "2"])
def test_a_model_that_was_not_told_of_the_others_says_so(n_processes, monkeypatch):
    launcher = {"RANK": "0", "WORLD_SIZE": n_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PPOPlus("MlpPolicy", make_env(), **SETTINGS).learn(8)
    apart = [each for each in found if "distributed=True makes it one model" in str(each.message)]
    assert len(apart) == (n_processes == "2")
