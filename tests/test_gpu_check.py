"""The check of PPOPlus on a GPU, examples/benchmarks/gpu_check.py, runs on the CPU with tiny sizes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
from gpu_checks import cases, speed, stages
from gpu_checks.report import BENCHMARKS, Options, Report

ROOT = Path(__file__).resolve().parent.parent
# What each stage must say at least, with the first of its cases
ITEMS = {
    "a": {"versions"},
    "b": {"box", "lstm beside RecurrentPPO", "box beside the CPU"},
    "c1": {"compiled box", "replayed as CUDA graphs: box"},
    "d": {"resume box", "save, load on CPU, load untrusted"},
    "e": {"tests moved to the device"},
    "h": {"waits: box", "waits: box compiled", "waits: SB3 box"},
    "f1": {f"pixels 84x84x4, 8 envs: {label}" for label in speed.CONTENDERS}
    - {"pixels 84x84x4, 8 envs: compiled, CPU"},
    "g": {"64x64 net, 8 envs, batch 64: SB3", "64x64 net, 8 envs, batch 64: compiled, not captured"},
}


def results_in(folder):
    return [json.loads(line) for line in (folder / "check.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ITEMS)
def test_each_result_of_a_stage_is_ok(stage, tmp_path):
    gpu_check.run_stage(stage, Options(device="cpu", out=tmp_path, quick=True, no_code=True))
    results = results_in(tmp_path)
    assert [result for result in results if not result["ok"]] == []
    assert ITEMS[stage] <= {result["item"] for result in results}


def test_every_function_of_a_stage_is_run_here():
    functions = {stage.function for stage in gpu_check.STAGES.values()}
    assert {gpu_check.STAGES[name].function for name in ITEMS} == functions


@pytest.mark.parametrize("name", sorted(set(cases.CASES) - set(cases.NEED_CUDA)))
def test_every_case_can_be_built(name):
    model = cases.CASES[name].build("cpu")
    assert cases.parameters_of(model).isfinite().all()


def test_the_stages_name_cases_and_tests_that_exist():
    assert {name for names in stages.COMPILED.values() for name in names} <= cases.CASES.keys()
    assert [path for path in stages.WITH_A_DEVICE + stages.MOVED_TO_THE_DEVICE if not (ROOT / path).exists()] == []
    assert {name for name in gpu_check.STAGES if name.startswith("f")} == speed.CASES.keys()
    assert {name for name in gpu_check.STAGES if name.startswith("c")} == stages.COMPILED.keys()


def test_it_tells_what_differs(tmp_path, monkeypatch):
    settings = cases.CASES["box"].settings
    trains_longer = cases.Case(settings={**settings, "n_epochs": 4})
    original = cases.Case.build

    def build(self, device, algorithm=cases.PPOPlus, **given):
        return original(trains_longer if algorithm is cases.PPOPlus else self, device, algorithm, **given)

    monkeypatch.setattr(cases.Case, "build", build)
    stages.equality(Options(device="cpu", out=tmp_path, quick=True), Report(tmp_path, "b"))
    assert [result["item"] for result in results_in(tmp_path) if not result["ok"]] == ["box"]


def test_an_error_is_a_result_and_the_rest_goes_on(tmp_path):
    report = Report(tmp_path, "a")
    report.check("fails", lambda: 1 / 0)
    report.check("works", dict)
    failed, worked = results_in(tmp_path)
    assert failed["ok"] is False and failed["error"] == "ZeroDivisionError: division by zero"
    assert worked["ok"] is True
    assert gpu_check.table([failed, worked]).splitlines()[0].startswith("a  fails")


def test_each_stage_is_a_process_and_the_table_comes_last(tmp_path, capfd):
    command = [
        sys.executable,
        BENCHMARKS / "gpu_check.py",
        "--device",
        "cpu",
        "--quick",
        "--out",
        tmp_path,
        "--only",
        "a",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [result["item"] for result in results_in(tmp_path)] == ["versions", "stage"]
    table, last = (tmp_path / "summary.txt").read_text().splitlines()
    assert table.startswith("a  versions") and last.startswith("all in ")
    assert done.stdout.splitlines()[-3:-1] == [table, last]


def test_a_stage_that_takes_too_long_is_killed(tmp_path, monkeypatch):
    endless = subprocess.Popen(["sleep", "600"], start_new_session=True)
    monkeypatch.setattr(gpu_check, "_start", lambda *arguments: endless)
    monkeypatch.setattr(gpu_check, "MIN_SECONDS", 0.1)
    assert not gpu_check.run_stages(["a"], Options(device="cpu", out=tmp_path, limit=0.2))
    assert endless.returncode == -signal.SIGKILL
    (result,) = results_in(tmp_path)
    assert (result["item"], result["ok"], result["code"]) == ("stage", False, "timeout")


def test_an_unknown_stage_is_an_error(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "a,z"])
    assert "no stages z" in capsys.readouterr().err
