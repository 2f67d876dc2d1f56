"""Runs the tests of ``brax_cases.py`` in another process: JAX has threads, and forks of processes with threads hang."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_braxs_environments(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'of_cases'}"]
    run = subprocess.run([*command, str(HERE / "brax_cases.py")], capture_output=True, text=True, cwd=HERE.parents[2])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
