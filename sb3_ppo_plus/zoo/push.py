"""``push``: a run as a repository of the Hugging Face Hub, with a measured score and without pickles."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.ppo_plus import PPOPlus
from sb3_ppo_plus.saving.plain_file import is_without_pickles, without_pickles
from sb3_ppo_plus.saving.vec_normalize import save_vec_normalize
from sb3_ppo_plus.untrusted.plain_yaml import read_yaml
from sb3_ppo_plus.untrusted.regular_files import read_regular_file
from sb3_ppo_plus.untrusted.strict_json import MAX_BYTES as MAX_JSON_BYTES
from sb3_ppo_plus.zoo.enjoy import STATISTICS
from sb3_ppo_plus.zoo.found_runs import own_file
from sb3_ppo_plus.zoo.hub import (
    ARGS,
    CARD,
    CONFIG,
    ENV_KWARGS,
    MAX_METRICS_BYTES,
    METRICS,
    PICKLED_IN_REPO,
    RESULTS,
    VIDEO,
    add_repo_arguments,
    as_yaml,
    command_for,
    model_file,
    naming_the_hub,
    plain_members,
    repo_id,
    sizes_in_repo,
)
from sb3_ppo_plus.zoo.hyperparams import ALGO, import_optional
from sb3_ppo_plus.zoo.learning_curves import EVALUATIONS
from sb3_ppo_plus.zoo.parser import ZooParser
from sb3_ppo_plus.zoo.record import record_video
from sb3_ppo_plus.zoo.run_folder import (
    Run,
    add_run_arguments,
    create_env,
    find_run,
    hint_at_trust,
    is_deterministic,
    load_model,
    prepare,
)

_PACKAGE = re.compile(r"[A-Za-z_][\w.]{0,127}", re.ASCII)
#: What the card calls the file of hyperparameters that it shows
HYPERPARAMS = "hyperparams.yml"
#: What is published of args.yml. The rest may hold paths, the command line, or the password of a database
PUBLIC_ARGS = frozenset(
    {
        *("algo", "env", "env_kwargs", "eval_env_kwargs", "hyperparams", "n_timesteps", "seed", "vec_env"),
        *("eval_freq", "eval_episodes", "n_eval_envs", "save_freq", "num_threads", "device", "gym_packages"),
    }
)


def main(arguments: list[str]) -> None:
    """Run ``push``; its flags are those of ``rl_zoo3.push_to_hub``.

    :param arguments: what the user gave after the command
    :raises SystemExit: if there is no model, if it is refused without trust, or if the hub refuses
    """
    parser = ZooParser(
        prog="python -m sb3_ppo_plus.zoo push",
        description="Evaluate a run's model, record a video, and push both to the Hugging Face Hub, with a model card.",
    )
    add_run_arguments(parser)
    add_repo_arguments(parser, required=True)
    parser.add_argument("-n", "--n-timesteps", help="number of steps in the video", default=1000, type=int)
    parser.add_argument("--eval-episodes", help="number of episodes of the evaluation", default=10, type=int)
    parser.add_argument("--no-render", action="store_true", help="no video")
    parser.add_argument("--verbose", help="0: no output, 1: some", default=1, type=int)
    parser.add_argument("-m", "--commit-message", help="message of the commit", default="Initial commit")
    parser.add_argument("--private", action="store_true", help="make a new repository that others cannot see")
    args = parser.parse_args(arguments)
    for flag in ("n_timesteps", "eval_episodes"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    prepare(args)
    name = repo_id(args)
    with naming_the_hub(name):
        # An evaluation takes minutes: without a token it would be in vain
        import_optional("huggingface_hub").HfApi().whoami()
    with hint_at_trust("push"):
        files = package(find_run(args), args)
    with naming_the_hub(name):
        print(f"Your model is on the hub: {commit(name, files, args)}")


def package(run: Run, args: argparse.Namespace) -> dict[str, bytes]:
    """Evaluate a model and make all files of its repository.

    :param run: the model
    :param args: of ``push``
    :return: contents by name
    :raises UntrustedFileError: if the model or the normaliser cannot be read without trust
    """
    env = create_env(run, args, render_mode=None if args.no_render else "rgb_array")
    try:
        model = load_model(run, env, args)
        deterministic = is_deterministic(run, args)
        mean, std = evaluate_policy(model, env, args.eval_episodes, deterministic)
        # Without it, SB3's type is that of two lists
        assert isinstance(mean, float) and isinstance(std, float)
        print(f"Mean reward: {mean:.2f} +/- {std:.2f} in {args.eval_episodes} episodes")
        files = {model_file(run.algo, run.env_id): _model_bytes(run), **_settings(run), **_statistics(run, env)}
        files |= _metrics(run)
        results: dict[str, Any] = {"mean_reward": mean, "std_reward": std, "is_deterministic": deterministic}
        results |= {"n_eval_episodes": args.eval_episodes, "eval_datetime": datetime.datetime.now().isoformat()}
        files[RESULTS] = json.dumps(results).encode()
        if not args.no_render:
            files[VIDEO] = _video(model, env, args, deterministic)
    finally:
        env.close()
    files[CARD] = make_card(run, args, results, files).encode()
    return files


def _model_bytes(run: Run) -> bytes:
    """Return the model without its pickles if it loads so. With trust, a model that does not is pushed as it is."""
    try:
        plain = without_pickles(run.model_path) if run.algo == ALGO else None
        if plain is not None:
            PPOPlus.load(io.BytesIO(plain), device="cpu", trusted=False)
            return plain
    except UntrustedFileError as error:
        if not run.trusted:
            raise
        print(f"The model is pushed with its pickles: {error}")
    return run.model_path.read_bytes()


def _settings(run: Run) -> dict[str, bytes]:
    """Return the YAML files, as plain values."""
    files = {ENV_KWARGS: as_yaml(run.env_kwargs, "env_kwargs").encode()}
    for name, public in ((CONFIG, None), (ARGS, PUBLIC_ARGS)):
        if (run.parameters / name).is_file():
            files[name] = as_yaml(plain_members(own_file(run.parameters / name, run.folder), public), name).encode()
    return files


def _statistics(run: Run, env: VecEnv) -> dict[str, bytes]:
    """Return the statistics of the normaliser, if there is one."""
    if unwrap_vec_normalize(env) is None:
        return {}
    path = run.parameters / STATISTICS
    if path.is_file():
        return {STATISTICS: read_regular_file(own_file(path, run.folder), MAX_JSON_BYTES)}
    with tempfile.TemporaryDirectory() as folder:
        save_vec_normalize(env, Path(folder) / STATISTICS)
        return {STATISTICS: (Path(folder) / STATISTICS).read_bytes()}


def _metrics(run: Run) -> dict[str, bytes]:
    """Return the scores of training as the RL Zoo packs them, if ``pull`` would take them."""
    paths = [path for path in (run.folder / EVALUATIONS, *sorted(run.folder.glob("*monitor.csv"))) if path.is_file()]
    packed = io.BytesIO()
    if sum(own_file(path, run.folder).stat().st_size for path in paths) <= MAX_METRICS_BYTES:
        with zipfile.ZipFile(packed, "w") as archive:
            for path in paths:
                archive.writestr(path.name, read_regular_file(path, MAX_METRICS_BYTES))
        if packed.tell() <= MAX_METRICS_BYTES:
            return {METRICS: packed.getvalue()}
    print(f"Left out: the scores of training, since pull takes at most {MAX_METRICS_BYTES} bytes of them")
    return {}


def _video(model: Any, env: VecEnv, args: argparse.Namespace, deterministic: bool) -> bytes:  # noqa: ANN401  # of any algorithm
    with tempfile.TemporaryDirectory() as folder:
        return record_video(model, env, Path(folder), "replay", args.n_timesteps, deterministic).read_bytes()


def make_card(run: Run, args: argparse.Namespace, results: dict[str, Any], files: dict[str, bytes]) -> str:
    """Write the model card, with the score in the hub's model-index.

    :param run: the model
    :param args: of ``push``
    :param results: the evaluation's
    :param files: the other files of the repository
    """
    hub, task = import_optional("huggingface_hub"), "reinforcement-learning"
    score = f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    result = hub.EvalResult(
        task_type=task,
        task_name=task,
        dataset_type=run.env_id,
        dataset_name=run.env_id,
        metric_type="mean_reward",
        metric_name="mean_reward",
        metric_value=score,
        verified=False,
    )
    data = hub.ModelCardData(
        library_name="stable-baselines3",
        tags=[run.env_id, "deep-reinforcement-learning", task, "stable-baselines3", "sb3-ppo-plus"],
        model_name=run.algo,
        eval_results=[result],
    )
    actions = "the most likely actions" if results["is_deterministic"] else "actions drawn from the policy"
    text = f"""# {run.algo} in {run.env_id}

