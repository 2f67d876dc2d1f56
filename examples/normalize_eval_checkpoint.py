"""VecNormalize, EvalCallback and CheckpointCallback work as with SB3; the last checkpoint is loaded and evaluated."""

import argparse
from pathlib import Path

from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_plus import PPOPlus

ENV_ID, N_ENVS = "Pendulum-v1", 4


def main(timesteps: int = 100_000, folder: Path = Path("logs/normalize_eval_checkpoint")) -> float:
    """Train with both callbacks and return the mean reward of the last checkpoint."""
    env = VecNormalize(make_vec_env(ENV_ID, N_ENVS, seed=10), gamma=0.9)
    # The callback copies the training statistics over before each evaluation.
    eval_env = VecNormalize(make_vec_env(ENV_ID, seed=1000), training=False, norm_reward=False)
    frequency = max(timesteps // (5 * N_ENVS), 1)  # counted in steps of the vectorised env
    evaluate = EvalCallback(eval_env, best_model_save_path=str(folder), log_path=str(folder), eval_freq=frequency)
    checkpoint = CheckpointCallback(frequency, str(folder), "checkpoint", save_vecnormalize=True)

    model = PPOPlus(
        "MlpPolicy",
        env,
        n_steps=1024,
        gamma=0.9,
        learning_rate="lin_1e-3",
        use_sde=True,
        sde_sample_freq=4,
        seed=10,
        device="cpu",
    )
    model.learn(timesteps, callback=[evaluate, checkpoint])

    zips = sorted(folder.glob("checkpoint_*_steps.zip"), key=lambda path: path.stat().st_mtime)
    statistics = zips[-1].name.replace("checkpoint_", "checkpoint_vecnormalize_").replace(".zip", ".pkl")
    test_env = VecNormalize.load(str(folder / statistics), make_vec_env(ENV_ID, seed=2000))
    test_env.training = test_env.norm_reward = False
    mean_reward, _ = evaluate_policy(PPOPlus.load(zips[-1], device="cpu"), test_env, n_eval_episodes=20)
    print(f"{zips[-1].name}: {mean_reward:.1f}; best while training: {evaluate.best_mean_reward:.1f}")
    return float(mean_reward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=100_000)
    main(parser.parse_args().timesteps)
