"""Tuple and Dict actions in the zoo."""

import gymnasium as gym
import numpy as np
from hybrid_cases import CHOOSING, MaskedHybridToy
from short_runs import train

from sb3_ppo_plus import zoo


def test_an_environment_with_a_tuple_of_actions_is_trained_and_enjoyed(tmp_path, monkeypatch, capsys):
    gym.register("HybridToy-v0", lambda **kwargs: MaskedHybridToy(CHOOSING, **kwargs))
    try:
        used_parts = "policy_kwargs:dict(action_dist='beta', used_parts={'0': [['1'], ['2', '3'], []]})"
        run = train(tmp_path, "HybridToy-v0", settings=[used_parts])
        assert np.load(run / "evaluations.npz")["results"].shape[1] == 2
        monkeypatch.chdir(tmp_path)
        # Without trust, with the masks that the environment insists on
        zoo.main(["enjoy", "--env", "HybridToy-v0", "--device", "cpu", "--no-render", "-n", "40"])
        assert "Episode Reward" in capsys.readouterr().out
    finally:
        gym.registry.pop("HybridToy-v0")