A model that Stable-Baselines3's RL Zoo trained{" with sb3-ppo-plus" if run.algo == ALGO else ""}.

Mean reward **{score}** in {results["n_eval_episodes"]} episodes with {actions}, measured by `push`.

{_usage(run, args, files)}"""
    return str(hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _usage(run: Run, args: argparse.Namespace, files: dict[str, bytes]) -> str:
    """Say in the card how to get and use the model, and how it was trained."""
    file = model_file(run.algo, run.env_id)
    is_plain = is_without_pickles(io.BytesIO(files[file]))
    source = ["-orga", args.organization, *(["-name", args.repo_name] if args.repo_name else [])]
    trust = [] if is_plain else ["--trust"]
    text = f"""## Use

```bash
{command_for("pull", run.algo, run.env_id, *source, "-f", "logs/", *trust)}
{command_for("enjoy", run.algo, run.env_id, "-f", "logs/", *trust)}
```
"""
    if is_plain:
        text += f"""
```python
from huggingface_hub import hf_hub_download
from sb3_ppo_plus import PPOPlus

model = PPOPlus.load(hf_hub_download("{repo_id(args)}", "{file}"), trusted=False)
```

The model holds no pickle: loading it runs no code of its file.
"""
        if STATISTICS in files:
            text += f"Observations were normalised: `sb3_ppo_plus.load_vec_normalize` reads `{STATISTICS}`.\n"
    settings: dict[str, Any] = yaml.safe_load(files[CONFIG]) if CONFIG in files else {}
    if run.env_kwargs:
        settings["env_kwargs"] = yaml.safe_load(files[ENV_KWARGS])
    return f"""{text}
