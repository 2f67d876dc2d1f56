"""Change one import: the same seed gives SB3's PPO and PPOPlus the same parameters, bit for bit."""

import argparse

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus


def main(timesteps: int = 20_000) -> bool:
    """Train both and return whether every parameter is equal."""
    sb3 = PPO("MlpPolicy", "CartPole-v1", seed=10, device="cpu").learn(timesteps)
    plus = PPOPlus("MlpPolicy", "CartPole-v1", seed=10, device="cpu").learn(timesteps)
    for name, model in (("PPO", sb3), ("PPOPlus", plus)):
        mean_reward, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
        print(f"{name:8s} {mean_reward:.1f}")

    expected = sb3.policy.state_dict()
    equal = all(th.equal(value, expected[name]) for name, value in plus.policy.state_dict().items())
    print(f"The parameters are {'equal' if equal else 'NOT equal'} after {plus.num_timesteps} steps.")
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=20_000)
    main(parser.parse_args().timesteps)
