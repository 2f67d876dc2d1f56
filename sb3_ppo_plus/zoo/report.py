"""``report``: learning curves of several seeds and algorithms as PNG, and as one HTML file that opens offline."""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections import defaultdict
from pathlib import Path

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.zoo.found_runs import FoundRun, find_runs
from sb3_ppo_plus.zoo.learning_curves import (
    EVALUATIONS,
    STATISTICS,
    Curve,
    Group,
    make_group,
    read_evaluations,
    read_training,
)
from sb3_ppo_plus.zoo.parser import ZooParser

SOURCES = {
    "evaluations": "mean of the episodes of an evaluation (evaluations.npz)",
    "training": "mean of the last 100 episodes of training (monitor.csv)",
}


def main(arguments: list[str]) -> None:
    """Run ``report``. Flags that the RL Zoo's ``all_plots`` has too mean the same there.

    :param arguments: what the user gave after the command
    :raises SystemExit: if the folders hold no scores
    :raises ImportError: if matplotlib is not installed
    """
    args = _parser().parse_args(arguments)
    if args.labels is not None and len(args.labels) != len(args.folders):
        raise SystemExit(f"--labels must be as many as folders ({len(args.folders)}), got {len(args.labels)}")
    labelled = _labelled_runs(args)
    groups: list[Group] = []
    problems: list[str] = []
    sources: dict[str, str] = {}
    for env_id, by_label in labelled.items():
        sources[env_id] = _source([run for runs in by_label.values() for run in runs])
        for label, runs in by_label.items():
            group = _group(env_id, label, runs, sources[env_id], args, problems)
            if group is not None:
                groups.append(group)
    if not groups:
        found = "\n".join(problems) or f"no run with {EVALUATIONS} or monitor.csv"
        raise SystemExit(f"There is nothing to report in {', '.join(map(str, args.folders))}:\n{found}")
    for problem in problems:
        print(f"Left out: {problem}")
    write(groups, problems, sources, args)


def _parser() -> argparse.ArgumentParser:
    parser = ZooParser(
        prog="python -m sb3_ppo_plus.zoo report",
        description="Compare runs by their learning curves: several seeds of several algorithms, with intervals.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="log folders, or runs in them")
    parser.add_argument("-a", "--algos", nargs="+", help="algorithms to include; by default all")
    parser.add_argument("-e", "--env", nargs="+", help="environments to include; by default all")
    parser.add_argument("-l", "--labels", nargs="+", help="a label for each folder, put before the algorithm's name")
    parser.add_argument(
        "-k", "--key", default="results", choices=("results", "ep_lengths", "successes"), help="what is plotted"
    )
    parser.add_argument("-max", "--max-timesteps", type=float, default=math.inf, help="where curves end")
    parser.add_argument("-min", "--min-timesteps", type=float, default=-1, help="leave shorter runs out")
    parser.add_argument(
        "--statistic", choices=tuple(STATISTICS), default="mean", help="over seeds; iqm: interquartile mean"
    )
    parser.add_argument(
        "-median", "--median", dest="statistic", action="store_const", const="median", help="the median"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("logs/report"), help="folder of the HTML and PNG files"
    )
    return parser


def _labelled_runs(args: argparse.Namespace) -> dict[str, dict[str, list[FoundRun]]]:
    """Return the runs by environment and by label, each once."""
    labelled: dict[str, dict[str, list[FoundRun]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    for index, folder in enumerate(args.folders):
        prefix = "" if args.labels is None else f"{args.labels[index]}-"
        for run in find_runs(folder):
            is_wanted = (args.algos is None or run.algo in args.algos) and (args.env is None or run.env_id in args.env)
            if is_wanted and run.folder not in seen:
                seen.add(run.folder)
                labelled[run.env_id][prefix + run.algo].append(run)
    # PPOPlus first: it gets the first colour
    return {
        env_id: dict(sorted(labelled[env_id].items(), key=lambda item: ("ppo_plus" not in item[0], item[0])))
        for env_id in sorted(labelled)
    }


def _source(runs: list[FoundRun]) -> str:
    """Choose what all runs of an environment are compared by: evaluations, unless most of them lack these."""
    lacking = [run for run in runs if not (run.folder / EVALUATIONS).is_file()]
    n_trained = sum(any(map(_has_episodes, run.folder.glob("*monitor.csv"))) for run in lacking)
    return "evaluations" if len(runs) - len(lacking) >= n_trained else "training"


def _has_episodes(monitor_file: Path) -> bool:
    """Whether there is a line after the first two. A search for hyperparameters leaves files without."""
    if not monitor_file.is_file():
        return False
    with open(monitor_file, "rb") as file:
        return len(list(itertools.islice(file, 3))) == 3


def _group(
    env_id: str, label: str, runs: list[FoundRun], source: str, args: argparse.Namespace, problems: list[str]
) -> Group | None:
    """Read the curves of runs. What cannot be read is added to ``problems``."""
    curves: list[Curve] = []
    kept: list[FoundRun] = []
    for run in runs:
        name = f"{run.algo}/{run.folder.name}"
        try:
            curve = (
                read_evaluations(run.folder, args.key)
                if source == "evaluations"
                else read_training(run.folder, args.key)
            )
        except (OSError, UntrustedFileError) as error:
            # Reports are handed on: they name no folder of this machine
            problems.append(f"{name}: {str(error).replace(str(run.folder), name)}")
            continue
        if curve.timesteps[-1] < args.min_timesteps:
            problems.append(f"{name}: ends at step {curve.timesteps[-1]:.0f}, before {args.min_timesteps:.0f}")
            continue
        curves.append(curve)
        kept.append(run)
    if not curves:
        return None
    return make_group(env_id, label, kept, curves, args.statistic, args.max_timesteps)


def write(groups: list[Group], problems: list[str], sources: dict[str, str], args: argparse.Namespace) -> None:
    """Write the page and a PNG per environment.

    :param groups: curves
    :param problems: what was left out, and why
    :param sources: a key of ``SOURCES`` by environment
    :param args: of ``report``
    """
    from sb3_ppo_plus.zoo.report_figures import draw
    from sb3_ppo_plus.zoo.report_page import make_page

    args.output.mkdir(parents=True, exist_ok=True)
    figures = {}
    for env_id, source in sources.items():
        shown = [group for group in groups if group.env_id == env_id]
        if not shown:
            continue
        figures[env_id] = draw(shown, statistic=args.statistic, key=args.key, source=source)
        path = args.output / (re.sub(r"[^\w.-]", "-", env_id) + ".png")
        path.write_bytes(figures[env_id].light)
        print(f"Figure written to: {path}")
    page = args.output / "report.html"
    page.write_text(
        make_page(
            groups, figures, problems, {env_id: SOURCES[source] for env_id, source in sources.items()}, args.statistic
        ),
        encoding="utf-8",
    )
    print(f"Report written to: {page}")
