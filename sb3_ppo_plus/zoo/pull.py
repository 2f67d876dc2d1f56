"""``pull``: a run from a repository of the Hugging Face Hub, without trust in who made it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.ppo_plus import PPOPlus
from sb3_ppo_plus.saving.plain_file import without_pickles
from sb3_ppo_plus.untrusted.regular_files import open_regular_file, read_regular_file
from sb3_ppo_plus.untrusted.safe_zip import read_members
from sb3_ppo_plus.untrusted.strict_json import MAX_BYTES as MAX_JSON_BYTES
from sb3_ppo_plus.untrusted.strict_json import parse
from sb3_ppo_plus.zoo.enjoy import STATISTICS, read_hyperparams
from sb3_ppo_plus.zoo.hub import (
    ARGS,
    CONFIG,
    ENV_KWARGS,
    METRICS,
    PICKLED_IN_FOLDER,
    PICKLED_IN_REPO,
    TooLargeError,
    add_repo_arguments,
    as_yaml,
    download,
    limits,
    model_file,
    naming_the_hub,
    plain_members,
    repo_id,
    sizes_in_repo,
)
from sb3_ppo_plus.zoo.hyperparams import ALGO, import_optional
from sb3_ppo_plus.zoo.learning_curves import EVALUATIONS, read_arrays
from sb3_ppo_plus.zoo.parser import ZooParser
from sb3_ppo_plus.zoo.registration import register
from sb3_ppo_plus.zoo.run_folder import add_trust_argument, check_algo, environment_name, hint_at_trust

_METRIC = re.compile(r"evaluations\.npz|([0-9]{1,6}\.)?monitor\.csv", re.ASCII)
MAX_METRIC_FILES = 10_000


def main(arguments: list[str]) -> None:
    """Run ``pull``; its flags are those of ``rl_zoo3.load_from_hub``.

    :param arguments: what the user gave after the command
    :raises SystemExit: if the repository is not there, or if it is refused; then nothing is written
    """
    parser = ZooParser(
        prog="python -m sb3_ppo_plus.zoo pull",
        description="Download a run from the Hugging Face Hub into a log folder. No pickle is run or kept.",
    )
    parser.add_argument("--env", help="Gymnasium's id of the environment", required=True)
    parser.add_argument("-f", "--folder", help="log folder", default="logs")
    parser.add_argument("--algo", help="algorithm; others than ppo_plus need --trust", default=ALGO)
    parser.add_argument("--exp-id", help="number of the run's folder; 0: the next free one", default=0, type=int)
    parser.add_argument("--verbose", help="0: no output, 1: some", default=1, type=int)
    parser.add_argument("--force", action="store_true", help="replace the run's folder if it exists")
    parser.add_argument("--max-megabytes", help="largest size of the model", default=1024, type=int)
    add_repo_arguments(parser, default="sb3")
    add_trust_argument(parser)
    args = parser.parse_args(arguments)
    if args.exp_id < 0:
        parser.error(f"--exp-id must be at least 0, since pull makes a folder for the run, got {args.exp_id}")
    register()
    check_algo(args.algo, args.trust)
    folder = _folder(args)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the run appears whole or not at all
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".pull-"))
    try:
        with hint_at_trust("pull"), naming_the_hub(repo_id(args)), _naming_the_limit():
            (unfinished / "downloads").mkdir()
            (unfinished / "run").mkdir()
            _download_all(args, unfinished / "downloads")
            _check_and_move(args, unfinished / "downloads", unfinished / "run")
        _replace(unfinished / "run", folder)
    finally:
        shutil.rmtree(unfinished)
    if args.verbose >= 1:
        print(f"Saved to {folder}")


@contextmanager
def _naming_the_limit() -> Iterator[None]:
    """End the command where a file is too large, with trust too."""
    try:
        yield
    except TooLargeError as error:
        hint = "--max-megabytes is the limit of the model; the other files have fixed ones."
        raise SystemExit(f"{error}\n{hint}") from error


def _replace(new: Path, folder: Path) -> None:
    """Move a run to its place. The one that was there is removed last."""
    if not folder.exists():
        os.replace(new, folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".replaced-"))
    os.replace(folder, aside / folder.name)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(aside / folder.name, folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _folder(args: argparse.Namespace) -> Path:
    name, parent = environment_name(args.env), Path(args.folder) / args.algo
    exp_id = args.exp_id or 1 + import_optional("rl_zoo3.utils").get_latest_run_id(str(parent), name)
    folder: Path = parent / f"{name}_{exp_id}"
    if folder.exists() and not args.force:
        raise SystemExit(f"{folder} exists: --force replaces it, --exp-id 0 makes a new folder")
    return folder


def _download_all(args: argparse.Namespace, folder: Path) -> None:
    """Download the files that are known, if they are not too large."""
    name = repo_id(args)
    allowed = limits(args.algo, args.env, args.max_megabytes * 2**20)
    if args.trust:
        allowed[PICKLED_IN_REPO] = MAX_JSON_BYTES
    commit, sizes = sizes_in_repo(name)
    missing = [file for file in (model_file(args.algo, args.env), CONFIG) if file not in sizes]
    if missing:
        raise SystemExit(f"{name} has no {' and no '.join(missing)}, so that it is no run of {args.algo} in {args.env}")
    for file, max_bytes in allowed.items():
        size = sizes.get(file)
        if file not in sizes:
            continue
        if size is not None and size > max_bytes:
            message = f"{name}: {file} has {size} bytes; at most {max_bytes} are allowed"
            if file != METRICS:
                raise TooLargeError(message)
            print(f"Left out, since only report reads it: {message}")
            continue
        if args.verbose >= 1:
            print(f"Downloading {file} from {name}")
        download(name, file, commit, folder / file, max_bytes)


def _check_and_move(args: argparse.Namespace, downloads: Path, run: Path) -> None:
    """Build the run's folder from what was downloaded.

    :raises UntrustedFileError: without trust, if anything is damaged or not plain
    """
    name = environment_name(args.env)
    parameters = run / name
    parameters.mkdir()
    model = downloads / model_file(args.algo, args.env)
    if args.trust:
        os.replace(model, run / f"{name}.zip")
    else:
        (run / f"{name}.zip").write_bytes(without_pickles(model))
        PPOPlus.load(run / f"{name}.zip", device="cpu", trusted=False)
    for file in (CONFIG, ARGS, ENV_KWARGS):
        if (downloads / file).is_file():
            text = (downloads / file).read_text() if args.trust else _plain_settings(downloads / file)
            (parameters / file).write_text(text)
    if (downloads / STATISTICS).is_file():
        content = read_regular_file(downloads / STATISTICS, MAX_JSON_BYTES)
        if not args.trust:
            parse(content, STATISTICS)
        (parameters / STATISTICS).write_bytes(content)
    if (downloads / PICKLED_IN_REPO).is_file():
        os.replace(downloads / PICKLED_IN_REPO, parameters / PICKLED_IN_FOLDER)
    if not args.trust:
        _check_settings(parameters)
    if (downloads / METRICS).is_file():
        _unpack_metrics(downloads / METRICS, run)


def _plain_settings(path: Path) -> str:
    """Return a YAML file's plain values. The RL Zoo's own ``enjoy`` evaluates a text in ``normalize``: none stays."""
    members = plain_members(path)
    if "normalize" in members:
        members["normalize"] = bool(members["normalize"])
    return as_yaml(members, path.name)


def _check_settings(parameters: Path) -> None:
    """Refuse a run that ``enjoy`` would refuse."""
    hyperparams, _ = read_hyperparams(str(parameters))
    if hyperparams["normalize"] and not (parameters / STATISTICS).is_file():
        raise UntrustedFileError(f"The run was normalised, and has no {STATISTICS}: only a pickle may say how")


def _unpack_metrics(path: Path, run: Path) -> None:
    """Write the scores of training, which ``report`` reads."""
    with open_regular_file(path) as file:
        members = read_members(file, METRICS, lambda name: _METRIC.fullmatch(name) is not None, MAX_METRIC_FILES)
    for name, content in members.items():
        (run / name).write_bytes(content)
    if EVALUATIONS in members:
        read_arrays(run / EVALUATIONS)
