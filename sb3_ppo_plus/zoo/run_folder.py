"""One run in a log folder of the RL Zoo: its model and its environment, with trust and without.

``record``, ``benchmark`` and ``push`` act with models, ``export`` writes them; they share what is here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.zoo.enjoy import enjoying_without_trust
from sb3_ppo_plus.zoo.hyperparams import ALGO, import_optional
from sb3_ppo_plus.zoo.registration import hint_at_missing_model, register

#: The RL Zoo's algorithms with a replay buffer, which a model that only acts does not need
_OFF_POLICY = ("qrdqn", "dqn", "ddpg", "sac", "her", "td3", "tqc")


@dataclasses.dataclass(frozen=True)
class Run:
    """A model of a run, and how it is to be used.

    :param algo: name in the RL Zoo, such as ``ppo_plus``
    :param env_id: Gymnasium's id
    :param folder: the run's folder, such as ``logs/ppo_plus/CartPole-v1_1``
    :param model_path: the model's file
    :param prefix: what files made from this model begin with, such as ``best-model-ppo_plus-CartPole-v1``
    :param hyperparams: of config.yml, as the RL Zoo's ``create_test_env`` takes them; without trust, what that needs
    :param env_kwargs: arguments of the environment
    :param trusted: whether code of the folder may run
    """

    algo: str
    env_id: str
    folder: Path
    model_path: Path
    prefix: str
    hyperparams: dict[str, Any]
    env_kwargs: dict[str, Any]
    trusted: bool

    @property
    def parameters(self) -> Path:
        """The folder inside the run's that holds config.yml, args.yml and the normaliser."""
        return self.folder / environment_name(self.env_id)

    @property
    def is_deterministic(self) -> bool:
        """Whether the RL Zoo takes the most likely actions in this environment unless it is told otherwise."""
        manager = import_optional("rl_zoo3.exp_manager").ExperimentManager
        return not (manager.is_atari(self.env_id) or manager.is_minigrid(self.env_id))


def environment_name(env_id: str) -> str:
    """Return the name of an environment in files and folders: that of the RL Zoo, without slashes.

    :param env_id: Gymnasium's id
    """
    return str(import_optional("huggingface_sb3").EnvironmentName(env_id))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the RL Zoo's flags that say which model of which run is meant, and how to make it act.

    :param parser: the command's parser
    """
    parser.add_argument("--env", help="Gymnasium's id of the environment", default="CartPole-v1")
    parser.add_argument("-f", "--folder", help="log folder", default="logs")
    parser.add_argument("--algo", help="algorithm; others than ppo_plus need --trust", default=ALGO)
    parser.add_argument(
        "--exp-id", help="number of the run; 0: the latest, -1: no folder of its own", default=0, type=int
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--load-best", action="store_true", help="the best model instead of the last one")
    which.add_argument("--load-checkpoint", type=int, metavar="STEPS", help="the model after so many steps")
    which.add_argument("--load-last-checkpoint", action="store_true", help="the model of the last checkpoint")
    parser.add_argument("--n-envs", help="number of environments", default=1, type=int)
    stochastic = parser.add_mutually_exclusive_group()
    stochastic.add_argument(
        "--deterministic",
        action="store_true",
        help="take the most likely actions (the default, but in Atari and minigrid)",
    )
    stochastic.add_argument(
        "--stochastic", action="store_true", help="draw actions (the default in Atari and minigrid)"
    )
    parser.add_argument("--seed", help="seed of the random generators", type=int, default=0)
    parser.add_argument(
        "--num-threads", help="number of PyTorch's threads; -1: PyTorch's default", default=-1, type=int
    )
    parser.add_argument("--device", help="PyTorch's device", default="auto")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules to import, which register environments")
    parser.add_argument(
        "--env-kwargs", nargs="+", action=_store_dict(), help="arguments of the environment, as name:value"
    )
    parser.add_argument("--custom-objects", action="store_true", help="as in the RL Zoo, whose effect is always on")
    add_trust_argument(parser)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``.

    :param parser: the command's parser
    """
    parser.add_argument("--trust", action="store_true", help="run whatever code the files hold, as the RL Zoo does")


def _store_dict() -> Any:  # noqa: ANN401  # a class of a module without types
    return import_optional("rl_zoo3.utils").StoreDict


@contextmanager
def hint_at_trust(command: str) -> Iterator[None]:
    """End the command with the message where a file is refused.

    :param command: its name
    :raises SystemExit: instead of UntrustedFileError
    """
    try:
        yield
    except UntrustedFileError as error:
        raise SystemExit(f"{error}\nWith --trust, {command} runs whatever code the files hold.") from error


def prepare(args: argparse.Namespace) -> None:
    """Register algorithms and environments, and set seeds and threads.

    :param args: of :func:`add_run_arguments`
    :raises ImportError: if the RL Zoo is not installed
    :raises SystemExit: if the algorithm needs trust or is unknown
    """
    register()
    import_optional("rl_zoo3.import_envs")
    for package in args.gym_packages:
        importlib.import_module(package)
    check_algo(args.algo, args.trust)
    set_random_seed(args.seed)
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)


def check_algo(algo: str, trusted: bool) -> None:
    """Refuse algorithms that are unknown, or whose models are pickles.

    :param algo: name of the algorithm
    :param trusted: whether pickles may be loaded
    :raises SystemExit: it is refused
    """
    known = import_optional("rl_zoo3").ALGOS
    if algo not in known:
        raise SystemExit(f"--algo must be one of {', '.join(known)}, got {algo!r}")
    if algo != ALGO and not trusted:
        raise SystemExit(f"Only models of {ALGO} can be loaded without trust: give --trust for {algo}")


