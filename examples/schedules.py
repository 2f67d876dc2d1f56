"""Every coefficient takes a number, a schedule, a callable or a string; the critic may learn at its own rate."""

import argparse

from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import Linear, PPOPlus, WarmupCosine, make_schedule

COEFFICIENTS = {
    "learning_rate": WarmupCosine(1e-3, warmup_fraction=0.05),
    "critic_learning_rate": "exp_2e-3_1e-4",  # geometric, from the first to the second
    "clip_range": "lin_0.2_0.05",
    "ent_coef": Linear(0.02, end=0.0, end_fraction=0.5),  # 0 in the second half
    "vf_coef": lambda progress_remaining: 0.5 + 0.5 * progress_remaining,
}


def main(timesteps: int = 50_000) -> float:
    """Print the coefficients over the course of training, train with them and return the mean reward."""
    print("progress".ljust(22), *(f"{done:>9.0%}" for done in (0, 0.05, 0.25, 0.5, 0.75, 1)))
    for name, value in COEFFICIENTS.items():
        schedule = make_schedule(value)
        print(name.ljust(22), *(f"{schedule(1 - done):9.2g}" for done in (0, 0.05, 0.25, 0.5, 0.75, 1)))

    model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=512, **COEFFICIENTS, seed=10, device="cpu")
    model.learn(timesteps)
    mean_reward, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"mean reward {mean_reward:.1f}")
    return float(mean_reward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=50_000)
    main(parser.parse_args().timesteps)
