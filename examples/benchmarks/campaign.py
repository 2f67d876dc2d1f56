"""A campaign of training runs: reads a plan, does the runs that have no line of results yet, appends a line for each.

    python examples/benchmarks/campaign.py examples/benchmarks/plans/table.yml --workers 2
    python examples/benchmarks/campaign.py examples/benchmarks/plans/table.yml --dry-run
    python examples/benchmarks/campaign.py --pause

campaign_plan.py says what a plan holds. The lines of plans/NAME.yml go to results/NAME.jsonl.
Started again, a campaign continues: it skips what has a line in any file of results. A run that was killed goes on at
its last checkpoint bit for bit. It begins anew where that is not possible: with Box2D, and with SB3's own PPO.
Ctrl-C or SIGTERM ends a campaign with its runs, each of which has a process of its own.
A run that fails is reported, the others go on, and the exit status is 1.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from campaign_pause import POLL_SECONDS, WorkFolder, wait_until_stopped
from campaign_plan import COLUMNS, ENGINES, ROOT, Job, read_plan
from campaign_results import append_line, not_done, read_lines, report_of_time

BENCHMARKS = Path(__file__).resolve().parent
GRACE_SECONDS = 60
"""How long runs that are told to end may write a checkpoint."""


@dataclass
class Child:
    """A run in its process.

    :param job: the run
    :param folder: of its files
    :param process: it leads a process group of its own
    """

    job: Job
    folder: Path
    process: subprocess.Popen[bytes]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the run, if it has not ended; but for SIGTERM, also to what it has started."""
        if self.process.poll() is not None:
            return
        if number == signal.SIGTERM:
            # Without its compiler a run would go on uncompiled until its checkpoint, with other bits
            self.process.send_signal(number)
        else:
            os.killpg(self.process.pid, number)