def find_run(args: argparse.Namespace, run_folder: Path | None = None) -> Run:
    """Find the model that the flags mean, and read how its environment was made.

    :param args: of :func:`add_run_arguments`
    :param run_folder: the run's folder, whose last model is taken; None: find it as the RL Zoo does
    :raises SystemExit: if there is no such model
    :raises UntrustedFileError: without trust, if config.yml or args.yml hold what is not plain
    """
    utils, name = import_optional("rl_zoo3.utils"), import_optional("huggingface_sb3").EnvironmentName(args.env)
    which = (args.load_best, args.load_checkpoint, args.load_last_checkpoint)
    try:
        if run_folder is None:
            prefix, model_path, folder = utils.get_model_path(args.exp_id, args.folder, args.algo, name, *which)
        else:
            prefix, model_path, folder = f"{args.algo}-{name}", run_folder / f"{name}.zip", str(run_folder)
    except (AssertionError, ValueError) as error:
        raise SystemExit(f"{error}{hint_at_missing_model(error)}") from error
    parameters = os.path.join(folder, name)
    with _readers(args.trust) as readers:
        hyperparams, stats_path = readers.get_saved_hyperparams(parameters, test_mode=True)
        env_kwargs = dict(hyperparams.pop("env_kwargs", None) or {})
        given = os.path.join(parameters, "args.yml")
        if stats_path is not None and os.path.isfile(given):
            with open(given) as file:
                # As in the RL Zoo, what the command line of train gave replaces what the file of hyperparameters gave
                env_kwargs = readers.yaml.load(file, Loader=readers.yaml.UnsafeLoader).get("env_kwargs") or env_kwargs
    env_kwargs |= args.env_kwargs or {}
    return Run(args.algo, args.env, Path(folder), Path(model_path), prefix, hyperparams, env_kwargs, args.trust)


@contextmanager
def _readers(trusted: bool) -> Iterator[Any]:
    """Give the functions that read a log folder: the RL Zoo's, or without trust those of ``enjoy``."""
    utils = import_optional("rl_zoo3.utils")
    readers = SimpleNamespace(
        create_test_env=utils.create_test_env,
        get_saved_hyperparams=utils.get_saved_hyperparams,
        yaml=import_optional("yaml"),
    )
    with nullcontext() if trusted else enjoying_without_trust(readers):
        yield readers


def create_env(
    run: Run, args: argparse.Namespace, *, render_mode: str | None = None, log_dir: str | None = None
) -> VecEnv:
    """Build the environments of a run as they were in training, with the statistics of its normaliser.

    :param run: the run
    :param args: of :func:`add_run_arguments`
    :param render_mode: Gymnasium's
    :param log_dir: folder for the monitors' files
    :raises UntrustedFileError: without trust, if the normaliser's statistics are missing or not plain
    """
    hyperparams = dict(run.hyperparams)
    with _readers(run.trusted) as readers:
        env: VecEnv = readers.create_test_env(
            run.env_id,
            n_envs=args.n_envs,
            stats_path=str(run.parameters) if run.parameters.is_dir() else None,
            seed=args.seed,
            log_dir=log_dir,
            should_render=False,
            hyperparams=hyperparams,
            env_kwargs=run.env_kwargs | ({} if render_mode is None else {"render_mode": render_mode}),
            vec_env_cls=DummyVecEnv,
        )
    return env


def load_model(run: Run, env: VecEnv, args: argparse.Namespace) -> Any:  # noqa: ANN401  # of any algorithm
    """Load a run's model, which takes the masks of its environment if it was trained with masks.

    :param run: the run
    :param env: its environment
    :param args: of :func:`add_run_arguments`
    :raises UntrustedFileError: without trust, if the file is damaged, hostile or not plain
    """
    print(f"Loading {run.model_path}")
    kwargs: dict[str, Any] = {"seed": args.seed, "device": args.device}
    # As in the RL Zoo: a schedule that cannot be unpickled is not needed to act
    kwargs["custom_objects"] = {"learning_rate": 0.0, "lr_schedule": _zero, "clip_range": _zero}
    if run.algo == ALGO:
        kwargs["trusted"] = run.trusted
    elif run.algo in _OFF_POLICY:
        kwargs["buffer_size"] = 1
        if "optimize_memory_usage" in run.hyperparams:
            kwargs["optimize_memory_usage"] = False
        if "HerReplayBuffer" in str(run.hyperparams.get("replay_buffer_class", "")):
            kwargs["env"] = env
    model = import_optional("rl_zoo3").ALGOS[run.algo].load(run.model_path, **kwargs)
    return model.masked(env) if getattr(model, "needs_masks", False) else model


def _zero(_: float) -> float:
    return 0.0


def is_deterministic(run: Run, args: argparse.Namespace) -> bool:
    """Whether to take the most likely actions.

    :param run: the run
    :param args: of :func:`add_run_arguments`
    """
    return args.deterministic or (not args.stochastic and run.is_deterministic)


def act(
    model: Any,  # noqa: ANN401  # of any algorithm
    env: VecEnv,
    n_steps: int,
    deterministic: bool,
    after_step: Callable[[int], bool] | None = None,
) -> None:
    """Let a model act from new episodes on, with the states of its memory.

    :param model: what :func:`load_model` has returned
    :param env: its environments
    :param n_steps: steps of each environment
    :param deterministic: whether to take the most likely actions
    :param after_step: called with the number of steps done; stops if it returns True
    """
    observations = env.reset()
    states, episode_starts = None, np.ones(env.num_envs, dtype=bool)
    for step in range(1, n_steps + 1):
        actions, states = model.predict(
            observations, state=states, episode_start=episode_starts, deterministic=deterministic
        )
        observations, _, episode_starts, _ = env.step(actions)
        if after_step is not None and after_step(step):
            return
