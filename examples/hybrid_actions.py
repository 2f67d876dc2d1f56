"""Parametrised actions: choose a move and how far it goes, against the same choice squeezed into a Box.

``python examples/hybrid_actions.py --seeds 5`` prints the table of the guide on hybrid actions.
"""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus

MOVES = ("walk", "hop", "leap", "climb")
MAX_OBSTACLES = 20


class Course(gym.Env):
    """A course of obstacles. Each asks for one move, and for a length of this move that fits its size.

    The reward is 1 for each obstacle that is passed. The wrong move, or one that is too short or too long, is a fall,
    which ends the episode. After 20 obstacles the course is done.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (len(MOVES) + 1,))
        lengths = spaces.Dict({move: spaces.Box(-1.0, 1.0, (1,)) for move in MOVES})
        self.action_space = spaces.Dict({"move": spaces.Discrete(len(MOVES)), "length": lengths})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.n_passed = 0
        return self.next_obstacle(), {}

    def next_obstacle(self) -> np.ndarray:
        self.kind, self.size = int(self.np_random.integers(len(MOVES))), float(self.np_random.uniform(-0.8, 0.8))
        return np.array([*(np.arange(len(MOVES)) == self.kind), self.size], np.float32)

    def step(self, action: dict) -> tuple[np.ndarray, float, bool, bool, dict]:
        move = int(action["move"])
        length = float(action["length"][MOVES[move]][0])
        # Two moves go further over larger obstacles, two less far
        needed = self.size if move % 2 == 0 else -self.size
        is_passed = move == self.kind and abs(length - needed) < 0.2
        self.n_passed += is_passed
        is_over = not is_passed or self.n_passed == MAX_OBSTACLES
        return self.next_obstacle(), float(is_passed), is_over, False, {}


class Squeezed(gym.ActionWrapper):
    """The same task with one Box: its first number chooses the move, by equal intervals; the others are the lengths."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.action_space = spaces.Box(-1.0, 1.0, (1 + len(MOVES),))

    def action(self, action: np.ndarray) -> dict:
        move = min(int((action[0] + 1) / 2 * len(MOVES)), len(MOVES) - 1)
        return {"move": move, "length": {name: action[1 + i : 2 + i] for i, name in enumerate(MOVES)}}


# Each move uses its own length; of the others, the loss sees nothing
USED_PARTS = {"move": [[f"length.{move}"] for move in MOVES]}


def score(name: str, timesteps: int, seed: int) -> float:
    """Train on the task in one of its forms; return how many obstacles are passed, the mean of 200 episodes."""
    wrapper = Squeezed if name == "one Box" else None
    env = make_vec_env(Course, n_envs=16, seed=seed, wrapper_class=wrapper)
    policy_kwargs = {"used_parts": USED_PARTS} if name == "used parts" else {}
    model = PPOPlus("MlpPolicy", env, n_steps=64, batch_size=256, policy_kwargs=policy_kwargs, seed=seed)
    model.learn(timesteps)
    eval_env = make_vec_env(Course, n_envs=16, seed=10_000 + seed, wrapper_class=wrapper)
    return float(evaluate_policy(model, eval_env, n_eval_episodes=200)[0])


def main(timesteps: int = 30_000, seeds: int = 1, first_seed: int = 20) -> dict[str, list[float]]:
    """Train in three forms for equal steps; print the scores of each seed, and return them."""
    names = ("used parts", "all parts", "one Box")
    scores = {name: [score(name, timesteps, first_seed + seed) for seed in range(seeds)] for name in names}
    for name, of_seeds in scores.items():
        print(f"{name:12} obstacles passed: {', '.join(f'{each:.1f}' for each in of_seeds)}")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=20)
    arguments = parser.parse_args()
    main(arguments.timesteps, arguments.seeds, arguments.first_seed)