class Campaign:
    """Does runs, several at a time.

    :param jobs: the runs, in the order of work
    :param work: folder of unfinished runs
    :param results: file to append the lines to
    :param workers: runs at the same time
    :param nice: niceness of the runs
    """

    def __init__(self, jobs: Sequence[Job], work: WorkFolder, results: Path, workers: int, nice: int) -> None:
        self.waiting = list(jobs)
        self.work, self.results, self.workers, self.nice = work, results, workers, nice
        self.children: list[Child] = []
        self.failed: list[Job] = []
        self.n_jobs, self.n_ended = len(jobs), 0
        self.received: list[int] = []
        self._is_paused = False

    def run(self) -> int:
        """Do all runs.

        :return: exit status: 0, 1 where a run has failed, 128 and the signal's number where one has ended it
        """
        self._install_handlers()
        try:
            while (self.waiting or self.children) and not self.received:
                self._follow_pause()
                self._collect()
                while self.waiting and len(self.children) < self.workers and not self._is_paused:
                    self._start(self.waiting.pop(0))
                time.sleep(POLL_SECONDS)
        finally:
            self._end_children()
            self.work.say_paused(False)
        if self.received:
            return 128 + self.received[0]
        for job in self.failed:
            say(f"failed: {job.name}")
        return 1 if self.failed else 0

    def _install_handlers(self) -> None:
        def note(number: int, frame: FrameType | None) -> None:
            self.received.append(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup a lost terminal ends nothing
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, note)

    def _start(self, job: Job) -> None:
        folder = self.work.path / job.name
        folder.mkdir(exist_ok=True)
        if (folder / "result.json").is_file():
            # The campaign was killed before it could append the line
            self._finish(job, folder)
            return
        (folder / "job.json").write_text(job.to_json(), encoding="utf-8")
        environment = dict(os.environ, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        script = [str(BENCHMARKS / "campaign_run.py"), str(folder), str(os.getpid())]
        command = ["nice", "-n", str(self.nice), sys.executable, *script]
        with (folder / "log.txt").open("ab") as log:
            # In a group of its own it does not see the terminal's Ctrl-C
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
            )
        self.children.append(Child(job, folder, process))
        say(f"begins {job.name}, process {process.pid}")

    def _collect(self) -> None:
        for child in list(self.children):
            status = child.process.poll()
            if status is None:
                continue
            self.children.remove(child)
            if status == 0:
                self._finish(child.job, child.folder)
            else:
                self.failed.append(child.job)
                self.n_ended += 1
                say(f"FAILED {child.job.name} with status {status}, see {child.folder / 'log.txt'}")

    def _finish(self, job: Job, folder: Path) -> None:
        append_line(self.results, (folder / "result.json").read_text(encoding="utf-8"))
        shutil.rmtree(folder)
        self.n_ended += 1
        say(f"done {job.name} ({self.n_ended} of {self.n_jobs})")

    def _follow_pause(self) -> None:
        wanted = self.work.wants_pause()
        if wanted == self._is_paused:
            return
        self._is_paused = wanted
        for child in self.children:
            child.send(signal.SIGSTOP if wanted else signal.SIGCONT)
        if wanted:
            for child in self.children:
                if child.process.poll() is None:
                    wait_until_stopped(child.process.pid)
        self.work.say_paused(wanted)
        say("paused" if wanted else "goes on")

    def _end_children(self) -> None:
        """Have all runs write a checkpoint and end; kill them after a while, or at a second signal."""
        for child in self.children:
            child.send(signal.SIGTERM)
            child.send(signal.SIGCONT)
        deadline, n_received = time.monotonic() + GRACE_SECONDS, len(self.received)
        while any(child.process.poll() is None for child in self.children):
            if time.monotonic() > deadline or len(self.received) > n_received:
                for child in self.children:
                    child.send(signal.SIGKILL)
            time.sleep(0.1)
        self._collect_what_is_done()

    def _collect_what_is_done(self) -> None:
        for child in self.children:
            if child.process.returncode == 0:
                self._finish(child.job, child.folder)
            else:
                say(f"ended {child.job.name}; it goes on next time")
        self.children.clear()


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def selected(jobs: Sequence[Job], only: Sequence[str], seeds: Sequence[int], columns: Sequence[str]) -> list[Job]:
    """Return the runs of some environments, seeds and columns.

    :param jobs: all runs of the plan
    :param only: environments; empty: all
    :param seeds: the same of seeds
    :param columns: the same of columns
    :raises ValueError: for what the plan does not have
    """
    for name, wanted in (("env", only), ("seed", seeds), ("column", columns)):
        there = sorted({getattr(job, name) for job in jobs})
        unknown = [value for value in wanted if value not in there]
        if unknown:
            raise ValueError(f"the plan has no {name} {unknown[0]}; it has {there}")
        jobs = [job for job in jobs if not wanted or getattr(job, name) in wanted]
    return list(jobs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, nargs="?", help="YAML file, as those of examples/benchmarks/plans")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--nice", type=int, default=10, help="niceness of the runs")
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "campaign", help="folder of unfinished runs")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results", help="folder of the results")
    parser.add_argument("--only", nargs="+", default=[], metavar="ENV", help="these environments only")
    parser.add_argument("--seeds", nargs="+", default=[], type=int, help="these seeds only")
    parser.add_argument("--columns", nargs="+", default=[], choices=COLUMNS, help="these columns only")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="sb3: SB3's own PPO for its columns")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="say what is left and how long it takes")
    action.add_argument("--pause", action="store_true", help="stop the runs of the campaign in --work where they stand")
    action.add_argument("--unpause", action="store_true", help="have them go on")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.plan is None and not (args.pause or args.unpause):
        parser.error("a plan is needed, but for --pause and --unpause")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    :param argv: its arguments; None: those of the process
    :return: exit status
    """
    args = parse(argv)
    work = WorkFolder(args.work.resolve())
    if args.pause or args.unpause:
        print(work.pause() if args.pause else work.unpause())
        return 0
    try:
        jobs = selected(read_plan(args.plan, args.engine), args.only, args.seeds, args.columns)
        lines = read_lines(args.results)
        left = not_done(jobs, lines, args.engine)
        if not args.dry_run:
            work.lock()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report_of_time(left, lines, args.workers), flush=True)
    if args.dry_run:
        return 0
    return Campaign(left, work, args.results / f"{args.plan.stem}.jsonl", args.workers, args.nice).run()


if __name__ == "__main__":
    sys.exit(main())
