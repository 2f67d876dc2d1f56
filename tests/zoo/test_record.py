"""``record``: the frames of the videos, which model acts in them, and no trust in the log folder."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import imageio.v3 as iio
import mujoco
import numpy as np
import pytest
from hostile import Payload
from short_runs import copy, files_of, train
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_plus import PPOPlus, zoo
from sb3_ppo_plus.zoo import record
from sb3_ppo_plus.zoo.run_folder import act

ENV = "CartPole-v1"
RUN = Path(f"logs/ppo_plus/{ENV}_1")
RECORD = ["record", "--env", ENV, "--device", "cpu", "-n", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, ENV, "--save-freq", "64")
    return files_of(folder)


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(run, tmp_path)
    return tmp_path / RUN


def frames_of(path):
    frames = iio.imread(path)
    # What is black or white all over shows no environment
    assert all(frame.std() > 10 for frame in frames)
    return frames


def distance(frame, image):
    """Mean difference of pixels, which the video's compression makes larger than 0."""
    return np.abs(frame.astype(float) - image).mean()


def images(model_path, n_steps, seed=0):
    """What the environment shows while a model acts in it."""
    model = PPOPlus.load(model_path, device="cpu", trusted=False)
    env = DummyVecEnv([lambda: gym.make(ENV, render_mode="rgb_array")])
    env.seed(seed)
    observations, shown = env.reset(), []
    for _ in range(n_steps):
        shown.append(env.render())
        observations, *_ = env.step(model.predict(observations, deterministic=True)[0])
    return [*shown, env.render()]


def test_the_shell_records_what_the_environment_shows(folder):
    command = [sys.executable, "-m", "sb3_ppo_plus.zoo", *RECORD, "-n", "40"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    video = RUN / "videos" / f"final-model-ppo_plus-{ENV}-step-0-to-step-40.mp4"
    assert str(video) in output
    frames, expected = frames_of(video), images(RUN / f"{ENV}.zip", 40)
    assert frames.shape == (41, 400, 600, 3)
    assert iio.immeta(video)["fps"] == gym.spec(ENV).make().metadata["render_fps"]
    for frame, image in zip(frames, expected, strict=True):
        assert distance(frame, image) < 2
    # Such a difference would be seen: first and last frame are further apart than frame and image
    assert distance(frames[0], expected[-1]) > 2 * max(map(distance, frames, expected))


@pytest.mark.parametrize(
    ("flags", "model", "prefix"),
    [
        (["--load-best"], "best_model", "best-model"),
        (["--load-checkpoint", "64"], "rl_model_64_steps", "checkpoint-64"),
        (["--load-last-checkpoint"], "rl_model_128_steps", "checkpoint-128"),
    ],
)
def test_the_models_of_a_run_are_recorded_by_the_rl_zoos_flags(flags, model, prefix, folder, capsys):
    zoo.main([*RECORD, *flags, "-o", "elsewhere"])
    assert frames_of(f"elsewhere/{prefix}-ppo_plus-{ENV}-step-0-to-step-4.mp4").shape[0] == 5
    assert f"Loading {RUN / model}.zip" in capsys.readouterr().out
    assert not (RUN / "videos").exists()


def test_several_environments_are_shown_together(folder):
    zoo.main([*RECORD, "--n-envs", "2", "--stochastic", "-n", "3"])
    assert frames_of(next((RUN / "videos").glob("*.mp4"))).shape == (4, 800, 600, 3)


def test_training_is_one_video_of_all_models_with_their_names(folder):
    zoo.main([*RECORD, "--training", "--gif", "-o", "out"])
    parts = [f"checkpoint-{n}" for n in (64, 128)] + ["final-model", "best-model"]
    videos = [frames_of(f"out/{part}-ppo_plus-{ENV}-step-0-to-step-4.mp4") for part in parts]
    joined = frames_of("out/training.mp4")
    assert joined.shape == (4 * 5, 400, 600, 3)
    for index, frames in enumerate(videos):
        shown = joined[index * 5 + 3]
        assert distance(shown[80:], frames[3][80:]) < 2
        assert distance(shown[:60, 200:400], frames[3][:60, 200:400]) > 10
    assert frames_of("out/training.gif").shape[1:] == (400, 600, 3)
    assert sorted(path.name for path in Path("out").iterdir())[-2:] == ["training.gif", "training.mp4"]


def test_other_files_in_the_output_folder_stay(folder):
    (folder / "videos").mkdir()
    (folder / "videos" / "mine.txt").write_text("mine")
    for path in folder.glob("rl_model*"):
        path.unlink()
    zoo.main([*RECORD, "--training", "-n", "2"])
    assert (folder / "videos" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("env_id", "flags", "settings"),
    [
        ("PendulumNoVel-v1", [], ["normalize:True", "n_steps:64", "batch_size:64"]),
        ("Taxi-v4", ["--stochastic"], ["env_wrapper:['sb3_ppo_plus.masking.MaskFromInfo']"]),
        ("Pendulum-v1", [], ["env_wrapper:['sb3_ppo_plus.ResumableEnv']", "frame_stack:2"]),
    ],
    ids=["memory and normaliser", "masks", "ResumableEnv and stacked frames"],
)
def test_our_policies_and_wrappers_are_recorded(env_id, flags, settings, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    run = train(tmp_path, env_id, settings=settings)
    zoo.main(["record", "--env", env_id, "--device", "cpu", "-n", "4", *flags])
    assert len(frames_of(next((run / "videos").glob("*.mp4")))) == 5
    assert not [warning for warning in recwarn if "predicts without" in str(warning.message)]


def test_states_of_a_memory_are_handed_on_and_begin_anew_with_an_episode():
    seen = []

    class Remembers:
        def predict(self, observations, state, episode_start, deterministic):
            seen.append((state, episode_start.tolist(), deterministic))
            return np.zeros(1, dtype=int), (1 if state is None else state + 1)

    # A pole that is always pushed to the left falls after 9 or 10 steps
    env = DummyVecEnv([lambda: gym.make(ENV)])
    env.seed(0)
    act(Remembers(), env, 25, deterministic=False)
    assert [state for state, *_ in seen] == [None, *range(1, 25)]
    starts = [step for step, (_, start, _) in enumerate(seen) if start == [True]]
    assert starts[0] == 0 and len(starts) == 3 and not any(deterministic for *_, deterministic in seen)


def test_nothing_of_the_log_folder_is_run(folder):
    mark = Payload(Path("mark").absolute())
    (folder / "best_model.zip").write_bytes(pickle.dumps(mark))
    with pytest.raises(SystemExit, match="With --trust, record runs whatever code"):
        zoo.main([*RECORD, "--load-best"])
    (folder / ENV / "config.yml").write_text("normalize: !!python/object/apply:os.system ['touch mark']\n")
    with pytest.raises(SystemExit, match=r"config\.yml: normalize must be"):
        zoo.main(RECORD)
    (folder / ENV / "config.yml").write_text("normalize: \"__import__('os').system('touch mark')\"\n")
    (folder / ENV / "vecnormalize.pkl").write_bytes(pickle.dumps(mark))
    with pytest.raises(SystemExit, match=r"vecnormalize\.json is missing"):
        zoo.main(RECORD)
    assert not Path("mark").exists()
    with pytest.raises(Exception, match=r"not subscriptable|assignment"):
        zoo.main([*RECORD, "--trust"])
    assert Path("mark").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algo", "sac"], "Only models of ppo_plus can be loaded without trust"),
        (["--algo", "ppo++"], "--algo must be one of"),
        (["--exp-id", "7"], "CartPole-v1_7 folder was not found"),
        (["--load-checkpoint", "5"], "No model found for ppo_plus on CartPole-v1"),
        (["--training", "--exp-id", "7"], "CartPole-v1_7 folder was not found"),
    ],
)
def test_what_is_not_there_is_named(flags, message, folder):
    with pytest.raises(SystemExit, match=message):
        zoo.main([*RECORD, *flags])