## Training

With these hyperparameters in `{HYPERPARAMS}`:

```yaml
{as_yaml({run.env_id: settings}, HYPERPARAMS)}```

```bash
{command_for("train", run.algo, run.env_id, *_training_flags(run), "-conf", HYPERPARAMS)}
```
"""


def _training_flags(run: Run) -> list[str]:
    """Return what ``train`` was told beside the hyperparameters: its length, its seed and how environments run."""
    try:
        given = read_yaml(run.parameters / ARGS)
    except (OSError, UntrustedFileError):
        return []
    numbers = [("-n", given.get("n_timesteps")), ("--seed", given.get("seed"))]
    flags = [text for flag, value in numbers if type(value) is int and value >= 0 for text in (flag, str(value))]
    packages = given.get("gym_packages")
    if isinstance(packages, list) and packages and all(_PACKAGE.fullmatch(str(package)) for package in packages):
        flags += ["--gym-packages", *packages]
    return flags + (["--vec-env", "subproc"] if given.get("vec_env") == "subproc" else [])


def commit(name: str, files: dict[str, bytes], args: argparse.Namespace) -> str:
    """Make the repository, and put the files into it by one commit. Files of an earlier push that are none now go.

    :param name: the repository
    :param files: contents by name
    :param args: of ``push``
    :return: the repository's address
    """
    hub = import_optional("huggingface_hub")
    api = hub.HfApi()
    url = api.create_repo(name, private=args.private, exist_ok=True)
    # A video or a pickle of another model would be taken for this one's
    stale = {VIDEO, STATISTICS, METRICS, PICKLED_IN_REPO, ARGS, CONFIG} - files.keys()
    operations: list[Any] = [hub.CommitOperationDelete(file) for file in sorted(stale & sizes_in_repo(name)[1].keys())]
    operations += [hub.CommitOperationAdd(file, content) for file, content in sorted(files.items())]
    api.create_commit(name, operations, commit_message=args.commit_message)
    return str(url)
