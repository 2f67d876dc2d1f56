"""``vectorized: true`` in an entry: environments of gymnasium.vector."""

from pathlib import Path

import gymnasium as gym
import pytest
from states import assert_same_bits
from zoo_runs import ROLLOUT, results_of, training

from sb3_ppo_plus import zoo


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(env_id, *params, folder):
    flags = ["--log-folder", folder, "--env-kwargs", "max_episode_steps:20"]
    zoo.main(training(env_id, 6, *flags, params=params))
    return next(Path(folder).glob("ppo_plus/*_1"))


def test_environments_without_vector_code_train_to_the_same_bits():
    ordinary = trained("Acrobot-v1", folder="ordinary")
    vectorized = trained("Acrobot-v1", "vectorized:True", folder="vectorized")
    results = [results_of(folder) for folder in (vectorized, ordinary)]
    for each in results:
        # It holds the environment's attributes too; vecnormalize.json has the statistics alone
        each.pop("vecnormalize.pkl")
    assert_same_bits(*results)
    assert {path.name for path in vectorized.iterdir()} == {path.name for path in ordinary.iterdir()}


def test_vector_code_of_an_environment_is_used_and_the_run_goes_on(monkeypatch):
    made = []
    make_vec = gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda *args, **kwargs: made.append(args) or make_vec(*args, **kwargs))
    run = trained("CartPole-v1", "vectorized:True", folder="logs")
    zoo.main(["resume", str(run), "--n-timesteps", str(12 * ROLLOUT)])
    assert [name for name, _, _ in made] == ["CartPole-v1"] * 2
    assert "vectorized" in (run / "CartPole-v1" / "config.yml").read_text()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["vectorized:'yes'"], "vectorized must be true or false, got 'yes'"),
        (["vectorized:True", "env_wrapper:'gymnasium.wrappers.FlattenObservation'"], "no env_wrapper, got"),
    ],
)
def test_other_values_and_wrappers_are_errors(params, message):
    with pytest.raises(ValueError, match=message):
        trained("CartPole-v1", *params, folder="logs")
