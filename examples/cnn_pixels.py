"""Pixels: IMPALA's residual CNN on 9x9 images, which are too small for SB3's NatureCNN."""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus

SIZE = 9
MOVES = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])


class ReachTheDot(gym.Env):
    """Walk the red dot to the green one: 1 for reaching it, less 0.01 for every step on the way."""

    observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = gym.spaces.Discrete(len(MOVES))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        cells = self.np_random.choice(SIZE * SIZE, size=2, replace=False)
        self.agent, self.goal = (np.array(divmod(int(cell), SIZE)) for cell in cells)
        return self.image(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.agent = np.clip(self.agent + MOVES[action], 0, SIZE - 1)
        reached = bool((self.agent == self.goal).all())
        return self.image(), float(reached) - 0.01, reached, False, {}

    def image(self) -> np.ndarray:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[tuple(self.agent)] = (255, 0, 0)
        image[tuple(self.goal)] += np.array([0, 255, 0], np.uint8)
        return image


def make_env() -> gym.Env:
    """End an episode after 40 steps."""
    return gym.wrappers.TimeLimit(ReachTheDot(), max_episode_steps=40)


def main(timesteps: int = 40_000) -> float:
    """Train and return the mean reward of 100 deterministic episodes (a perfect walker gets about 0.94)."""
    model = PPOPlus(
        "CnnPolicy",
        make_vec_env(make_env, n_envs=8, seed=10),
        n_steps=64,
        batch_size=128,
        n_epochs=4,
        gamma=0.95,
        learning_rate="lin_1e-3",
        ent_coef=0.01,
        policy_kwargs={
            "features_extractor_class": "impala_cnn",
            "features_extractor_kwargs": {"features_dim": 64, "channels": (8, 16)},
        },
        seed=10,
        device="cpu",
    )
    model.learn(timesteps)
    mean_reward, std_reward = evaluate_policy(model, make_vec_env(make_env, seed=1000), n_eval_episodes=100)
    print(f"mean reward {mean_reward:.2f} +/- {std_reward:.2f}")
    return float(mean_reward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=40_000)
    main(parser.parse_args().timesteps)
