"""Beta and tanh-squashed Gaussian: distributions that live inside the action bounds, so that nothing is clipped."""

import argparse

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus

ACTION_DISTS = ("beta", "squashed_gaussian")


def main(timesteps: int = 100_000) -> dict[str, float]:
    """Train Pendulum-v1 with each distribution; return the mean rewards."""
    mean_rewards = {}
    for action_dist in ACTION_DISTS:
        env = make_vec_env("Pendulum-v1", n_envs=4, seed=10)
        model = PPOPlus(
            "MlpPolicy",
            env,
            n_steps=1024,
            gamma=0.9,
            learning_rate="lin_1e-3",
            policy_kwargs={"action_dist": action_dist},
            seed=10,
            device="cpu",
        )
        model.learn(timesteps)
        # The env's units: every sample lies within [-2, 2], without a clip.
        actions, _ = model.predict(np.stack([env.observation_space.sample() for _ in range(1000)]))
        mean_reward, _ = evaluate_policy(model, env, n_eval_episodes=20)
        print(f"{action_dist:18s} {mean_reward:.0f}, actions in [{actions.min():.3f}, {actions.max():.3f}]")
        mean_rewards[action_dist] = float(mean_reward)
        env.close()
    return mean_rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=100_000)
    main(parser.parse_args().timesteps)
