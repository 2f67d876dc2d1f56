"""Does every environment go on exactly after a resume, or say that it does not? Prints a line for each.

Run ``PYTHONPATH=tests python tests/env_states/resume_campaign.py [--seeds 12] [--only Pong]``. Those of packages that
are not installed are left out.
"""

import argparse
import importlib.util
import time
import warnings
from collections import Counter

import ale_py
import gymnasium as gym
import numpy as np
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import Monitor
from states import written_and_read

from sb3_ppo_plus import ResumableEnv

CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
TOY_TEXT = ["FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v4", "Blackjack-v1", "CliffWalking-v1"]
MUJOCO = ["HalfCheetah", "Ant", "Hopper", "Walker2d", "Humanoid", "HumanoidStandup", "Swimmer", "Reacher", "Pusher"]
BOX2D = ["LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3", "BipedalWalkerHardcore-v3", "CarRacing-v3"]
# Packages whose environments are played again, and some of these
REPLAYED = {
    "minigrid": [
        *("MiniGrid-Empty-5x5-v0", "MiniGrid-DoorKey-5x5-v0", "MiniGrid-Dynamic-Obstacles-8x8-v0"),
        *("MiniGrid-KeyCorridorS3R3-v0", "MiniGrid-MultiRoom-N2-S4-v0", "BabyAI-GoToRedBall-v0", "BabyAI-BossLevel-v0"),
    ],
    "highway_env": ["highway-fast-v0", "merge-v1", "roundabout-v0", "intersection-v1", "parking-v0"],
    "gymnasium_robotics": [
        *("FetchReach-v4", "PointMaze_UMaze-v3", "PointMaze_UMazeDense-v3", "AntMaze_UMaze-v5", "AdroitHandDoor-v1"),
        *("AdroitHandRelocate-v1", "HandReach-v3", "FrankaKitchen-v1"),
    ],
}
GAMES = ["Pong", "Breakout", "Seaquest", "Qbert", "MsPacman", "SpaceInvaders", "Asterix", "BeamRider", "Enduro"]
# Parts of names of those that take few steps, since each takes milliseconds
SLOW = ("CarRacing", "highway", "merge", "roundabout", "intersection", "parking")
FRAMESKIPS = [1, 4, (2, 5)]


def made(env_id, by="state", **kwargs):
    return ResumableEnv(Monitor(gym.make(env_id, **kwargs)), by=by)


def makers():
    """A function for each environment, by name."""
    ids = [*CLASSIC, *TOY_TEXT, *(f"{name}-v5" for name in MUJOCO), "InvertedPendulum-v5", "InvertedDoublePendulum-v5"]
    result = {env_id: lambda env_id=env_id: made(env_id) for env_id in ids}
    replayed = [*BOX2D]
    for package, env_ids in REPLAYED.items():
        if importlib.util.find_spec(package):
            gym.register_envs(importlib.import_module(package))
            replayed += env_ids
    for env_id in replayed:
        result[f"{env_id}, replay"] = lambda env_id=env_id: made(env_id, "replay")
    gym.register_envs(ale_py)
    for game in GAMES:
        env_id = f"ALE/{game}-v5"
        for skip in FRAMESKIPS:
            result[f"{game}, frameskip {skip}"] = lambda env_id=env_id, skip=skip: made(env_id, frameskip=skip)
        for sticky in (0.25, 0.0):
            arguments = {"frameskip": 1, "repeat_action_probability": sticky}
            result[f"{game}, AtariWrapper, sticky {sticky}"] = lambda env_id=env_id, arguments=arguments: ResumableEnv(
                AtariWrapper(Monitor(gym.make(env_id, **arguments)))
            )
    return result


def played(env, actions):
    seen = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append((observation, float(reward), terminated, truncated))
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


def drawn(env, n):
    return [env.action_space.sample() for _ in range(n)]


def outcome(make, seed, times, n_steps=300):
    """Save at a random step, go on for 2/3 of ``n_steps``, and do the same in another environment."""
    try:
        env, other = make(), make()
    except Exception as error:
        return f"cannot be made: {type(error).__name__}"
    env.reset(seed=seed)
    env.action_space.seed(seed)
    started = time.perf_counter()
    finding = env.prove_resumable()
    times["proof"].append(time.perf_counter() - started)
    if finding is not None:
        return "error" if finding.is_error else "warning"
    played(env, drawn(env, int(np.random.default_rng(seed).integers(1, n_steps))))
    started = time.perf_counter()
    state = env.get_resume_state()
    times["state"].append(time.perf_counter() - started)
    actions = drawn(env, 2 * n_steps // 3)
    expected = played(env, actions)
    other.reset(seed=seed + 1000)
    played(other, drawn(other, 7))
    started = time.perf_counter()
    other.set_resume_state(written_and_read(state))
    times["put back"].append(time.perf_counter() - started)
    try:
        np.testing.assert_equal(played(other, actions), expected)
    except AssertionError:
        return "DIFFERS"
    return "same"


def main(n_seeds=12, only=""):
    """Print a line for each environment, and the sum of all."""
    total = Counter()
    for name, make in makers().items():
        if only in name:
            times = {"proof": [], "state": [], "put back": []}
            n_steps = 60 if name.startswith(SLOW) else 300
            outcomes = Counter(outcome(make, seed, times, n_steps) for seed in range(n_seeds))
            total += outcomes
            medians = ", ".join(f"{key} {1000 * np.median(value):.1f} ms" for key, value in times.items() if value)
            print(f"{name}: {dict(outcomes)}, {medians}", flush=True)
    print(f"all: {dict(total)}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    main(given.seeds, given.only)
