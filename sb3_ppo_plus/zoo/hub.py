"""A run as a repository of the Hugging Face Hub: its files, their limits, and the requests of ``push`` and ``pull``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.untrusted.plain_yaml import MAX_YAML_BYTES, read_yaml
from sb3_ppo_plus.untrusted.strict_json import MAX_BYTES as MAX_JSON_BYTES
from sb3_ppo_plus.untrusted.strict_json import short
from sb3_ppo_plus.zoo.enjoy import STATISTICS
from sb3_ppo_plus.zoo.hyperparams import ALGO, import_optional
from sb3_ppo_plus.zoo.run_folder import environment_name

CONFIG, ARGS, ENV_KWARGS = "config.yml", "args.yml", "env_kwargs.yml"
METRICS = "train_eval_metrics.zip"
#: The RL Zoo's names of the pickled statistics in a repository and in a log folder
PICKLED_IN_REPO, PICKLED_IN_FOLDER = "vec_normalize.pkl", "vecnormalize.pkl"
VIDEO, CARD, RESULTS = "replay.mp4", "README.md", "results.json"
MAX_METRICS_BYTES = 256 * 2**20
#: Values in a YAML file, and lists inside lists
MAX_VALUES, MAX_DEPTH = 10_000, 32
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_CHUNK = 2**20


class TooLargeError(ValueError):
    """A file of a repository has more bytes than are allowed. Trust does not change that."""


def add_repo_arguments(parser: argparse.ArgumentParser, **organization: Any) -> None:
    """Add the RL Zoo's flags that say which repository is meant.

    :param parser: the command's parser
    :param organization: how argparse treats the organisation, which only ``pull`` has a default for
    """
    parser.add_argument("-orga", "--organization", help="user or organisation on the hub", **organization)
    parser.add_argument("-name", "--repo-name", help="name of the repository; by default ALGO-ENV")


def model_file(algo: str, env_id: str) -> str:
    """Return the name of a model's file in its repository.

    :param algo: name of the algorithm
    :param env_id: Gymnasium's id
    """
    return f"{algo}-{environment_name(env_id)}.zip"


def repo_id(args: argparse.Namespace) -> str:
    """Return the name of the repository that the flags mean.

    :param args: of :func:`add_repo_arguments`, with ``algo`` and ``env``
    """
    return f"{args.organization}/{args.repo_name or model_file(args.algo, args.env).removesuffix('.zip')}"


def limits(algo: str, env_id: str, max_model_bytes: int) -> dict[str, int]:
    """Return the largest size of each file of a repository that ``pull`` takes without trust.

    :param algo: name of the algorithm
    :param env_id: Gymnasium's id
    :param max_model_bytes: that of the model
    """
    sizes = {name: MAX_YAML_BYTES for name in (CONFIG, ARGS, ENV_KWARGS)}
    return {model_file(algo, env_id): max_model_bytes, **sizes, STATISTICS: MAX_JSON_BYTES, METRICS: MAX_METRICS_BYTES}


def plain_members(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the plain values of a YAML file.

    :param path: a file of the RL Zoo
    :param names: names of those to take; None: all
    :raises UntrustedFileError: if the file is refused, or if what makes the environment is not plain
    """
    members = {name: value for name, value in read_yaml(path).items() if names is None or name in names}
    dropped = [name for name, value in members.items() if not is_plain(value)]
    needed = sorted({"normalize", "frame_stack", "env", "env_kwargs", "env_wrapper", "vec_env_wrapper"} & set(dropped))
    if needed:
        raise UntrustedFileError(f"{path.name}: {', '.join(needed)} must be plain values")
    if dropped:
        print(f"Left out of {path.name}, since they are not plain: {', '.join(map(short, dropped))}")
    return {name: value for name, value in members.items() if name not in dropped}


def as_yaml(members: dict[str, Any], name: str) -> str:
    """Write plain values as YAML that builds no object, whoever reads it, and has no references.

    :param members: values by name
    :param name: what to call them in messages
    :raises UntrustedFileError: if there are too many
    """
    copied, _ = _copy(members, MAX_VALUES, 0)
    if copied is _TOO_MANY:
        raise UntrustedFileError(f"{name} holds more than {MAX_VALUES} values, or more than {MAX_DEPTH} levels")
    return yaml.safe_dump(copied)