@pytest.mark.parametrize(
    "flags", [["-n", "0"], ["--training", "--load-best"], ["--load-best", "--load-checkpoint", "64"], ["--unknown"]]
)
def test_flags_that_make_no_sense_are_named(flags, folder, capsys):
    with pytest.raises(SystemExit):
        zoo.main([*RECORD, *flags])
    assert flags[0].replace("-n", "--n-timesteps", flags[0] == "-n") in capsys.readouterr().err


def test_an_environment_that_renders_no_images_is_an_error():
    class Blind(gym.Env):
        observation_space = action_space = gym.spaces.Discrete(2)

    with pytest.raises(SystemExit, match="renders no images: its render_modes are"):
        record.record_video(None, DummyVecEnv([Blind]), Path("out"), "name", 3, deterministic=True)


def test_mujoco_without_a_display_is_told_what_to_do(tmp_path):
    class Windowless(gym.Env):
        observation_space = action_space = gym.spaces.Discrete(2)
        metadata: ClassVar = {"render_modes": ["rgb_array"]}
        render_mode = "rgb_array"

        def reset(self, **kwargs):
            return 0, {}

        def render(self):
            raise mujoco.FatalError("gladLoadGL error")

    with pytest.raises(SystemExit, match=r"MuJoCo cannot render \(gladLoadGL error\): .* set MUJOCO_GL=egl"):
        record.record_video(None, DummyVecEnv([Windowless]), tmp_path, "name", 3, deterministic=True)


def test_models_of_the_rl_zoos_other_algorithms_are_recorded_with_trust(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.main(["train", "--algo", "dqn", "--env", ENV, "-n", "20", "--eval-freq", "-1", "--device", "cpu", "-f", "logs"])
    zoo.main([*RECORD, "--algo", "dqn", "--trust", "-n", "3"])
    assert len(frames_of(next(Path(f"logs/dqn/{ENV}_1/videos").glob("*.mp4")))) == 4
