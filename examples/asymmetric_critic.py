"""A critic that sees more than the actor: boats in a current that only the critic knows.

    python examples/asymmetric_critic.py

It trains with both kinds of critic and 5 seeds each, prints their last returns, and draws the returns during training.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_plus import PPOPlus

#: What the heads see
CRITICS = {
    "critic sees the current": {"actor_keys": ["boat"], "critic_keys": ["boat", "current"]},
    "critic sees what the actor sees": {"actor_keys": ["boat"], "critic_keys": ["boat"]},
}


class Boat(gym.Env):
    """A boat keeps to its course. A current, another one in each episode, carries it forward or back.

    The reward is the way that the current makes, minus the squared distance from the course, times 0.1. A boat cannot
    measure the current, and steers as well without. But most of its reward comes from the current, so that a critic
    that does not know it finds no good in any action for a long time.

    :param has_current: whether the observations hold the current, which a simulator knows and a boat does not
    """

    def __init__(self, has_current: bool = True) -> None:
        boat = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        current = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)
        self.observation_space = gym.spaces.Dict({"boat": boat, "current": current} if has_current else {"boat": boat})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.current = self.np_random.uniform(-10.0, 10.0)
        self.position, self.velocity = self.np_random.normal(size=(2, 2))
        self.n_steps = 0
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.velocity = 0.9 * self.velocity + 0.2 * action + 0.05 * self.np_random.normal(size=2)
        self.position = self.position + 0.2 * self.velocity
        self.n_steps += 1
        reward = 0.1 * (self.current - float(np.square(self.position).sum()))
        return self.observe(), reward, False, self.n_steps == 50, {}

    def observe(self) -> dict[str, np.ndarray]:
        parts = {"boat": np.concatenate([self.position, self.velocity]), "current": np.array([self.current])}
        return {key: parts[key].astype(np.float32) for key in self.observation_space}


def train(keys: dict[str, list[str]], timesteps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train a model; return at which steps it was evaluated, and its mean returns there."""
    env = make_vec_env(Boat, n_envs=8, seed=seed)
    # The boat in use has no current among its observations. All models are evaluated in the same 50 currents
    eval_env = make_vec_env(lambda: Boat(has_current=False), n_envs=50)
    model = PPOPlus(
        "MultiInputPolicy",
        env,
        n_steps=64,
        batch_size=128,
        gamma=0.95,
        learning_rate=1e-3,
        policy_kwargs={"net_arch": "tiny", **keys},
        seed=seed,
        device="cpu",
    )
    steps, returns = [], []

    class Evaluation(EvalCallback):
        def _on_step(self) -> bool:
            if self.n_calls % self.eval_freq == 0:
                self.eval_env.seed(1_000)
                goes_on = super()._on_step()
                steps.append(self.num_timesteps)
                returns.append(self.last_mean_reward)
                return goes_on
            return True

    model.learn(timesteps, Evaluation(eval_env, n_eval_episodes=50, eval_freq=256, verbose=0))
    return np.array(steps), np.array(returns)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    """Draw mean, minimum and maximum over the seeds."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (steps, returns) in curves.items():
        (line,) = axes.plot(steps, returns.mean(axis=0), label=name)
        axes.fill_between(steps, returns.min(axis=0), returns.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="timesteps", ylabel="mean return")
    axes.legend(loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, facecolor="white")
    plt.close(figure)


def main(timesteps: int, n_seeds: int, file: Path) -> dict[str, list[float]]:
    """Compare the critics; return the last returns of each seed."""
    curves = {}
    for name, keys in CRITICS.items():
        runs = [train(keys, timesteps, seed) for seed in range(100, 100 + n_seeds)]
        curves[name] = runs[0][0], np.array([returns for _, returns in runs])
        print(f"{name:32s}", *(f"{returns[-1]:8.1f}" for _, returns in runs))
    draw(curves, file)
    print(f"Saved {file}")
    return {name: returns[:, -1].tolist() for name, (_, returns) in curves.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=20_480)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("logs/asymmetric_critic/returns.png"))
    args = parser.parse_args()
    main(args.timesteps, args.seeds, args.output)
