"""``resume`` goes on with a run that was killed, and the result has the bits of the run that was not."""

from pathlib import Path

import pytest
from states import assert_same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from zoo_runs import ROLLOUT, killed_in, results_of, training, zoo_in

CARTPOLE = Path("logs/ppo_plus/CartPole-v1_1")
# More than one update after the last checkpoint, and in the middle of an episode
KILLED_AT = 5 * ROLLOUT + 20
MINIGRID = {"params": ["env_wrapper:minigrid.wrappers.FlatObsWrapper"]}


def folder_of(cwd, env_id):
    (folder,) = (cwd / "logs/ppo_plus").glob(f"{env_id}_*")
    return folder


def killed_and_resumed(cwd, *arguments, resume=()):
    """Run twice, once with a kill; return both folders and what resume has printed."""
    env_id = arguments[2]
    for name in ("whole", "killed"):
        (cwd / name).mkdir()
    zoo_in(cwd / "whole", *arguments)
    killed_in(cwd / "killed", KILLED_AT, *arguments)
    folder = folder_of(cwd / "killed", env_id)
    assert not (folder / f"{env_id}.zip").exists()
    output = zoo_in(cwd / "killed", "resume", folder.relative_to(cwd / "killed"), *resume)
    return folder_of(cwd / "whole", env_id), folder, output


def assert_same_results(whole, resumed):
    assert_same_bits(results_of(resumed), results_of(whole))


def scalars(logs):
    """The values in TensorBoard's files by name and step, but for times."""
    events = EventAccumulator(str(logs))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("time/")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def test_a_killed_run_goes_on_with_its_bits_and_logs(tmp_path):
    flags = ["--tensorboard-log", "tb", "--save-freq", "32", "--progress"]
    whole, resumed, output = killed_and_resumed(tmp_path, *training("CartPole-v1", 6, *flags))
    assert_same_results(whole, resumed)
    assert "Warning" not in output
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if "checkpoint_" not in str(path)}
    assert names == {str(path.relative_to(resumed)) for path in resumed.rglob("*") if "checkpoint_" not in str(path)}
    # TensorBoard shows each step once, from two files of one folder
    logs = Path("tb/CartPole-v1/PPOPlus_1")
    assert len(list((tmp_path / "killed/tb").rglob("*tfevents*"))) == 2
    assert len(list((tmp_path / "killed" / logs).glob("*tfevents*"))) == 2
    assert_same_bits(scalars(tmp_path / "killed" / logs), scalars(tmp_path / "whole" / logs))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("env_id", "flags", "settings"),
    [
        ("LunarLander-v3", [], {}),
        ("BipedalWalker-v3", [], {}),
        ("HalfCheetah-v5", ["--env-kwargs", "max_episode_steps:40"], {}),
        ("MiniGrid-Empty-5x5-v0", ["--gym-packages", "minigrid", "--env-kwargs", "max_steps:30"], MINIGRID),
        ("Pendulum-v1", ["--vec-env", "subproc", "--env-kwargs", "max_episode_steps:40"], {}),
    ],
)
def test_runs_of_other_environments_go_on_with_their_bits(env_id, flags, settings, tmp_path):
    whole, resumed, _ = killed_and_resumed(tmp_path, *training(env_id, 6, *flags, **settings))
    assert_same_results(whole, resumed)
