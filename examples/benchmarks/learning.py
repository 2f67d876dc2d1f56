"""Scores of the final policy with the parameters of zoo_hyperparams/ppo_plus.yml, every seed counted.

    python examples/benchmarks/learning.py Pendulum-v1 --seeds 0 1 2 3 4 --action-dist beta

trains each seed once, evaluates the final policy (deterministic, 20 episodes, statistics of VecNormalize frozen) with
SB3's evaluate_policy, prints one JSON line per seed and their mean, and appends the lines to --output.
``--algo ppo`` trains SB3's PPO with the same parameters and steps, ``--memory none`` leaves the entry's memory out.
Also known are the RL Zoo's environments without velocities, and TMaze-v0 and CueAndMask-v0 of memory_envs.py.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch as th
import yaml
from sb3_contrib.common.maskable.utils import is_masking_supported
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from zoo_envs import ZooEnvs

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.schedules import make_schedule
from sb3_ppo_plus.zoo import hyperparams_file


def run(seed: int, *, env_id: str, algo: str, steps: int | None, variant: str | None, compile: bool) -> dict[str, Any]:
    """Train one seed and score its final policy."""
    th.set_num_threads(1)
    entries = yaml.safe_load(hyperparams_file().read_text(encoding="utf-8"))
    hyperparams = entries[f"{env_id}:{variant}" if variant not in (None, "none") else env_id]
    if variant == "none":
        hyperparams["policy_kwargs"] = {
            name: value for name, value in hyperparams["policy_kwargs"].items() if not name.startswith("memory")
        }
    n_timesteps = steps or int(hyperparams["n_timesteps"])
    envs = ZooEnvs.take_from(hyperparams, env_id)
    if algo == "ppo":
        # SB3's PPO knows no schedules by string
        scheduled = {"learning_rate", "clip_range"} & hyperparams.keys()
        hyperparams |= {name: make_schedule(hyperparams[name], name) for name in scheduled}
    elif compile:
        hyperparams["compile"] = True
    policy = hyperparams.pop("policy")
    env = envs.for_training(seed)
    model = {"ppo": PPO, "ppo_plus": PPOPlus}[algo](policy, env, seed=seed, device="cpu", **hyperparams)
    started = time.perf_counter()
    model.learn(n_timesteps)
    seconds = time.perf_counter() - started

    eval_env = envs.for_evaluation(env, seed=10_000 + seed, outermost=None)
    predictor = model.masked(eval_env) if is_masking_supported(eval_env) else model
    score, std = evaluate_policy(predictor, eval_env, n_eval_episodes=20, deterministic=True)
    return {
        "env": env_id,
        "algo": algo,
        "variant": variant or "as in the file",
        "compile": compile,
        "seed": seed,
        "steps": model.num_timesteps,
        "mean": round(float(score), 2),
        "std": round(float(std), 2),
        "secs": round(seconds, 1),
    }


def main() -> None:
    """Parse the arguments, run the seeds, print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="Gymnasium id with an entry in ppo_plus.yml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="instead of the file's n_timesteps")
    parser.add_argument("--algo", choices=["ppo", "ppo_plus"], default="ppo_plus")
    parser.add_argument("--action-dist", choices=["squashed_gaussian", "beta"], help="take the entry ENV:ACTION_DIST")
    parser.add_argument("--memory", choices=["lstm", "gtrxl", "none"], help="take the entry ENV:MEMORY, or no memory")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="seeds that train at the same time")
    parser.add_argument("--output", type=Path, help="file to append the JSON lines to")
    args = parser.parse_args()
    variant = args.memory or args.action_dist
    job = partial(run, env_id=args.env, algo=args.algo, steps=args.steps, variant=variant, compile=args.compile)
    scores = []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for result in pool.map(job, args.seeds):
            print(json.dumps(result), flush=True)
            scores.append(result["mean"])
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(f"{args.env}: mean over {len(scores)} seeds {mean(scores):.2f}, lowest {min(scores):.2f}")


if __name__ == "__main__":
    main()
