"""Every snippet of the README runs as it stands, but for the number of timesteps."""

import ast
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from environments import ToyEnv
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_plus import PPOPlus

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
TIMESTEPS = re.compile(r"(?<=learn\()[\d_]+")
POLICY_KWARGS = re.findall(r"`policy_kwargs=(\{.*?\})`", README)

VECTOR = spaces.Box(-1, 1, (24,), np.float32)
IMAGE = spaces.Box(0, 255, (7, 7, 3), np.uint8)


def run(block, folder, monkeypatch):
    """Run a block as a script in a folder, with one rollout's timesteps."""
    short, n_replaced = TIMESTEPS.subn("1", block)
    assert n_replaced > 0, "nothing is trained"
    (folder / "snippet.py").write_text(short)
    monkeypatch.chdir(folder)
    return runpy.run_path("snippet.py", run_name="__main__")


def test_every_block_of_python_is_found():
    assert README.count("```python") == len(BLOCKS) == README.count("```") / 2 == 3


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.parametrize("block", BLOCKS, ids=["ten lines", "runs that survive", "loading without trust"])
def test_a_block_runs_as_it_stands(block, tmp_path, monkeypatch):
    model = run(block, tmp_path, monkeypatch)["model"]
    assert isinstance(model, PPOPlus) and model.num_timesteps > 0
    if "latest_checkpoint" in block:
        # Started again, it takes the other branch
        resumed = run(block, tmp_path, monkeypatch)["model"]
        assert resumed.last_checkpoint is not None and resumed.num_timesteps == model.num_timesteps


@pytest.mark.parametrize("text", POLICY_KWARGS)
def test_the_policy_kwargs_of_the_table_build_a_policy(text):
    space = VECTOR
    if "impala_cnn" in text:
        space = spaces.Dict({"image": IMAGE, "vector": VECTOR}) if '"image"' in text else IMAGE
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    env = make_vec_env(lambda: ToyEnv(observation_space=space))
    PPOPlus(policy, env, n_steps=64, policy_kwargs=ast.literal_eval(text), device="cpu")


def test_the_table_has_policy_kwargs():
    assert len(POLICY_KWARGS) >= 5
