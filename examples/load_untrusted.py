"""Load a model of unknown origin, and its normaliser, without running any code that the files may hold."""

import argparse
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_plus import PPOPlus, UntrustedFileError, load_vec_normalize, save_vec_normalize

FOLDER = Path("logs/load_untrusted")


def train(timesteps: int) -> None:
    """What somebody else does: train, and share two files."""
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=4, seed=0), gamma=0.9)
    model = PPOPlus("MlpPolicy", env, n_steps=256, gamma=0.9, learning_rate="lin_1e-3", seed=0, device="cpu")
    FOLDER.mkdir(parents=True, exist_ok=True)
    model.learn(timesteps).save(FOLDER / "model")
    save_vec_normalize(env, FOLDER / "vecnormalize.json")


def load() -> tuple[PPOPlus, VecEnv]:
    """What you do with them."""
    env = load_vec_normalize(FOLDER / "vecnormalize.json", make_vec_env("Pendulum-v1", seed=1))
    env.training = env.norm_reward = False
    return PPOPlus.load(FOLDER / "model", env=env, device="cpu", trusted=False), env


def main(timesteps: int = 20_000) -> float:
    """Train, load and evaluate; return the mean reward."""
    train(timesteps)
    mean_reward, _ = evaluate_policy(*load(), n_eval_episodes=10, warn=False)
    print(f"mean reward of the loaded model: {mean_reward:.0f}")

    # A schedule that is code cannot be described; the error names it and what to do
    model = PPOPlus("MlpPolicy", "Pendulum-v1", learning_rate=lambda progress: 1e-3 * progress, device="cpu")
    model.save(FOLDER / "with_code")
    try:
        PPOPlus.load(FOLDER / "with_code", trusted=False)
    except UntrustedFileError as error:
        print(error)
    PPOPlus.load(FOLDER / "with_code", trusted=False, learning_rate="lin_1e-3")
    return mean_reward


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=20_000)
    main(parser.parse_args().timesteps)
