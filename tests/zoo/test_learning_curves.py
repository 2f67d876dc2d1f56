"""Scores of runs: read without trust, and put together with intervals over seeds."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from hostile import Payload, make_special_file
from rliable import library, metrics
from stable_baselines3.common.results_plotter import window_func

from sb3_ppo_plus import UntrustedFileError
from sb3_ppo_plus.zoo.learning_curves import (
    MAX_POINTS,
    STATISTICS,
    Curve,
    bootstrap_interval,
    iqm,
    make_group,
    read_arrays,
    read_evaluations,
    read_training,
)


def save(path, **arrays):
    np.savez(path / "evaluations.npz", **arrays)
    return path


def group(*curves, statistic="mean", max_timesteps=np.inf):
    curves = [Curve(np.asarray(steps, float), np.asarray(scores, float)) for steps, scores in curves]
    return make_group("Env-v0", "algo", ["run"] * len(curves), curves, statistic, max_timesteps)


def test_a_score_is_the_mean_of_an_evaluations_episodes(tmp_path):
    save(tmp_path, timesteps=[10, 20], results=[[1.0, 3.0], [4.0, 6.0]], ep_lengths=[[7, 9], [1, 1]])
    curve = read_evaluations(tmp_path)
    assert curve.timesteps.tolist() == [10, 20] and curve.scores.tolist() == [2, 5]
    assert read_evaluations(tmp_path, "ep_lengths").scores.tolist() == [8, 1]
    with pytest.raises(UntrustedFileError, match="not timesteps and successes"):
        read_evaluations(tmp_path, "successes")


def test_a_training_score_is_the_mean_of_the_last_100_episodes(tmp_path):
    rewards = np.random.default_rng(0).normal(size=250).round(3)
    for index, part in enumerate((rewards[::2], rewards[1::2])):
        lines = ['#{"t_start": 0.0, "env_id": "x"}', "r,l,t"]
        lines += [f"{reward},5,{2 * n + index}" for n, reward in enumerate(part)]
        (tmp_path / f"{index}.monitor.csv").write_text("\n".join(lines))
    curve = read_training(tmp_path)
    assert curve.timesteps.tolist() == list(range(5, 1255, 5))
    _, expected = window_func(np.arange(250), rewards, 100, np.mean)
    np.testing.assert_allclose(curve.scores[99:], expected)
    np.testing.assert_allclose(curve.scores[:100], np.cumsum(rewards)[:100] / np.arange(1, 101))


def test_runs_are_put_together_at_the_timesteps_of_the_coarsest_up_to_the_end_of_the_shortest():
    together = group(([10, 20, 30, 40], [0, 1, 2, 3]), ([15, 25, 35], [10, 10, 10]))
    assert together.timesteps.tolist() == [15, 25, 35]
    assert together.scores.tolist() == [[0.5, 1.5, 2.5], [10, 10, 10]]
    assert together.centre.tolist() == [5.25, 5.75, 6.25]
    assert group(([10, 20], [0, 1]), max_timesteps=15).timesteps.tolist() == [10]
    # They have no timesteps in common
    assert group(([10, 20], [0, 1]), ([30, 40], [5, 6])).timesteps.tolist() == [20]
    assert group((range(1000), range(1000))).timesteps[[0, -1]].tolist() == [0, 999]
    assert len(group((range(1000), range(1000))).timesteps) == MAX_POINTS


def test_a_single_seed_has_no_interval():
    assert group(([1, 2], [3, 4])).interval is None
    assert group(([1, 2], [3, 4]), ([1, 2], [5, 6])).interval.shape == (2, 2)


@pytest.mark.parametrize("n_runs", [2, 12])
@pytest.mark.parametrize("statistic", ["mean", "iqm", "median"])
def test_statistics_and_intervals_are_those_of_rliable(n_runs, statistic):
    scores = np.random.default_rng(n_runs).normal(size=(n_runs, 3))
    aggregate = {"mean": np.mean, "iqm": metrics.aggregate_iqm, "median": np.median}[statistic]
    theirs = np.array([aggregate(scores[:, [point]]) for point in range(3)])
    np.testing.assert_allclose(STATISTICS[statistic](scores.T), theirs)
    np.random.seed(0)
    _, intervals = library.get_interval_estimates(
        {"algo": scores[:, None]}, lambda x: STATISTICS[statistic](x[:, 0].T), reps=4000
    )
    ours = bootstrap_interval(scores, STATISTICS[statistic])
    # Both are drawn; the width is about 1
    np.testing.assert_allclose(ours, intervals["algo"], atol=0.12)
    assert (ours == bootstrap_interval(scores, STATISTICS[statistic])).all()


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert iqm(np.array([100.0, 1, 2, -50])) == 1.5
    assert iqm(np.array([3.0, 5, 7])) == 5


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if members.pop("compressed", False) else 0) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def huge():
    """An array that would take 8 TB, of which no byte is there."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    return file.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        {"timesteps": huge(), "results": huge()},
        {"timesteps": npy(np.arange(3))[:-1]},
        {"timesteps": b"no array"},
        {"timesteps": npy(np.arange(10_000)), "compressed": True},
        {"../timesteps": npy(np.arange(3))},
        {f"a{index}": npy(np.arange(3)) for index in range(30)},
    ],
    ids=["huge", "cut off", "none", "compressed", "path", "many"],
)
def test_arrays_that_would_fill_the_memory_or_are_none_are_refused(members, tmp_path):
    with pytest.raises(UntrustedFileError):
        read_arrays(npz(tmp_path / "evaluations.npz", **members))


def test_no_memory_is_taken_before_the_data_is_there(tmp_path):
    with pytest.raises(UntrustedFileError, match=r"is no plain array: ValueError: float64 of shape \(1000000000000,\)"):
        read_arrays(npz(tmp_path / "evaluations.npz", timesteps=huge()))


def test_pickles_among_the_scores_are_not_read(tmp_path):
    payload = np.array([Payload(tmp_path / "mark")], dtype=object)
    save(tmp_path, timesteps=payload, results=payload)
    with pytest.raises(UntrustedFileError, match="is no plain array"):
        read_evaluations(tmp_path)
    (tmp_path / "evaluations.npz").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    with pytest.raises(UntrustedFileError, match="no readable zip archive"):
        read_evaluations(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "holes"])
def test_files_that_are_none_are_not_read(kind, tmp_path):
    make_special_file(tmp_path / "evaluations.npz", kind)
    with pytest.raises(UntrustedFileError):
        read_evaluations(tmp_path)
    make_special_file(tmp_path / "0.monitor.csv", kind)
    with pytest.raises(UntrustedFileError):
        read_training(tmp_path)


@pytest.mark.parametrize(
    ("timesteps", "results"),
    [
        ([2, 1], [[1.0], [2.0]]),
        ([1, 2], [[np.nan], [2.0]]),
        ([1, 2], [[1.0]]),
        ([[1]], [[1.0]]),
        ([], np.zeros((0, 1))),
        (["a"], [["b"]]),
        (["a"], [[1.0]]),
    ],
)
def test_scores_that_are_no_curve_are_refused(timesteps, results, tmp_path):
    save(tmp_path, timesteps=timesteps, results=results)
    with pytest.raises(UntrustedFileError):
        read_evaluations(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "#{}\nr,l,t\n", '#{"t_start": 0}\nr,l,t\n', '#{"t_start": 0}\nr,l,t\nx,y,z\n', "#[\n"]
)
def test_monitors_that_are_none_are_refused(text, tmp_path):
    (tmp_path / "0.monitor.csv").write_text(text)
    with pytest.raises(UntrustedFileError):
        read_training(tmp_path)
