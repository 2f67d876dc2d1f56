"""Every example runs, with few steps, and does what it says."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus, export_policy

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} & names


def test_demo(capsys):
    stale = Path("logs/demo/99.monitor.csv")
    stale.parent.mkdir(parents=True)
    stale.touch()
    mean_reward = load_example("demo").main(timesteps=2_000)
    assert 8 <= mean_reward <= 500
    assert f"{mean_reward:.1f} +/-" in capsys.readouterr().out
    assert Path("logs/demo/model.zip").stat().st_size > 0
    assert Path("logs/demo/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not stale.exists(), "an earlier run's episodes would be in the curve"


def test_torch_envs():
    # test_torch_envs.py compares them with Gymnasium's
    assert load_example("torch_envs").main(timesteps=20_000, n_envs=16, compile=False, device="cpu") > 30


def test_drop_in():
    assert load_example("drop_in").main(timesteps=2_048) is True


def test_resume_training(capsys):
    assert load_example("resume_training").main(timesteps=4_096) is True
    assert "stopped by SIGTERM at 2048 steps" in capsys.readouterr().out


@pytest.mark.heavy
def test_ray_train(monkeypatch, capsys):
    ray = pytest.importorskip("ray", reason="Ray Train is not installed: pip install -e '.[ray]'")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    try:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        pytest.skip(f"Ray cannot start on this machine: {error}")
    try:
        assert load_example("ray_train").main(timesteps=4_096) is True
    finally:
        ray.shutdown()
    assert "mean return -" in capsys.readouterr().out


WITHOUT_TRAINING = """
import runpy, sys
for name in ("torch", "stable_baselines3", "sb3_ppo_plus"):
    sys.modules[name] = None
