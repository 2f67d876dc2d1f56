"""Learning curves of runs: read without trust, grouped by environment and algorithm, with intervals over seeds."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from stable_baselines3.common.monitor import load_results

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.regular_files import open_regular_file
from sb3_ppo_plus.untrusted.safe_zip import read_members
from sb3_ppo_plus.zoo.found_runs import FoundRun, own_file

EVALUATIONS = "evaluations.npz"
#: Bytes of a file with scores
MAX_BYTES = 256 * 2**20
#: Arrays in evaluations.npz; SB3 writes four
MAX_ARRAYS = 20
#: Points of a curve in the figure
MAX_POINTS = 200
#: Episodes in the mean of a training curve, as in SB3's log
WINDOW = 100
N_RESAMPLES = 2000
CONFIDENCE = 0.95
_ARRAY = re.compile(r"\w{1,64}\.npy", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Curve:
    """The scores of one run.

    :param timesteps: steps of training, shape (n_points,), increasing
    :param scores: shape (n_points,)
    """

    timesteps: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one algorithm in one environment, which differ in their seeds.

    :param env_id: Gymnasium's id
    :param label: the algorithm, or its label
    :param runs: the runs
    :param timesteps: shape (n_points,), up to the end of the shortest run
    :param scores: shape (n_runs, n_points)
    :param centre: mean, interquartile mean or median over the runs, shape (n_points,)
    :param interval: lower and upper end, shape (2, n_points); None for a single run
    """

    env_id: str
    label: str
    runs: tuple[FoundRun, ...]
    timesteps: np.ndarray
    scores: np.ndarray
    centre: np.ndarray
    interval: np.ndarray | None


def iqm(scores: np.ndarray) -> np.ndarray:
    """Compute the interquartile mean over the last axis: a quarter of the runs is cut off at each end.

    :param scores: shape (..., n_runs)
    """
    cut = scores.shape[-1] // 4
    kept: np.ndarray = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut]
    return np.asarray(kept.mean(axis=-1))


def _mean(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores.mean(axis=-1))


def _median(scores: np.ndarray) -> np.ndarray:
    return np.asarray(np.median(scores, axis=-1))


STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": _mean, "iqm": iqm, "median": _median}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file of ``numpy.savez`` without unpickling, and without more memory than it has bytes.

    :param path: the file
    :raises UntrustedFileError: if it is too large, damaged, compressed, or holds Python's objects
    """
    with open_regular_file(path) as file:
        size = file.seek(0, io.SEEK_END)
        if size > MAX_BYTES:
            raise UntrustedFileError(f"{path} has {size} bytes; at most {MAX_BYTES} are allowed")
        members = read_members(file, str(path), lambda name: _ARRAY.fullmatch(name) is not None, MAX_ARRAYS)
    arrays = {}
    for name, content in members.items():
        try:
            arrays[name.removesuffix(".npy")] = _array(content)
        except Exception as error:
            # NumPy's reader raises many types of errors
            raise UntrustedFileError(f"{path}: {name} is no plain array: {type(error).__name__}: {error}") from error
    return arrays


def _array(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    npy.read_magic(file)
    shape, _, dtype = npy.read_array_header_1_0(file)
    # NumPy would take the memory before it looks for the data
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{dtype} of shape {shape}")
    file.seek(0)
    array: np.ndarray = npy.read_array(file, allow_pickle=False)
    return array


def read_evaluations(folder: Path, key: str = "results") -> Curve:
    """Read the evaluations of a run. The score is the mean of the episodes of an evaluation.

    :param folder: the run's folder, with evaluations.npz
    :param key: "results" (returns), "ep_lengths" or "successes"
    :raises UntrustedFileError: if the file is refused, or has no such scores
    """
    path = own_file(folder / EVALUATIONS, folder)
    arrays = read_arrays(path)
    timesteps, results = arrays.get("timesteps"), arrays.get(key)
    if timesteps is None or results is None:
        raise UntrustedFileError(f"{path} holds {sorted(arrays)}, not timesteps and {key}")
    is_number = timesteps.dtype.kind in "iuf" and results.dtype.kind in "iufb"
    if not is_number or timesteps.ndim != 1 or results.shape[:1] != timesteps.shape or timesteps.size == 0:
        raise UntrustedFileError(f"{path}: {key} of shape {results.shape} does not fit timesteps {timesteps.shape}")
    return _curve(timesteps, results.reshape(len(results), -1).mean(axis=1), path)


def read_training(folder: Path, key: str = "results") -> Curve:
    """Read the episodes of training. The score is the mean of the last 100 episodes.

    :param folder: the run's folder, with monitor.csv files
    :param key: "results" (returns), "ep_lengths" or "successes"
    :raises UntrustedFileError: if a file is refused, or has no such scores
    """
    files = sorted(folder.glob("*monitor.csv"))
    for path in files:
        with open_regular_file(own_file(path, folder)) as file:
            if file.seek(0, io.SEEK_END) > MAX_BYTES:
                raise UntrustedFileError(f"{path} has more than {MAX_BYTES} bytes")
    try:
        episodes = load_results(str(folder))
        column = {"results": "r", "ep_lengths": "l", "successes": "is_success"}[key]
        scores = np.asarray(episodes[column], dtype=np.float64)
        timesteps = np.cumsum(np.asarray(episodes["l"], dtype=np.float64))
    except Exception as error:
        # Pandas and JSON raise many types of errors
        raise UntrustedFileError(f"{folder}: no {key} in monitor.csv: {type(error).__name__}: {error}") from error
    if scores.size == 0:
        raise UntrustedFileError(f"{folder}: no episode ended")
    sums = np.cumsum(np.concatenate([[0.0], scores]))
    ends = np.arange(1, scores.size + 1)
    starts = np.maximum(0, ends - WINDOW)
    return _curve(timesteps, (sums[ends] - sums[starts]) / (ends - starts), folder)


def _curve(timesteps: np.ndarray, scores: np.ndarray, path: Path) -> Curve:
    timesteps, scores = timesteps.astype(np.float64), scores.astype(np.float64)
    if not (np.isfinite(timesteps).all() and np.isfinite(scores).all() and (np.diff(timesteps) >= 0).all()):
        raise UntrustedFileError(f"{path}: timesteps and scores must be finite, and timesteps must not go back")
    return Curve(timesteps, scores)


def make_group(
    env_id: str, label: str, runs: Sequence[FoundRun], curves: Sequence[Curve], statistic: str, max_timesteps: float
) -> Group:
    """Put runs together at common timesteps, and compute an interval over the runs.

    The timesteps are those of the run with the fewest points, up to the end of the shortest run. Other runs are
    interpolated there.

    :param env_id: Gymnasium's id
    :param label: the algorithm
    :param runs: the runs
    :param curves: their curves
    :param statistic: a key of ``STATISTICS``
    :param max_timesteps: where the curve ends at the latest
    """
    first = max(curve.timesteps[0] for curve in curves)
    last = min(max_timesteps, *(curve.timesteps[-1] for curve in curves))
    timesteps = min((curve.timesteps for curve in curves), key=len)
    inside = timesteps[(timesteps >= first) & (timesteps <= last)]
    timesteps = inside if inside.size else np.array([last])
    if timesteps.size > MAX_POINTS:
        timesteps = timesteps[np.linspace(0, timesteps.size - 1, MAX_POINTS).astype(int)]
    scores = np.stack([np.interp(timesteps, curve.timesteps, curve.scores) for curve in curves])
    aggregate = STATISTICS[statistic]
    interval = None
    if len(curves) > 1:
        interval = bootstrap_interval(scores, aggregate)
    return Group(env_id, label, tuple(runs), timesteps, scores, aggregate(scores.T), interval)


def bootstrap_interval(scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Compute 95% percentile intervals by a bootstrap over runs, stratified by environment: here there is one.

    rliable's bootstrap draws from NumPy's global generator. This one gives the same interval for the same runs.

    :param scores: shape (n_runs, n_points)
    :param statistic: a function of an array of shape (..., n_runs)
    :return: lower and upper end, shape (2, n_points)
    """
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(scores), size=(N_RESAMPLES, len(scores)))
    ends = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]
    return np.stack([np.percentile(statistic(at_a_point[chosen]), ends) for at_a_point in scores.T], axis=1)
