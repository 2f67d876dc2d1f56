"""A symmetry of the task: a boat with two oars, whose mirror image is a boat with two oars.

    python examples/symmetry.py

It trains without the symmetry and with mirror images as further data, 5 seeds each. It draws the returns during
training, and tells how many steps each run took to a return of 140, which the boat with symmetry reaches.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_plus import PPOPlus

LEVEL = 140.0


class Rower(gym.Env):
    """Row ahead, on a straight line. A fast stroke drives the boat on, and the way back must be slow.

    The observation is sine and cosine of the heading, the turning rate, the offset from the line and the speed, then
    angle and angular speed of the left oar, and those of the right one. The action is the force on each oar.
    """

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (9,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.heading, self.turning = self.np_random.uniform(-1.0, 1.0), 0.0
        self.offset, self.speed, self.n_steps = self.np_random.uniform(-1.0, 1.0), 0.0, 0
        self.angles, self.rates = self.np_random.uniform(-0.5, 0.5, 2), np.zeros(2)
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.rates = 0.7 * self.rates + action
        moved = np.clip(self.angles + 0.1 * self.rates, -1.0, 1.0)
        self.rates, self.angles = (moved - self.angles) / 0.1, moved
        # Water resists with the square of the speed
        left, right = self.rates * np.abs(self.rates)
        self.speed = 0.9 * self.speed + 0.05 * (left + right)
        self.turning = 0.8 * self.turning + 0.05 * (right - left)
        self.heading += 0.1 * self.turning
        self.offset += 0.1 * self.speed * np.sin(self.heading)
        self.n_steps += 1
        reward = self.speed * np.cos(self.heading) - 0.1 * abs(self.offset)
        return self.observe(), float(reward), False, self.n_steps == 200, {}

    def observe(self) -> np.ndarray:
        boat = np.sin(self.heading), np.cos(self.heading), self.turning, self.offset, self.speed
        oars = self.angles[0], self.rates[0], self.angles[1], self.rates[1]
        return np.array([*boat, *oars], np.float32)


def mirror(observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """See the boat in a mirror along the line: it turns to the other side, and left and right oar change places."""
    signs = observations.new_tensor([-1, 1, -1, -1, 1])
    mirrored = th.cat([observations[:, :5] * signs, observations[:, 7:], observations[:, 5:7]], dim=1)
    return mirrored, actions.flip(1)


WAYS = {
    "without symmetry": {},
    "with symmetry": {"symmetry": mirror},
}


def train(arguments: dict, timesteps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train a model; return at which steps it was evaluated, and its mean returns there."""
    env = make_vec_env(Rower, n_envs=8, seed=seed)
    model = PPOPlus(
        "MlpPolicy",
        env,
        n_steps=128,
        batch_size=128,
        gamma=0.98,
        learning_rate=1e-3,
        seed=seed,
        device="cpu",
        **arguments,
    )
    steps, returns = [], []

    class Evaluation(EvalCallback):
        def _on_step(self) -> bool:
            if self.n_calls % self.eval_freq == 0:
                super()._on_step()
                steps.append(self.num_timesteps)
                returns.append(self.last_mean_reward)
            return True

    eval_env = make_vec_env(Rower, n_envs=10, seed=1_000)
    model.learn(timesteps, Evaluation(eval_env, n_eval_episodes=10, eval_freq=512, verbose=0))
    return np.array(steps), np.array(returns)


def steps_to(level: float, steps: np.ndarray, returns: np.ndarray) -> float:
    """Return the first step from which on the return is at a level; infinite if it never is."""
    reached = np.flatnonzero(returns >= level)
    return float(steps[reached[0]]) if len(reached) else np.inf


def main(timesteps: int, n_seeds: int, file: Path) -> dict[str, list[float]]:
    """Compare the ways; return each seed's steps to the level."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    needed = {}
    for name, arguments in WAYS.items():
        runs = [train(arguments, timesteps, seed) for seed in range(100, 100 + n_seeds)]
        steps, returns = runs[0][0], np.array([returns for _, returns in runs])
        needed[name] = [steps_to(LEVEL, steps, each) for each in returns]
        at_end = returns[:, -1].mean()
        print(
            f"{name:16s}",
            *(f"{each:9.0f}" for each in needed[name]),
            f" mean return at the end {at_end:.0f}",
            flush=True,
        )
        (line,) = axes.plot(steps, returns.mean(axis=0), label=name)
        axes.fill_between(steps, returns.min(axis=0), returns.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="timesteps", ylabel="mean return")
    axes.legend(loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, facecolor="white")
    plt.close(figure)
    print(f"Saved {file}")
    return needed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=102_400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("logs/symmetry/returns.png"))
    args = parser.parse_args()
    main(args.timesteps, args.seeds, args.output)