sys.argv = ["exported_policy.py", "policy.onnx", "--env", "Pendulum-v1", "--episodes", "2"]
runpy.run_path(PATH, run_name="__main__")
"""


def test_exported_policy():
    """It acts as the model does, with memory and normaliser, in a process that cannot import PyTorch or PPOPlus."""
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0))
    settings = {"n_steps": 64, "batch_size": 32, "seed": 0, "device": "cpu"}
    model = PPOPlus("MlpPolicy", env, policy_kwargs={"memory": "gru", "memory_kwargs": {"hidden_size": 16}}, **settings)
    model.learn(256)
    export_policy(model, "policy.onnx", env)
    code = f"PATH = {str(EXAMPLES / 'exported_policy.py')!r}{WITHOUT_TRAINING}"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(re.search(r"test vector: (\S+)", output)[1]) < 1e-5
    expected = []
    for episode in range(2):
        pendulum, state, total, done = gym.make("Pendulum-v1"), None, 0.0, False
        observation, _ = pendulum.reset(seed=episode)
        while not done:
            action, state = model.predict(env.normalize_obs(observation), state, deterministic=True)
            observation, reward, _, done, _ = pendulum.step(action)
            total += float(reward)
        expected.append(total)
    np.testing.assert_allclose(json.loads(re.search(r"episodes: (.*)", output)[1]), expected, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:the run is finished")
def test_torchrun(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    example = load_example("torchrun")
    first = example.main(timesteps=4_096)
    assert (first.num_timesteps, first.n_envs, first.distributed) == (4_096, 8, False)
    again = example.main(timesteps=4_096)
    assert again.num_timesteps == 4_096 and again.last_checkpoint is not None
    assert "Resumed from" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:worker . of 2 of the SubprocVecEnv")
def test_hanging_workers(capsys):
    assert load_example("hanging_workers").main(timesteps=1_024) == 2
    assert "2 workers were started anew in 1024 steps" in capsys.readouterr().out


def test_schedules(capsys):
    load_example("schedules").main(timesteps=1_024)
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["learning_rate"] == ["0", "0.001", "0.00089", "0.00054", "0.00016", "0"]
    assert rows["clip_range"][:4] == ["0.2", "0.19", "0.16", "0.12"]


def test_bounded_actions(capsys):
    mean_rewards = load_example("bounded_actions").main(timesteps=4_096)
    assert all(-2000 < mean_reward < 0 for mean_reward in mean_rewards.values())
    printed = re.findall(r"(\w+) +-\d+, actions in \[(.+), (.+)\]", capsys.readouterr().out)
    assert [action_dist for action_dist, _, _ in printed] == ["beta", "squashed_gaussian"]
    assert all(-2 < float(low) < -1 < 1 < float(high) < 2 for _, low, high in printed)


def test_transformer_partial_observation():
    example = load_example("transformer_partial_observation")
    env = example.make_env(n_envs=2, seed=0)
    assert env.observation_space.shape == (16,)
    first = env.reset()
    assert np.count_nonzero(first[:, :14]) == 0
    states = np.array([cartpole.state for cartpole in env.get_attr("unwrapped")], np.float32)
    np.testing.assert_array_equal(first[:, 14:], states[:, [0, 2]])
    assert 8 <= example.main(timesteps=2_048) <= 500


def test_cnn_pixels():
    example = load_example("cnn_pixels")
    env = example.make_env()
    image, _ = env.reset(seed=0)
    assert env.observation_space.contains(image)
    assert np.count_nonzero(image) == 2
    assert -0.4 <= example.main(timesteps=512) <= 1


def test_normalize_eval_checkpoint():
    mean_reward = load_example("normalize_eval_checkpoint").main(timesteps=4_096)
    assert -2000 < mean_reward < 0
    files = {path.name for path in Path("logs/normalize_eval_checkpoint").iterdir()}
    assert {"best_model.zip", "evaluations.npz", "checkpoint_4080_steps.zip"} <= files


def test_logging_tensorboard_csv():
    example = load_example("logging_tensorboard_csv")
    last = example.main(timesteps=1_024)
    assert all(np.isfinite(float(last[name])) for name in example.ADDED)
    assert list(Path("logs/logging").glob("events.out.tfevents.*"))


def test_continue_from_sb3(capsys):
    assert 8 <= load_example("continue_from_sb3").main(timesteps=4_096) <= 500
    assert capsys.readouterr().out.splitlines()[-1].endswith("after 4096 steps")


def test_hybrid_actions(capsys):
    example = load_example("hybrid_actions")
    env = example.Squeezed(example.Course())
    env.reset(seed=0)
    assert env.action(np.array([-1.0, 0.1, 0.2, 0.3, 0.4])) == {
        "move": 0,
        "length": {"walk": [0.1], "hop": [0.2], "leap": [0.3], "climb": [0.4]},
    }
    scores = example.main(timesteps=2_048, seeds=2)
    assert all(len(of_seeds) == 2 and 0 <= min(of_seeds) <= 20 for of_seeds in scores.values())
    assert "used parts   obstacles passed: " in capsys.readouterr().out


def test_masked_puzzle(capsys):
    example = load_example("masked_puzzle")
    env = example.Queens(6)
    env.reset(seed=0)
    env.columns = [1, 3]
    # 1 and 3 stand in the way below them, 0 to 5 are reached by the diagonals from (0, 1) and (1, 3)
    assert env.action_masks().tolist() == [True, False, False, False, False, True]
    assert env.step(5)[1:4] == (0.1, False, False)
    assert env.step(0)[1:4] == (0.1, False, False)
    assert env.step(2)[1:4] == (0.1, False, False)
    board, reward, is_over, _, _ = env.step(4)
    assert (reward, is_over) == (1.1, True)
    assert board.reshape(6, 6).sum() == 6
    shares = example.main(timesteps=2_048)
    assert shares.keys() == {"with masks", "without"}
    assert capsys.readouterr().out.count("of the boards are full") == 2


def test_asymmetric_critic(capsys):
    example = load_example("asymmetric_critic")
    assert list(example.Boat(has_current=False).reset(seed=0)[0]) == ["boat"]
    returns = example.main(timesteps=2_048, n_seeds=1, file=Path("figure.png"))
    assert returns.keys() == example.CRITICS.keys() and all(np.isfinite(each).all() for each in returns.values())
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
    assert "critic sees the current" in capsys.readouterr().out


def test_symmetry(capsys):
    example = load_example("symmetry")
    env = example.Rower()
    env.reset(seed=0)
    boat, action = env.observe(), np.array([0.3, -0.8])
    mirrored, actions = example.mirror(*(th.as_tensor(part[None]) for part in (boat, action)))
    env.heading, env.turning, env.offset = -env.heading, -env.turning, -env.offset
    env.angles, env.rates = env.angles[::-1], env.rates[::-1]
    np.testing.assert_allclose(env.observe(), mirrored[0], atol=1e-6)
    # The mirrored boat goes where the mirror image of the boat goes
    ahead = env.step(actions[0].numpy())
    env.reset(seed=0)
    observation, reward, *_ = env.step(action)
    then, _ = example.mirror(th.as_tensor(observation[None]), actions)
    np.testing.assert_allclose(ahead[0], then[0], atol=1e-6)
    assert ahead[1] == pytest.approx(reward)
    needed = example.main(timesteps=4_096, n_seeds=1, file=Path("figure.png"))
    assert needed == {"without symmetry": [np.inf], "with symmetry": [np.inf]}
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
    assert "mean return at the end" in capsys.readouterr().out


def test_load_untrusted(capsys):
    assert -2000 < load_example("load_untrusted").main(timesteps=2_048) < 0
    assert "learning_rate is 'the function main.<locals>.<lambda>'" in capsys.readouterr().out


def test_memory_without_velocities():
    example = load_example("memory_without_velocities")
    for env_id, n_positions in (("CartPole-v1", 2), ("Pendulum-v1", 2), ("LunarLander-v3", 5)):
        assert example.make_env(env_id, 1, seed=0).reset().shape == (1, n_positions)
    assert 8 <= example.main(timesteps=1_024) <= 500
    assert -2000 < example.main("Pendulum-v1", "gtrxl", timesteps=1_600) < 0


def test_memory_tasks():
    example = load_example("memory_tasks")
    assert 0 <= example.main("TMaze-v0", "none", timesteps=2_016) <= 1
    assert 0 <= example.main("CueAndMask-v0", "gtrxl", timesteps=2_016) <= 1


def test_the_memory_tasks_can_be_solved_by_who_remembers_and_not_by_guessing():
    load_example("memory_tasks")
    maze, cue = (gym.make(env_id).unwrapped for env_id in ("TMaze-v0", "CueAndMask-v0"))
    for goal_is_remembered, expected in ((True, 1.0), (False, 0.0)):
        for seed in range(4):
            observation, _ = maze.reset(seed=seed)
            shown, steps, over, total = int(observation[0] > 0), 0, False, 0.0
            while not over:
                observation, reward, over, _, _ = maze.step(shown if goal_is_remembered else 1 - shown)
                total, steps = total + reward, steps + 1
                assert over or observation[0] == 0, "the cue is seen once"
            assert (total, steps) == (expected, 21)
    for seed in range(4):
        observation, _ = cue.reset(seed=seed)
        shown, over, total = int(observation.argmax()), False, 0.0
        while not over:
            valid = np.flatnonzero(cue.action_masks())
            order = [(shown + i) % 4 for i in range(4)]
            action = next((a for a in order if a in valid), 4)
            observation, reward, over, _, _ = cue.step(action)
            total += reward
            assert observation[:4].sum() == 0, "the cue is seen once"
        assert total == pytest.approx(1.0)
        cue.reset(seed=seed)
        assert cue.step(0)[2], "an invalid action ends the episode"


@pytest.mark.usefixtures("graphs_without_code")
def test_speed_benchmark(monkeypatch, capsys):
    speed = load_example("benchmarks/speed")
    case = speed.Case("CartPole-v1", 2, kwargs={"n_steps": 8, "batch_size": 8, "n_epochs": 1})
    monkeypatch.setitem(speed.CASES, "tiny", case)
    monkeypatch.setattr(speed, "REPLAY_AFTER", 3)
    monkeypatch.setattr(speed, "use_cores", lambda n_cores: None)
    monkeypatch.setattr("sys.argv", ["speed.py", "--cases", "tiny", "--rounds", "2", "--output", "here"])
    monkeypatch.setitem(sys.modules, "sbx", None)
    speed.main()
    (result,) = json.loads(Path("here/speed.json").read_text())
    figures = result["contenders"]
    assert list(figures) == ["SB3", "PPOPlus", "PPOPlus compiled"]
    assert all(of_one["steps_per_second"] > 0 for of_one in figures.values())
    assert figures["SB3"]["compile_seconds"] == 0 < figures["PPOPlus compiled"]["compile_seconds"]
    assert "| tiny | PPOPlus compiled |" in capsys.readouterr().out
    assert Path("here/speed.png").read_bytes().startswith(b"\x89PNG")


def test_figure():
    figure = load_example("benchmarks/figure")
    speed = figure.read_speed(EXAMPLES / "benchmarks" / "SPEED.md")
    assert list(speed) == list(figure.CASES) and speed["CartPole, 8 envs"]["PPOPlus compiled"] == (19814.0, 8.13)
    figure.main(Path("speed.png"))
    committed = figure.FIGURE.read_bytes()
    assert committed.startswith(b"\x89PNG") and len(committed) < 100_000
    assert Path("speed.png").read_bytes()[:24] == committed[:24], "of another size: run examples/benchmarks/figure.py"
