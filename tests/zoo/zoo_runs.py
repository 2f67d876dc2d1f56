"""Runs of the zoo in processes of their own, and what they leave in their folders.

``python zoo_runs.py STEPS train ...`` is ``python -m sb3_ppo_plus.zoo train ...``, which SIGKILL ends in the rollout in
which STEPS timesteps are done, when no checkpoint is being written.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

MODULE = ("-m", "sb3_ppo_plus.zoo")
SMALL = ["n_envs:2", "n_steps:32", "batch_size:32", "n_epochs:2", "normalize:True", "learning_rate:cos_1e-3"]
ROLLOUT = 64


def start(arguments, cwd, **kwargs):
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env={**env, **kwargs}, **pipes)


def zoo_in(cwd, *arguments, status=0, program=MODULE, **kwargs):
    """Run a command of the zoo; return what it has printed."""
    process = start([*program, *arguments], cwd, **kwargs)
    output, _ = process.communicate()
    assert process.returncode == status, output
    return output


def killed_in(cwd, n_steps, *arguments, **kwargs):
    """Run a command of the zoo until SIGKILL ends it."""
    return zoo_in(cwd, n_steps, *arguments, status=-signal.SIGKILL, program=(__file__,), **kwargs)


def training(env_id, n_updates=6, *flags, params=(), **others):
    """Arguments of a short training run, with a checkpoint after every second update."""
    given = {"env": env_id, "n-timesteps": n_updates * ROLLOUT, "seed": 3, "device": "cpu", "verbose": 0}
    given |= {"eval-freq": 48, "eval-episodes": 1, "checkpoint-freq": 2 * ROLLOUT} | others
    return [
        "train",
        *(str(part) for name, value in given.items() for part in (f"--{name}", value)),
        *flags,
        *("--hyperparams", *SMALL, *params),
    ]


def results_of(folder):
    """What must be equal: parameters, optimiser, normaliser, evaluations and monitor files but for times."""
    from states import state_of

    from sb3_ppo_plus import PPOPlus

    folder = Path(folder)
    (inner,) = (path.parent for path in folder.glob("*/args.yml"))
    results = {name: state_of(PPOPlus.load(folder / f"{name}.zip")) for name in (inner.name, "best_model")}
    for name in ("vecnormalize.json", "vecnormalize.pkl"):
        if (inner / name).exists():
            results[name] = (inner / name).read_bytes()
    with np.load(folder / "evaluations.npz") as evaluations:
        results["evaluations"] = dict(evaluations)
    for path in sorted(folder.glob("*.monitor.csv")):
        rows = path.read_text().splitlines()[1:]
        results[path.name] = [row.split(",")[:2] for row in rows]
        assert len(rows) > 1, "no episode has ended: the case proves nothing"
    return results


def kill_at(n_steps):
    from sb3_ppo_plus.zoo.train import RunCheckpoint

    def on_step(self):
        if self.num_timesteps >= n_steps:
            self.wait_for_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    RunCheckpoint._on_step = on_step


if __name__ == "__main__":
    from sb3_ppo_plus import zoo

    kill_at(int(sys.argv[1]))
    zoo.main(sys.argv[2:])
