"""Invalid actions masked: queens on a chessboard, row by row, none on a column or diagonal of another."""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus


class Queens(gym.Env):
    """The first two queens stand at random; a queen that another attacks, or a dead end, ends the episode.

    The reward is 1 for a full board, and 0.1 for each queen on the way.
    """

    def __init__(self, n: int = 10) -> None:
        self.observation_space = gym.spaces.MultiBinary(n * n)
        self.action_space = gym.spaces.Discrete(n)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.columns: list[int] = []
        for _ in range(2):
            self.columns.append(int(self.np_random.choice(np.flatnonzero(self.action_masks()))))
        return self.board(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        is_valid = self.action_masks()[action]
        self.columns.append(int(action))
        is_full = is_valid and len(self.columns) == self.action_space.n
        is_over = not is_valid or is_full or not self.action_masks().any()
        return self.board(), float(is_full) + 0.1 * is_valid, is_over, False, {}

    def action_masks(self) -> np.ndarray:
        """Mark the columns of the next row that no queen attacks."""
        distances = len(self.columns) - np.arange(len(self.columns))
        columns = np.array(self.columns, int)
        attacked = np.concatenate([columns, columns - distances, columns + distances])
        return ~np.isin(np.arange(self.action_space.n), attacked)

    def board(self) -> np.ndarray:
        board = np.zeros((self.action_space.n, self.action_space.n), np.int8)
        board[np.arange(len(self.columns)), self.columns] = 1
        return board.flatten()


def main(timesteps: int = 300_000, seed: int = 10) -> dict[str, float]:
    """Train with masks and without; return the shares of boards that were filled, of 200 each."""
    shares = {}
    for name, action_masking in (("with masks", True), ("without", False)):
        env = make_vec_env(Queens, n_envs=16, seed=seed)
        model = PPOPlus(
            "MlpPolicy",
            env,
            n_steps=128,
            batch_size=256,
            n_epochs=6,
            gamma=0.99,
            learning_rate="lin_1e-3",
            ent_coef=0.01,
            action_masking=action_masking,
            policy_kwargs={"net_arch": [128, 128], "activation_fn": "relu"},
            seed=seed,
            device="cpu",
        )
        model.learn(timesteps)
        # SB3's evaluate_policy knows no masks: it gets a predictor that asks env for them
        predictor = model.masked(env) if action_masking else model
        rewards, _ = evaluate_policy(predictor, env, n_eval_episodes=200, return_episode_rewards=True)
        shares[name] = float(np.mean(np.array(rewards) > 1.0))
        print(f"{name:10s} {shares[name]:.0%} of the boards are full")
        env.close()
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=10)
    args = parser.parse_args()
    main(args.timesteps, args.seed)