_TOO_MANY = object()


def is_plain(value: object) -> bool:
    """Whether a value of a YAML file consists of numbers, texts, flags, None, lists and mappings.

    :param value: the value
    """
    copied, _ = _copy(value, MAX_VALUES, 0)
    # What holds too much is named later
    return copied is not _NOT_PLAIN


_NOT_PLAIN = object()


def _copy(value: object, n_left: int, depth: int) -> tuple[Any, int]:
    """Copy a plain value, with a copy at each reference to it, and return how many further values may follow."""
    n_left -= 1
    if n_left < 0 or depth > MAX_DEPTH:
        return _TOO_MANY, 0
    if value is None or isinstance(value, str | int | float):
        return value, n_left
    if not isinstance(value, list | tuple | dict):
        return _NOT_PLAIN, n_left
    members: list[Any] = []
    parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else list(value)
    for part in parts:
        copied, n_left = _copy(part, n_left, depth + 1)
        if copied is _TOO_MANY or copied is _NOT_PLAIN:
            return copied, n_left
        members.append(copied)
    if isinstance(value, dict):
        return dict(zip(members[::2], members[1::2], strict=True)), n_left
    return members, n_left


@contextmanager
def naming_the_hub(name: str) -> Iterator[None]:
    """End the command with one message where the hub refuses or cannot be reached.

    :param name: the repository
    :raises SystemExit: in place of the hub's errors
    """
    errors = import_optional("huggingface_hub.errors")
    # Errors of the connection are those of the HTTP library that the hub's client is built on, httpx or httpx2
    http_errors = [base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    of_hub = (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError)
    try:
        yield
    except (*http_errors, *of_hub, ConnectionError) as error:
        raise SystemExit(f"{name} on the hub: {type(error).__name__}: {error}") from error


def sizes_in_repo(name: str) -> tuple[str | None, dict[str, int | None]]:
    """Ask the hub for the newest commit of a repository, and for its files.

    :param name: the repository
    :return: the commit, or None if the hub does not tell; sizes by file
    """
    info = import_optional("huggingface_hub").HfApi().model_info(name, files_metadata=True)
    commit = info.sha if isinstance(info.sha, str) and _COMMIT.fullmatch(info.sha) else None
    return commit, {sibling.rfilename: sibling.size for sibling in info.siblings or ()}


def download(name: str, file: str, commit: str | None, path: Path, max_bytes: int) -> None:
    """Download a file, and stop where it is larger than allowed, whatever size the hub has told.

    ``hf_hub_download`` has no limit, and leaves what it gets in a cache.

    :param name: the repository
    :param file: the file
    :param commit: the commit
    :param path: where it goes
    :param max_bytes: largest size allowed
    :raises TooLargeError: if it is larger
    """
    hub, utils = import_optional("huggingface_hub"), import_optional("huggingface_hub.utils")
    url = hub.hf_hub_url(name, file, revision=commit)
    n_bytes = 0
    with (
        path.open("wb") as target,
        hub.get_session().stream("GET", url, headers=utils.build_hf_headers(), follow_redirects=True) as response,
    ):
        if response.status_code >= 400:
            response.read()
        utils.hf_raise_for_status(response)
        for chunk in response.iter_bytes(_CHUNK):
            n_bytes += len(chunk)
            if n_bytes > max_bytes:
                raise TooLargeError(f"{name}: {file} has more than {max_bytes} bytes, which are allowed")
            target.write(chunk)


def command_for(command: str, algo: str, env_id: str, *flags: str) -> str:
    """Return a command line of the zoo.

    :param command: its name
    :param algo: name of the algorithm
    :param env_id: Gymnasium's id
    :param flags: further ones
    """
    chosen = [] if algo == ALGO else ["--algo", algo]
    return " ".join(["python -m sb3_ppo_plus.zoo", command, *chosen, "--env", env_id, *flags])
