"""One run of a campaign, in a process of its own: trains, scores the final policy, writes the run's line.

``python campaign_run.py FOLDER PID`` reads FOLDER/job.json and writes FOLDER/result.json. PID is the process that has
started it, with which it ends. Where the environments can be saved and PPOPlus computes, FOLDER/checkpoints holds
checkpoints, from which a killed run goes on bit for bit.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from campaign_plan import ROOT, Job
from sb3_arguments import sb3_arguments
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from zoo_envs import FIRST_EVALUATION_SEED, ZooEnvs

from sb3_ppo_plus import CheckpointError, PPOPlus, TrainingCheckpoint, latest_checkpoint

Model = TypeVar("Model", bound=PPO)

N_POINTS = 50
N_CHECKPOINTS = 20
N_EPISODES, N_EPISODES_MUJOCO = 100, 50
STOPPED = 75
"""Exit status of a run that was told to stop and has written a checkpoint."""
PACKAGES = (
    *("torch", "numpy", "gymnasium", "stable_baselines3", "sb3_contrib", "rl_zoo3"),
    *("mujoco", "box2d", "box2d-py"),
)
# Code whose changes matter for results
CODE = ("sb3_ppo_plus", "zoo_hyperparams", "examples/benchmarks/*.py")
INEXACT = "the environments have no get_resume_state|what follows may differ|checkpoints do not hold everything"


class Progress(BaseCallback):
    """Records the learning curve and what training costs; both survive a resume.

    A point of the curve is the mean return of the last 100 training episodes, taken at each 1/50 of the steps.

    :param steps: all steps of the run
    :param commit: commit of the code
    """

    def __init__(self, steps: int, commit: str | None) -> None:
        super().__init__()
        self.steps = steps
        self.curve: list[tuple[int, float | None]] = []
        self.commits = [commit]
        self.n_resumes = 0
        self._earlier = {"cpu_seconds": 0.0, "wall_seconds": 0.0}
        self._cpu_began, self._wall_began = cpu_seconds(), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Seconds of training until now; what a killed process did after its last checkpoint does not count."""
        now = {"cpu_seconds": cpu_seconds() - self._cpu_began, "wall_seconds": time.perf_counter() - self._wall_began}
        return {name: now[name] + self._earlier[name] for name in now}

    def get_state(self) -> dict[str, Any]:
        """Tell a checkpoint what the rest of the run needs."""
        return {
            "curve": [list(point) for point in self.curve],
            "commits": self.commits,
            "n_resumes": self.n_resumes,
            "seconds": self.seconds(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` has returned."""
        self.curve = [(steps, value) for steps, value in state["curve"]]
        self.commits = [commit for commit in state["commits"] if commit != self.commits[-1]] + self.commits[-1:]
        self.n_resumes = state["n_resumes"] + 1
        self._earlier = dict(state["seconds"])

    def _on_step(self) -> bool:
        while len(self.curve) < N_POINTS and self.num_timesteps * N_POINTS >= (len(self.curve) + 1) * self.steps:
            episodes = self.model.ep_info_buffer or ()
            mean = round(float(np.mean([episode["r"] for episode in episodes])), 4) if episodes else None
            self.curve.append((self.num_timesteps, mean))
        return True


def run(job: Job, folder: Path) -> dict[str, Any] | None:
    """Train and score.

    :param job: the run
    :param folder: for checkpoints
    :return: the run's line; None where a signal has stopped training
    """
    arguments = dict(job.hyperparams)
    envs = ZooEnvs.take_from(arguments, job.env)
    if job.column != "ppo_plus":
        arguments = peer_arguments(arguments, job.engine)
    # Asked first: the code may be changed while the run trains
    origin = origin_of_results()
    progress = Progress(job.steps, origin["commit"])
    model: PPO | None
    if job.engine == "ppo_plus" and envs.can_be_saved():
        model = train_with_checkpoints(job, envs, arguments, progress, folder / "checkpoints")
    else:
        algorithm = PPOPlus if job.engine == "ppo_plus" else PPO
        model = new_model(algorithm, job, envs.for_training(job.seed), arguments)
        model.learn(job.steps, progress)
    if model is None:
        return None
    seconds = progress.seconds()
    return line_of(job, model, score(model, envs), progress, seconds) | origin


def line_of(
    job: Job,
    model: PPO,
    scores: list[float],
    progress: Progress,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Make the line of a run, without where it comes from.

    :param job: the run
    :param model: the trained model
    :param scores: returns of the final policy
    :param progress: the run's callback
    :param seconds: what training has cost
    """
    return {
        "env": job.env,
        "column": job.column,
        "variant": job.variant,
        "entry": job.entry,
        "engine": job.engine,
        "seed": job.seed,
        "steps": job.steps,
        "steps_done": model.num_timesteps,
        "mean": round(float(np.mean(scores)), 4),
        "std": round(float(np.std(scores)), 4),
        "scores": [round(float(episode), 4) for episode in scores],
        "first_evaluation_seed": FIRST_EVALUATION_SEED,
        "curve": progress.curve,
        **{name: round(value, 2) for name, value in seconds.items()},
        "hyperparams": job.hyperparams,
        "hyperparams_hash": job.hyperparams_hash,
        "sha256": sha256_of(model),
        "resumes": progress.n_resumes,
        "earlier_commits": progress.commits[:-1],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peer_arguments(entry: dict[str, Any], engine: str) -> dict[str, Any]:
    """Turn a peer's entry into arguments of SB3's PPO, or of PPOPlus so that it gives the same bits.

    :param entry: hyperparameters without what is about environments
    :param engine: "sb3" or "ppo_plus"
    """
    compile = entry.pop("compile", False)
    arguments = sb3_arguments(entry)
    if engine == "ppo_plus":
        arguments |= {"pessimistic_value_clip": False, "action_masking": False, "compile": compile}
    return arguments


def new_model(algorithm: type[Model], job: Job, env: VecEnv, arguments: dict[str, Any]) -> Model:
    """Make the model that a run begins with.

    :param algorithm: PPO or PPOPlus
    :param job: the run
    :param env: the training environments
    :param arguments: of the algorithm
    """
    given = dict(arguments)
    return algorithm(given.pop("policy"), env, seed=job.seed, device="cpu", **given)


def train_with_checkpoints(
    job: Job, envs: ZooEnvs, arguments: dict[str, Any], progress: Progress, path: Path
) -> PPOPlus | None:
    """Train, from the last checkpoint on where there is one that continues exactly.

    :param job: the run
    :param envs: its environments
    :param arguments: of PPOPlus
    :param progress: its callback
    :param path: folder of the checkpoints
    :return: the model; None where a signal has stopped training
    """
    checkpoint = TrainingCheckpoint(max(1, job.steps // N_CHECKPOINTS), path, keep_last=2)
    model = resumed(path, envs, job.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", INEXACT)
        if model is not None:
            print(f"goes on at {model.num_timesteps} steps", flush=True)
            model.continue_learning([progress, checkpoint])
        else:
            model = new_model(PPOPlus, job, envs.for_training(job.seed, resumable=True), arguments)
            model.learn(job.steps, [progress, checkpoint])
    return model if checkpoint.received_signal is None else None


def resumed(path: Path, envs: ZooEnvs, seed: int) -> PPOPlus | None:
    """Resume from the last checkpoint; remove all where it would not be exact, as with another version of PyTorch.

    :param path: folder of the checkpoints
    :param envs: the run's environments
    :param seed: the run's seed
    :return: None where the run has to begin anew
    """
    if latest_checkpoint(path) is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", INEXACT)
            return PPOPlus.resume(path, envs.for_training(seed, resumable=True), device="cpu")
    except (UserWarning, CheckpointError) as error:
        print(f"begins anew: {error}", flush=True)
        shutil.rmtree(path)
        return None


def score(model: PPO, envs: ZooEnvs) -> list[float]:
    """Return the returns of the final policy, deterministic, in episodes that begin alike for every run.

    :param model: the trained model
    :param envs: the run's environments
    """
    assert model.env is not None
    env = envs.for_evaluation(model.env)
    is_mujoco = ".mujoco." in str(gym.spec(envs.env_id).entry_point)
    predictor = model.masked(env) if isinstance(model, PPOPlus) and model.needs_masks else model
    n_episodes = N_EPISODES_MUJOCO if is_mujoco else N_EPISODES
    returns, _ = evaluate_policy(predictor, env, n_episodes, deterministic=True, return_episode_rewards=True)
    assert isinstance(returns, list)
    return returns


def sha256_of(model: PPO) -> str:
    """Hash names and bytes of the policy's parameters, so that two runs can be compared by bits.

    :param model: the trained model
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cpu_seconds() -> float:
    """Processor time of this process, and of those that it has started and that have ended, such as the compiler."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def origin_of_results() -> dict[str, Any]:
    """Return the checkout's commit, whether its code was changed since (None without git), versions, the processor."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    commit, is_dirty = None, None
    try:
        commit, is_dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *CODE))
    except (OSError, subprocess.CalledProcessError):
        print("no git: the line will name no commit", flush=True)
    return {"commit": commit, "dirty": is_dirty, "versions": versions(), "processor": processor()}


def versions() -> dict[str, str]:
    """Versions of Python and of all that computes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Name of the processor, and the instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", text, re.MULTILINE))
        if "model name" in fields:
            numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
            name = ", ".join([fields["model name"], *numbers])
    return f"{name}, {th.backends.cpu.get_cpu_capability()}"


def end_with(parent: int) -> None:
    """End this process, in whatever it does, soon after its parent has ended.

    :param parent: process id of the parent
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: Path) -> int:
    """Do the run of a folder.

    :param folder: with ``job.json``
    :return: exit status
    """
    th.set_num_threads(1)
    line = run(Job.from_json((folder / "job.json").read_text(encoding="utf-8")), folder)
    if line is None:
        return STOPPED
    unfinished = folder / "result.json.tmp"
    unfinished.write_text(json.dumps(line) + "\n", encoding="utf-8")
    unfinished.rename(folder / "result.json")
    return 0


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    sys.exit(main(Path(sys.argv[1])))
