"""``--track`` with the real package of Weights & Biases, offline."""

import json
from pathlib import Path

import pytest
from zoo_runs import killed_in, results_of, training, zoo_in

KILLED_AT = 340


@pytest.mark.heavy
def test_a_tracked_run_is_recorded_and_a_resumed_one_goes_on_in_its_record(tmp_path):
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    arguments = training("CartPole-v1", 6, "--track", "--wandb-project-name", "tried")
    killed_in(tmp_path, KILLED_AT, *arguments, **settings)
    (description,) = tmp_path.rglob("resume.json")
    run_id = json.loads(description.read_text())["wandb"]
    run = description.parents[1]
    zoo_in(tmp_path, "resume", run.relative_to(tmp_path), **settings)
    assert len(results_of(run)["evaluations"]["timesteps"]) == 8
    # Two offline records of one run, which `wandb sync` joins
    records = [path for path in tmp_path.glob("wandb/offline-run-*") if path.name.endswith(f"-{run_id}")]
    assert len(records) == 2
    assert all(any(Path(record).glob(f"run-{run_id}.wandb")) for record in records)
    # The logs that it reads are those of TensorBoard, in one folder
    assert len({path.parent for path in (tmp_path / "runs").rglob("*tfevents*")}) == 1
