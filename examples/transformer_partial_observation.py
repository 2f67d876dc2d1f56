"""A Transformer over stacked frames: CartPole from position and angle alone, without the two velocities."""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from sb3_ppo_plus import PPOPlus

N_FRAMES = 8


class PositionAndAngle(gym.ObservationWrapper):
    """Leaves the velocities out, so that one frame does not tell which way things move."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        limit = env.observation_space.high[[0, 2]]
        self.observation_space = gym.spaces.Box(-limit, limit, dtype=np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]]


def make_env(n_envs: int, seed: int) -> VecEnv:
    """Stack 8 frames of 2 numbers, oldest first, into one flat observation of 16."""
    return VecFrameStack(make_vec_env("CartPole-v1", n_envs, seed=seed, wrapper_class=PositionAndAngle), N_FRAMES)


def main(timesteps: int = 299_008, seed: int = 10) -> float:
    """Train and return the mean reward of 20 deterministic episodes."""
    model = PPOPlus(
        "MlpPolicy",
        make_env(n_envs=8, seed=seed),
        n_steps=256,
        batch_size=256,
        n_epochs=10,
        gae_lambda=0.9,
        gamma=0.98,
        learning_rate="lin_1e-3",
        policy_kwargs={
            "features_extractor_class": "transformer",
            "features_extractor_kwargs": {"seq_len": N_FRAMES, "d_model": 32, "n_layers": 1, "pooling": "last"},
        },
        seed=seed,
        device="cpu",
    )
    model.learn(timesteps)
    mean_reward, std_reward = evaluate_policy(model, make_env(n_envs=1, seed=1000 + seed), n_eval_episodes=20)
    print(f"seed {seed}: {mean_reward:.1f} +/- {std_reward:.1f} after {model.num_timesteps} steps")
    return float(mean_reward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=299_008)
    parser.add_argument("--seed", type=int, default=10)
    arguments = parser.parse_args()
    main(arguments.timesteps, arguments.seed)
