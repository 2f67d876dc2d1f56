"""Load a model that SB3's PPO saved, Adam's state included, and train on with the extras switched on."""

import argparse
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus


def main(timesteps: int = 50_000, folder: Path = Path("logs/continue_from_sb3")) -> float:
    """Train half of the steps with PPO and half with PPOPlus; return the mean reward in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    env = make_vec_env("CartPole-v1", n_envs=4, seed=10)
    sb3 = PPO("MlpPolicy", env, n_steps=256, seed=10, device="cpu").learn(timesteps // 2)
    sb3.save(folder / "sb3_ppo")
    print(f"PPO      {evaluate_policy(sb3, env, n_eval_episodes=20)[0]:.1f} after {sb3.num_timesteps} steps")

    # What is not given here stays as it was saved.
    model = PPOPlus.load(
        folder / "sb3_ppo",
        env=env,
        device="cpu",
        learning_rate="cos_3e-4",
        critic_learning_rate="cos_1e-3",
        ent_coef="lin_0.01",
        clip_range_vf=0.2,
    )
    model.learn(timesteps - timesteps // 2, reset_num_timesteps=False)
    mean_reward, _ = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"PPOPlus  {mean_reward:.1f} after {model.num_timesteps} steps")
    return float(mean_reward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=50_000)
    main(parser.parse_args().timesteps)
