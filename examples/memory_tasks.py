"""What was seen once: a T-maze, and choices that need both a memory and action masks.

    python examples/memory_tasks.py CueAndMask-v0 --memory gtrxl
    python examples/memory_tasks.py TMaze-v0 --memory none

The second guesses. Both environments are in benchmarks/memory_envs.py.
"""

import argparse
import sys
from pathlib import Path

from sb3_contrib.common.maskable.utils import is_masking_supported
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_plus import PPOPlus

sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))
import memory_envs  # noqa: F401  # registers both

MEMORIES = {
    "lstm": {"memory": "lstm", "memory_kwargs": {"hidden_size": 32, "forget_bias": 1.0, "sequence_length": 63}},
    "gtrxl": {
        "memory": "gtrxl",
        "memory_kwargs": {"hidden_size": 32, "n_layers": 1, "memory_length": 32, "sequence_length": 63},
    },
    "none": {},
}


def main(env_id: str = "TMaze-v0", memory: str = "lstm", timesteps: int = 100_800, seed: int = 10) -> float:
    """Train and return the mean return of 20 deterministic episodes, the share of right choices."""
    model = PPOPlus(
        "MlpPolicy",
        make_vec_env(env_id, n_envs=16, seed=seed),
        n_steps=126,
        batch_size=504,
        ent_coef=0.01,
        learning_rate="lin_1e-3",
        policy_kwargs=MEMORIES[memory],
        seed=seed,
        device="cpu",
    )
    model.learn(timesteps)
    eval_env = make_vec_env(env_id, seed=1000 + seed)
    # Masks are used since the environment has them; evaluate_policy does not ask for them, masked(env) does
    predictor = model.masked(eval_env) if is_masking_supported(eval_env) else model
    score, _ = evaluate_policy(predictor, eval_env, n_eval_episodes=20)
    print(f"{env_id}, memory {memory}, seed {seed}: {score:.2f} after {model.num_timesteps} steps")
    return float(score)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id", nargs="?", choices=["TMaze-v0", "CueAndMask-v0"], default="TMaze-v0")
    parser.add_argument("--memory", choices=MEMORIES, default="lstm")
    parser.add_argument("--timesteps", type=int, default=100_800)
    parser.add_argument("--seed", type=int, default=10)
    arguments = parser.parse_args()
    main(arguments.env_id, arguments.memory, arguments.timesteps, arguments.seed)
