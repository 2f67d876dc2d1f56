"""Train PPOPlus on CartPole-v1 with the zoo file's parameters; evaluate it, save it, plot its learning curve.

`make demo` runs this; the model, the curve and the episodes' CSV files go to logs/demo.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.zoo import load_hyperparams

ENV_ID = "CartPole-v1"


def plot_learning_curve(folder: Path, file: Path, window: int = 20) -> None:
    """Draw every episode's reward, and their running mean, against the steps taken in all envs together."""
    monitors = [np.loadtxt(csv, delimiter=",", skiprows=2, ndmin=2) for csv in sorted(folder.glob("*.monitor.csv"))]
    episodes = np.concatenate(monitors)
    episodes = episodes[episodes[:, 2].argsort(kind="stable")]  # columns: reward, length, seconds since the start
    rewards, steps = episodes[:, 0], episodes[:, 1].cumsum()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, rewards, ".", markersize=3, alpha=0.3, label="episode")
    if len(rewards) >= window:
        smooth = np.convolve(rewards, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], smooth, label=f"mean of {window} episodes")
    axes.set(title=f"PPOPlus on {ENV_ID}", xlabel="environment steps", ylabel="episode reward")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(timesteps: int | None = None, folder: Path = Path("logs/demo")) -> float:
    """Train, evaluate, save and plot; return the mean reward of 20 deterministic episodes."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.monitor.csv"):
        stale.unlink()
    hyperparams = load_hyperparams(ENV_ID)
    timesteps = timesteps or int(hyperparams["n_timesteps"])
    env = make_vec_env(ENV_ID, n_envs=hyperparams["n_envs"], seed=0, monitor_dir=str(folder))
    arguments = {name: value for name, value in hyperparams.items() if name not in ("n_timesteps", "n_envs")}
    model = PPOPlus(env=env, seed=0, device="cpu", **arguments)
    model.learn(timesteps, progress_bar=True)
    model.save(folder / "model")
    env.close()

    eval_env = make_vec_env(ENV_ID, seed=1)
    mean_reward, std_reward = evaluate_policy(model, eval_env, n_eval_episodes=20, deterministic=True)
    eval_env.close()
    plot_learning_curve(folder, folder / "learning_curve.png")
    print(f"{ENV_ID} after {model.num_timesteps} steps: {mean_reward:.1f} +/- {std_reward:.1f} over 20 episodes")
    print(f"Saved {folder / 'model.zip'} and {folder / 'learning_curve.png'}")
    return float(mean_reward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=None, help="default: the zoo file's n_timesteps")
    main(parser.parse_args().timesteps)
