"""Pytest plugin for `make test-sb3`: Stable-Baselines3's own tests, with PPO replaced by PPOPlus.

Load it by ``-p sb3_suite``, before the test modules import PPO. No test is deselected: the two that match the class's
name, test_ppo_warnings ("You are trying to run PPO on the GPU") and test_tensorboard[ppo] (folder PPO_1), find it.
"""

import stable_baselines3

from sb3_ppo_plus import PPOPlus

SB3_VERSION = "2.9.2"

PPOPlus.__name__ = "PPO"
PPOPlus.learn.__defaults__ = tuple("PPO" if value == "PPOPlus" else value for value in PPOPlus.learn.__defaults__)
stable_baselines3.PPO = stable_baselines3.ppo.PPO = stable_baselines3.ppo.ppo.PPO = PPOPlus


def pytest_report_header() -> list[str]:
    version = stable_baselines3.__version__
    header = [f"stable_baselines3 {version}, with {PPOPlus.__module__}.{PPOPlus.__qualname__} as its PPO"]
    if version != SB3_VERSION:
        header.append(f"written for the tests of SB3 {SB3_VERSION}")
    return header
