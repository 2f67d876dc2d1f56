"""The lines of runs that are done, and from them how long others will take."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from campaign_plan import Job, RunKey

Line = dict[str, Any]

# Rough seconds on one core: of a minibatch step, of choosing actions, of an environment's step
STEP_SECONDS = {"compiled": 0.0002, "ppo_plus": 0.0008, "sb3": 0.0022}
ACT_SECONDS = {"compiled": 0.0002, "ppo_plus": 0.0004, "sb3": 0.0006}
ENV_SECONDS = {"Humanoid": 0.0003, "Ant": 0.00015, "BipedalWalker": 0.0002, "LunarLander": 0.00008}
OTHER_ENV_SECONDS = 0.00006
# Networks of 256 units in place of 64
WIDE_FACTOR = 3.0


def read_lines(folder: Path) -> list[Line]:
    """Read the lines of all files of results; a last one that was not written whole does not count.

    :param folder: of the files
    :raises ValueError: for a line that is no JSON object
    """
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            if not text.endswith("\n"):
                continue
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    return lines


def append_line(path: Path, text: str) -> None:
    """Append a line, whole and on the disk; an unfinished last line that a crash has left is cut off.

    :param path: of the file; made where it is missing
    :param text: the line, with its line break
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def key_of(line: Line) -> RunKey:
    """Return the key of the run that a line is of."""
    return line["env"], line["column"], line["variant"], line["seed"], line["steps"], line["hyperparams_hash"]


def not_done(jobs: Iterable[Job], lines: Iterable[Line], engine: str = "auto") -> list[Job]:
    """Return the runs that have no line yet.

    :param jobs: runs, in the order of work
    :param lines: of runs that are done
    :param engine: "sb3": lines that PPOPlus has computed for SB3's columns do not count
    """
    done = {
        key_of(line) for line in lines if engine == "auto" or line["column"] == "ppo_plus" or line["engine"] == engine
    }
    return [job for job in jobs if job.key not in done]


def estimated_seconds(job: Job, lines: Iterable[Line]) -> tuple[float, bool]:
    """Say how much processor time a run will take.

    :param job: the run
    :param lines: of runs that are done; those with the same hyperparameters count, or else those of the same column
    :return: seconds, and whether they come from lines; otherwise they are a rough guess
    """
    alike = [
        line
        for line in lines
        if (line["env"], line["column"], line["engine"]) == (job.env, job.column, job.engine)
        and (line["variant"] == job.variant or line["hyperparams_hash"] == job.hyperparams_hash)
    ]
    same = [line for line in alike if line["hyperparams_hash"] == job.hyperparams_hash]
    if alike:
        return job.steps * median(line["cpu_seconds"] / line["steps_done"] for line in same or alike), True
    return _guessed_seconds(job), False


def _guessed_seconds(job: Job) -> float:
    """Guess the processor time from the numbers of minibatches and of steps."""
    given = job.hyperparams
    speed = "compiled" if given.get("compile") else job.engine
    n_minibatches = job.steps * int(given.get("n_epochs", 10)) / int(given.get("batch_size", 64))
    step_seconds = STEP_SECONDS[speed] * (WIDE_FACTOR if "256" in str(given.get("policy_kwargs")) else 1.0)
    env_seconds = next((of_one for name, of_one in ENV_SECONDS.items() if job.env.startswith(name)), OTHER_ENV_SECONDS)
    n_calls = job.steps / int(given.get("n_envs", 1))
    return n_minibatches * step_seconds + n_calls * ACT_SECONDS[speed] + job.steps * env_seconds


def report_of_time(jobs: list[Job], lines: list[Line], workers: int) -> str:
    """Say what is left and how long it takes.

    :param jobs: runs that are left
    :param lines: of runs that are done
    :param workers: runs at the same time
    """
    rows: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for job in jobs:
        column = job.column if job.variant is None else f"{job.column}, {job.variant}"
        rows.setdefault((job.env, column), []).append(estimated_seconds(job, lines))
    text = []
    for (env, column), estimates in rows.items():
        seconds = sum(of_one for of_one, _ in estimates)
        source = "measured" if all(is_measured for _, is_measured in estimates) else "guessed"
        text.append(f"{env:28} {column:24} {len(estimates):3} runs {seconds / 3600:8.2f} h ({source})")
    total = sum(of_one for estimates in rows.values() for of_one, _ in estimates) / 3600
    text.append(f"{len(jobs)} runs left: {total:.2f} h of one core, {total / workers:.2f} h with {workers} workers")
    return "\n".join(text)
