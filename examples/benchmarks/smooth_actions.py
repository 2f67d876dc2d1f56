"""How much smoother the terms caps_temporal and caps_spatial make actions, and what they cost.

    python examples/benchmarks/smooth_actions.py Pendulum-v1 --weights lin_0_3 0 0.1 --seeds 100000 200000

trains each seed with the parameters of zoo_hyperparams/ppo_plus.yml (compiled), first without the terms, then with each
of the given weights: temporal and spatial (numbers or schedules), sigma. It scores the final policy (deterministic, 20
episodes whose starts are the same for all), and prints a JSON line with the return and the changes |a[t] - a[t-1]| of
the action per step and dimension, in the environment's units. Ratios are to the same seed's run without the terms.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from zoo_envs import ZooEnvs

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.zoo import hyperparams_file

NAMES = ("caps_temporal", "caps_spatial", "caps_sigma")


def number_or_schedule(text: str) -> float | str:
    """Read a weight."""
    try:
        return float(text)
    except ValueError:
        return text


def score(model: PPOPlus, env: Any, n_episodes: int) -> dict[str, float]:  # noqa: ANN401  # a VecEnv of one
    """Return the mean return of the deterministic policy, and mean, root mean square, largest change of its action."""
    returns, changes = [], []
    observation = env.reset()
    for _ in range(n_episodes):
        total, done, before = 0.0, False, None
        while not done:
            actions, _ = model.predict(observation, deterministic=True)
            observation, rewards, dones, _ = env.step(actions)
            if before is not None:
                changes.append(np.abs(actions - before).reshape(-1))
            total, done, before = total + float(rewards[0]), bool(dones[0]), actions
        returns.append(total)
    of_steps = np.array(changes)
    sizes = {"change": of_steps.mean(), "rms_change": np.sqrt((of_steps**2).mean()), "largest_change": of_steps.max()}
    return {"return": round(float(np.mean(returns)), 1), **{name: round(float(x), 4) for name, x in sizes.items()}}


def run(env_id: str, seed: int, weights: tuple[float | str, ...], steps: int | None, n_episodes: int) -> dict[str, Any]:
    """Train one seed and score its final policy."""
    entry = yaml.safe_load(hyperparams_file().read_text(encoding="utf-8"))[env_id]
    n_timesteps = steps or int(entry["n_timesteps"])
    envs = ZooEnvs.take_from(entry, env_id)
    env = envs.for_training(seed)
    terms = dict(zip(NAMES, weights, strict=False))
    model = PPOPlus(entry.pop("policy"), env, seed=seed, device="cpu", compile=True, **entry, **terms)
    started = time.perf_counter()
    model.learn(n_timesteps)
    seconds = time.perf_counter() - started
    scores = score(model, envs.for_evaluation(env), n_episodes)
    return {
        "env": env_id,
        "seed": seed,
        "steps": model.num_timesteps,
        **terms,
        **scores,
        "secs": round(seconds, 1),
    }


def compare(
    env_id: str, seed: int, all_weights: list[tuple[float | str, ...]], steps: int | None, n_episodes: int
) -> list[dict[str, Any]]:
    """Run one seed without the terms and with each of the weights."""
    results = []
    for weights in [(), *all_weights]:
        result = run(env_id, seed, weights, steps, n_episodes)
        if weights:
            result["change_ratio"] = round(result["change"] / results[0]["change"], 3)
            result["return_gain"] = round(result["return"] - results[0]["return"], 1)
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def main() -> None:
    """Parse the arguments, run the seeds, print each result and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="Gymnasium id with an entry in ppo_plus.yml")
    parser.add_argument(
        "--weights",
        type=number_or_schedule,
        nargs=3,
        action="append",
        required=True,
        metavar=("TEMPORAL", "SPATIAL", "SIGMA"),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[100_000 * k for k in range(1, 6)])
    parser.add_argument("--steps", type=int, help="instead of the file's n_timesteps")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--output", type=Path, help="file to append the JSON lines to")
    args = parser.parse_args()
    th.set_num_threads(1)
    all_weights = [tuple(weights) for weights in args.weights]
    of_seeds = []
    for seed in args.seeds:
        of_seeds.append(compare(args.env, seed, all_weights, args.steps, args.episodes))
        if args.output:
            with args.output.open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in of_seeds[-1])
    plain, *others = zip(*of_seeds, strict=True)
    before = np.mean([result["return"] for result in plain])
    for weights, results in zip(all_weights, others, strict=True):
        ratios = [result["change_ratio"] for result in results]
        after = np.mean([result["return"] for result in results])
        print(f"{weights}: change x {np.mean(ratios):.3f} ({min(ratios)} to {max(ratios)}), ", end="")
        print(f"mean return {after:.1f}, without {before:.1f}")


if __name__ == "__main__":
    main()
