"""PPOPlus on a GPU: does it work, are its bits SB3's, is it faster, and where does the time go.

    python examples/benchmarks/gpu_check.py --device cuda --out logs/gpu [--only b,c1,f1] [--limit 430]
    python examples/benchmarks/gpu_check.py --device cpu --quick --no-code --serial     # a dry run without a GPU

Each stage is a process with a time limit of its own. Each result is a line of JSON in OUT/check.jsonl, written at once,
so that a stage that takes too long loses only what it has not done yet. Stages that check run side by side; stages that
measure run alone, the most telling ones first. OUT/log.txt holds what the stages print, OUT/summary.txt the table.

Stages: a versions; b bits beside SB3's; c1-c4 compiled beside eager; d resuming; e the project's tests on the device; h
where the host waits for the GPU; f1-f5 speed of SB3, PPOPlus, compiled, and that without CUDA graphs, interleaved; g
the profiler.
The exit status is 1 where a result is not ok; a stage that did not end is such a result.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_checks.report import BENCHMARKS, Options, Report

# Fields of a result that are too long for the table
ONLY_IN_JSON = ("stage", "item", "traceback", "top", "where", "kinds")
MAX_ROW = 360
# What a stage gets even where no time is left: it may have just ended
MIN_SECONDS = 5.0


class Stage(NamedTuple):
    """What a stage runs.

    :param function: module of gpu_checks and function in it, which takes ``Options`` and a ``Report``
    :param seconds: time limit
    :param measures: whether it measures time, and so runs alone
    """

    function: str
    seconds: int
    measures: bool = False


STAGES = {
    "a": Stage("stages.versions", 60),
    "b": Stage("stages.equality", 170),
    "c1": Stage("stages.compiled", 210),
    "c2": Stage("stages.compiled", 210),
    "c3": Stage("stages.compiled", 210),
    "c4": Stage("stages.compiled", 210),
    "d": Stage("stages.resuming", 200),
    "e": Stage("stages.project_tests", 210),
    "h": Stage("stages.host_waits", 150),
    "f1": Stage("speed.speed", 110, measures=True),
    "f4": Stage("speed.speed", 130, measures=True),
    "g": Stage("speed.profile", 90, measures=True),
    "f3": Stage("speed.speed", 80, measures=True),
    "f5": Stage("speed.speed", 130, measures=True),
    "f2": Stage("speed.speed", 90, measures=True),
}


def run_stage(name: str, options: Options) -> None:
    """Do the work of one stage in this process.

    :param name: a key of ``STAGES``
    """
    module_name, _, function_name = STAGES[name].function.partition(".")
    function = getattr(importlib.import_module(f"gpu_checks.{module_name}"), function_name)
    function(options, Report(options.out, name))


def run_stages(names: list[str], options: Options) -> bool:
    """Run stages, each in a process of its own, and print the table.

    :param names: keys of ``STAGES``
    :return: whether every result is ok
    """
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "check.jsonl"
    results.write_text("")
    started = time.time()
    with (options.out / "log.txt").open("w") as log:
        for group in _groups(names, options.parallel):
            running = [(name, time.time(), _start(name, options, log)) for name in group]
            for name, stage_started, process in running:
                end = min(stage_started + STAGES[name].seconds * options.scale, started + options.limit)
                code = _wait(process, end)
                took = round(time.time() - stage_started, 1)
                Report(options.out, name).write("stage", ok=code == 0, code=code, seconds=took)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    text = f"{table(rows)}\nall in {time.time() - started:.0f} s\n"
    (options.out / "summary.txt").write_text(text)
    print(text, flush=True)
    return all(row["ok"] for row in rows)


def _groups(names: list[str], parallel: bool) -> list[list[str]]:
    """Return the stages that run at the same time: what checks together, then what measures, one by one."""
    checks = [name for name in STAGES if name in names and not STAGES[name].measures]
    measures = [name for name in STAGES if name in names and STAGES[name].measures]
    return ([checks] if parallel else [[name] for name in checks]) + [[name] for name in measures]


def _start(name: str, options: Options, log: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401  # an open file
    command = [sys.executable, __file__, "--stage", name, "--device", options.device, "--out", str(options.out)]
    command += ["--quick"] * options.quick + ["--no-code"] * options.no_code
    paths = os.pathsep.join([str(BENCHMARKS.parents[1]), os.environ.get("PYTHONPATH", "")])
    # Without the first of these, cuBLAS is not deterministic
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)


def _wait(process: subprocess.Popen[bytes], end: float) -> int | str:
    """Wait for a stage until ``end``, then kill it and what it has started."""
    try:
        return process.wait(max(MIN_SECONDS, end - time.time()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "timeout"


def table(rows: list[dict[str, Any]]) -> str:
    """Show results as text, one a line; a stage that ended well has no line of its own."""
    lines = []
    for row in rows:
        if row["item"] == "stage" and row["ok"]:
            continue
        values = " ".join(f"{name}={value}" for name, value in row.items() if name not in ONLY_IN_JSON)
        lines.append(f"{row['stage']:3}{row['item']:40} {values}"[:MAX_ROW])
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Options.out, help="folder of the results")
    parser.add_argument("--limit", type=float, default=Options.limit, help="seconds for all stages together")
    parser.add_argument("--scale", type=float, default=Options.scale, help="factor of the stages' own time limits")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="fewer cases and tiny sizes; times say nothing")
    parser.add_argument("--no-code", action="store_true", help="compiled graphs without TorchInductor: a dry run")
    parser.add_argument("--serial", dest="parallel", action="store_false", help="one stage at a time")
    given = vars(parser.parse_args(arguments))
    only, stage = given.pop("only").split(","), given.pop("stage")
    unknown = sorted(set(only) - STAGES.keys())
    if unknown:
        parser.error(f"--only: no stages {', '.join(unknown)}; there are {', '.join(STAGES)}")
    options = Options(**given)
    if stage:
        run_stage(stage, options)
        return 0
    return 0 if run_stages(only, options) else 1


if __name__ == "__main__":
    sys.exit(main())
