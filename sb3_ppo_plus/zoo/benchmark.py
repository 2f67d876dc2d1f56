"""``benchmark``: evaluates all runs of a log folder, and writes the RL Zoo's table."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import load_results

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.regular_files import open_regular_file
from sb3_ppo_plus.zoo.found_runs import FoundRun, find_runs
from sb3_ppo_plus.zoo.hyperparams import ALGO, import_optional
from sb3_ppo_plus.zoo.parser import ZooParser
from sb3_ppo_plus.zoo.run_folder import (
    act,
    add_run_arguments,
    add_trust_argument,
    create_env,
    find_run,
    is_deterministic,
    load_model,
    prepare,
)

#: Beside the episodes: what was evaluated, and how
EVALUATION = "evaluation.json"
HEADER = """
## Performance of trained agents

`python -m sb3_ppo_plus.zoo benchmark` made this table. Each row is one run. Its last model, trained for `n_timesteps`,
acted for about `eval_timesteps`; `mean_reward` and `std_reward` are those of the `eval_episodes` that ended.
Actions are the most likely ones, but drawn in Atari games and minigrid.

One run says little about an algorithm: `python -m sb3_ppo_plus.zoo report` compares several seeds.

"M" stands for million, "k" for thousand.

"""


def main(arguments: list[str]) -> None:
    """Run ``benchmark``; its flags are those of ``rl_zoo3.benchmark``.

    :param arguments: what the user gave after the command
    :raises SystemExit: if there is no run, or after the table, if a run could not be evaluated
    """
    args = _parser().parse_args(arguments)
    found = find_runs(Path(args.log_dir))
    loadable = [run for run in found if args.trust or run.algo == ALGO]
    if len(loadable) < len(found):
        n_others = len(found) - len(loadable)
        print(f"{n_others} runs of other algorithms than {ALGO} are left out: only --trust loads their models")
    runs = [run for run in loadable if any(run.folder.glob("*.zip"))]
    if len(runs) < len(loadable):
        n_without = len(loadable) - len(runs)
        print(f"{n_without} runs have no model: killed ones get it by resume, searches (-optimize) make none")
    if not runs:
        raise SystemExit(f"{args.log_dir} holds no run of {ALGO} that could be evaluated")
    rows, failures = [], []
    for index, run in enumerate(runs[:1] if args.test_mode else runs):
        if args.verbose >= 1:
            print(f"{index + 1}/{len(runs)}\nEvaluating {run.algo} on {run.env_id}...")
        try:
            rows.append(_evaluated(run, args))
        except (Exception, SystemExit) as error:
            # One broken run takes nothing from the others
            hint = " (--trust loads it)" if isinstance(error, UntrustedFileError) else ""
            failures.append(f"{run.folder}: {type(error).__name__}: {error}{hint}")
            print(f"Error during evaluation, skipping: {failures[-1]}")
    if rows:
        path = write_table(rows, Path(args.benchmark_dir))
        print(f"Results written to: {path}")
        if not args.test_mode:
            shutil.copy(path, "benchmark.md")
            print("Results copied to: benchmark.md")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} of {len(runs)} runs are not in the table:", *failures]))


def _parser() -> argparse.ArgumentParser:
    parser = ZooParser(
        prog="python -m sb3_ppo_plus.zoo benchmark", description="Evaluate all runs of a log folder into one table."
    )
    parser.add_argument("--log-dir", help="log folder", default="logs")
    parser.add_argument("--benchmark-dir", help="folder of the table and the evaluations", default="logs/benchmark")
    parser.add_argument("-n", "--n-timesteps", help="steps of each environment", default=150_000, type=int)
    parser.add_argument("--n-envs", help="number of environments", default=1, type=int)
    parser.add_argument("--verbose", help="0: no output about runs, 1: some", default=1, type=int)
    parser.add_argument("--seed", help="seed of the random generators", type=int, default=0)
    parser.add_argument("--test-mode", action="store_true", help="evaluate one run only, and copy no table")
    parser.add_argument("--with-mujoco", action="store_true", help="as in the RL Zoo, whose effect is always on")
    parser.add_argument("--no-hub", action="store_true", help="no models from the hub; this is always so: see pull")
    parser.add_argument("--num-threads", help="number of PyTorch's threads", default=2, type=int)
    parser.add_argument("--device", help="PyTorch's device", default="auto")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules to import, which register environments")
    add_trust_argument(parser)
    return parser


def _evaluated(found: FoundRun, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a run. An evaluation of the same model with the same settings is not repeated."""
    flags = argparse.ArgumentParser()
    add_run_arguments(flags)
    same = {name: getattr(args, name) for name in ("n_envs", "seed", "num_threads", "device", "gym_packages", "trust")}
    which = {"algo": found.algo, "env": found.env_id, "exp_id": found.exp_id, "folder": str(found.folder.parents[1])}
    run_args = argparse.Namespace(**{**vars(flags.parse_args([])), **same, **which})
    prepare(run_args)
    run = find_run(run_args, found.folder)
    name = f"{found.algo}-{found.parameters.name}"
    folder = Path(args.benchmark_dir) / name / found.suffix
    with open_regular_file(run.model_path) as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    settings = {
        "model": digest,
        **{key: getattr(args, key) for key in ("n_timesteps", "n_envs", "seed")},
    }
    evaluation = _finished(folder, settings)
    if evaluation is None:
        # Episodes of more environments may be there
        for old in (*folder.glob("*.monitor.csv"), *folder.glob(EVALUATION)):
            old.unlink()
        env = create_env(run, run_args, log_dir=str(folder))
        try:
            model = load_model(run, env, run_args)
            act(model, env, args.n_timesteps, is_deterministic(run, run_args))
        finally:
            env.close()
        evaluation = {**settings, "num_timesteps": int(model.num_timesteps)}
        (folder / EVALUATION).write_text(json.dumps(evaluation))
    elif args.verbose >= 1:
        print("Skipping eval...")
    return _row(found, folder, int(evaluation["num_timesteps"]), args)


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier evaluation with these settings has written when it was done."""
    try:
        evaluation = json.loads((folder / EVALUATION).read_text())
        is_same = all(evaluation[key] == value for key, value in settings.items())
        return evaluation if is_same and isinstance(evaluation["num_timesteps"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _row(found: FoundRun, folder: Path, num_timesteps: int, args: argparse.Namespace) -> dict[str, Any]:
    episodes = load_results(str(folder))
    if len(episodes) == 0:
        raise ValueError(f"no episode ended in {args.n_timesteps} steps: give a larger -n")
    rewards = np.asarray(episodes["r"])
    row = {
        "algo": found.algo,
        "env_id": found.env_id,
        "mean_reward": float(rewards.mean()),
        "std_reward": float(rewards.std()),
        "n_timesteps": short_number(num_timesteps),
        "eval_timesteps": int(np.sum(episodes["l"])),
        "eval_episodes": len(episodes),
        "exp_id": found.exp_id,
    }
    if args.verbose >= 1:
        print(f"{row['eval_timesteps']} timesteps\n{row['eval_episodes']} Episodes")
        print(f"Mean reward: {row['mean_reward']:.2f} +- {row['std_reward']:.2f}\n")
    return row


def short_number(n_timesteps: int) -> str:
    """Write a number of steps as the RL Zoo's table does: 99328 is "99k".

    :param n_timesteps: the number
    """
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if n_timesteps >= size:
            return f"{n_timesteps // size}{unit}"
    return str(n_timesteps)


def write_table(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write ``benchmark.md``. Its columns are the RL Zoo's, and ``exp_id`` if an environment has several runs.

    :param rows: the runs
    :param folder: where it goes
    :return: the file
    """
    table = import_optional("pandas").DataFrame(rows).sort_values(by=["algo", "env_id", "exp_id"])
    if not table.duplicated(["algo", "env_id"]).any():
        table = table.drop(columns="exp_id")
    writer = import_optional("pytablewriter").MarkdownTableWriter(max_precision=3)
    writer.from_dataframe(table)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmark.md"
    path.write_text(HEADER + writer.dumps())
    return path
