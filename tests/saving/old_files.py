"""Writes files with the code of one version, and reads them with the code of another.

``tests/data/version_0_1.tar.gz`` holds what version 0.1, commit 2860725, has written. It was made in a checkout of that
commit, with NumPy 1.26.4, the oldest that it allows: NumPy 1 cannot read the pickles of NumPy 2. ``made_with.json`` in
it names the versions of the other packages::

    git worktree add /tmp/version_0_1 2860725
    cd /tmp && PYTHONPATH=/tmp/version_0_1 python REPOSITORY/tests/saving/old_files.py write files
    python -m tarfile -c REPOSITORY/tests/data/version_0_1.tar.gz files

``test_old_files.py`` reads it with the present code. It stands for the files of users: do not make it again. A later
version gets an archive of its own. The other way round is tried by hand, files of the present code with the old code::

    PYTHONPATH=REPOSITORY python REPOSITORY/tests/saving/old_files.py write new_files
    PYTHONPATH=/tmp/version_0_1 python REPOSITORY/tests/saving/old_files.py read new_files
"""

import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from old_file_cases import (
    CASES,
    N_ENVS,
    N_STEPS,
    POLICY_FILES,
    TOTAL_TIMESTEPS,
    Interrupt,
    Interrupted,
    make_evaluation,
    make_run,
    make_run_env,
)
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import sb3_ppo_plus
from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus, TrainingCheckpoint, load_vec_normalize, save_vec_normalize

Arrays = dict[str, np.ndarray]


def write(folder: Path) -> None:
    """Write all files into a new folder."""
    folder.mkdir(parents=True)
    for name in CASES:
        write_model(name, folder)
    write_checkpoint(folder / "run")
    whole_run = make_run().learn(TOTAL_TIMESTEPS, [make_evaluation()])
    np.savez(folder / "run.npz", **parameters_of(whole_run))
    packages = ("gymnasium", "numpy", "sb3-contrib", "stable-baselines3", "torch")
    made_with = {"commit": commit(), "python": sys.version, **{package: version(package) for package in packages}}
    (folder / "made_with.json").write_text(json.dumps(made_with, indent=1))


def commit() -> str:
    """Name the commit of the checkout whose package is imported."""
    git = ["git", "-C", str(Path(sb3_ppo_plus.__file__).parent)]
    changes = subprocess.run([*git, "status", "--porcelain", "."], check=True, capture_output=True, text=True).stdout
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    return head.strip() + (" with changes" if changes else "")


def write_model(name: str, folder: Path) -> None:
    """Train a model for one update; write it, its policy, its normaliser, and what it predicts."""
    model = CASES[name].make_model()
    model.learn(N_STEPS * N_ENVS)
    model.save(folder / f"{name}.zip")
    if name in POLICY_FILES:
        model.policy.save(folder / f"{name}.policy.pth")
    inputs = example_inputs(model.env)
    np.savez(folder / f"{name}.npz", **inputs, **predictions(model.policy, inputs))
    if CASES[name].has_normalizer:
        write_normalizer(model.env, folder)


def example_inputs(env: VecEnv) -> Arrays:
    """Observe every environment: "observation" or "observation.KEY" of a Dict, and "masks" where there are any."""
    observations: Any = env.reset()
    if isinstance(observations, dict):
        inputs = {f"observation.{key}": part for key, part in observations.items()}
    else:
        inputs = {"observation": observations}
    if "observation.action_mask" not in inputs and env.has_attr("action_masks"):
        inputs["masks"] = np.stack(env.env_method("action_masks"))
    return inputs


def predictions(policy: ActorCriticPlusPolicy, inputs: Arrays) -> Arrays:
    """Give the most probable actions, their log probabilities, and values; with a memory, a second step's actions."""
    observations: Any = inputs.get("observation")
    if observations is None:
        keys = [name for name in inputs if name.startswith("observation.")]
        observations = {key.removeprefix("observation."): inputs[key] for key in keys}
    masks = inputs.get("masks")
    actions, state = policy.predict(observations, deterministic=True, action_masks=masks)
    tensors = policy.obs_to_tensor(observations)[0]
    with th.no_grad():
        stored_actions, values, log_prob = policy(
            tensors, deterministic=True, action_masks=None if masks is None else th.as_tensor(masks)
        )
    outputs = {"stored_actions": stored_actions, "values": values, "log_prob": log_prob}
    results = {"actions": actions, **{name: tensor.numpy() for name, tensor in outputs.items()}}
    if state is not None:
        episode_start = np.array([False, True])
        results["next_actions"] = policy.predict(observations, state, episode_start, deterministic=True)[0]
    return results


def write_normalizer(env: VecNormalize, folder: Path) -> None:
    """Write a normaliser in both formats, and what it makes of observations and rewards."""
    save_vec_normalize(env, folder / "vec_normalize.json")
    env.save(str(folder / "vec_normalize.pkl"))
    inputs = {"observations": np.array([[0.5, -0.5, 3.0]], np.float32), "rewards": np.array([-1.0, 3.0])}
    np.savez(folder / "vec_normalize.npz", **inputs, **normalized(env, inputs))


def normalized(env: VecNormalize, inputs: Arrays) -> Arrays:
    """Normalise observations and rewards."""
    return {
        "normalized_observations": env.normalize_obs(inputs["observations"]),
        "normalized_rewards": env.normalize_reward(inputs["rewards"]),
    }


def write_checkpoint(folder: Path) -> None:
    """Train until the run is interrupted; the last checkpoint stays."""
    try:
        make_run().learn(TOTAL_TIMESTEPS, [make_evaluation(), TrainingCheckpoint(1, folder, keep_last=1), Interrupt()])
    except Interrupted:
        return
    raise AssertionError("the run was not interrupted")


def read(folder: Path) -> None:
    """Read all files: load, predict, train on, resume, with trust and without."""
    print(f"{sb3_ppo_plus.__file__} reads what {(folder / 'made_with.json').read_text()} has written")
    for name in CASES:
        check_model(name, folder)
        if name in POLICY_FILES:
            check_policy_file(name, folder)
        if CASES[name].has_normalizer:
            check_normalizers(name, folder)
        print(name)
    for trusted in (True, False):
        check_end_of_run(resume(folder / "run", trusted)[0], folder)
    print("run")


def check_model(name: str, folder: Path) -> tuple[PPOPlus, PPOPlus]:
    """Load a model with trust and without: both predict what was recorded, and learn with the same bits.

    :return: both, trained
    """
    trained = []
    # One after the other: loading seeds the generators from which training draws
    for trusted in (True, False):
        model = load_model(name, folder, trusted)
        check_predictions(model.policy, name, folder)
        train_on(model)
        trained.append(model)
    assert_equal_policies(*trained)
    return trained[0], trained[1]


def load_model(name: str, folder: Path, trusted: bool) -> PPOPlus:
    """Load a model with environments to train on in."""
    env = CASES[name].make_env()
    if CASES[name].has_normalizer:
        env = load_vec_normalize(folder / "vec_normalize.json", env)
    return PPOPlus.load(folder / f"{name}.zip", env=env, device="cpu", trusted=trusted)


def check_predictions(policy: ActorCriticPlusPolicy, name: str, folder: Path) -> None:
    """Compare what a policy predicts with what was recorded; another machine may round otherwise."""
    recorded = arrays(folder / f"{name}.npz")
    for key, value in predictions(policy, recorded).items():
        np.testing.assert_allclose(value, recorded[key], rtol=1e-5, atol=1e-5, err_msg=f"{name}: {key}")


def check_policy_file(name: str, folder: Path) -> None:
    """Load a policy by itself, with SB3's ``load``."""
    policy_class = type(load_model(name, folder, trusted=True).policy)
    check_predictions(policy_class.load(folder / f"{name}.policy.pth", device="cpu"), name, folder)


def check_normalizers(name: str, folder: Path) -> None:
    """Load the normaliser from both formats."""
    recorded = arrays(folder / "vec_normalize.npz")
    for file, trusted in (("vec_normalize.json", False), ("vec_normalize.pkl", True)):
        env = load_vec_normalize(folder / file, CASES[name].make_env(), trusted=trusted)
        for key, value in normalized(env, recorded).items():
            np.testing.assert_allclose(value, recorded[key], rtol=1e-6, err_msg=f"{file}: {key}")


def parameters_of(model: PPOPlus) -> Arrays:
    """Give the parameters of a model's policy by name."""
    return {name: parameter.detach().numpy() for name, parameter in model.policy.named_parameters()}


def check_end_of_run(model: PPOPlus, folder: Path) -> None:
    """Compare parameters with those at the end of a run that was not interrupted; another machine rounds otherwise."""
    recorded = arrays(folder / "run.npz")
    for name, parameter in parameters_of(model).items():
        np.testing.assert_allclose(parameter, recorded[name], rtol=0, atol=1e-3, err_msg=name)


def arrays(path: Path) -> Arrays:
    """Read arrays."""
    with np.load(path) as file:
        return dict(file)


def train_on(model: PPOPlus) -> None:
    """Train for one update more, which changes what is trained into other finite numbers."""
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    n_timesteps = model.num_timesteps
    model.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)
    assert model.num_timesteps == n_timesteps + N_STEPS * N_ENVS
    after = model.policy.state_dict()
    assert all(th.isfinite(value).all() for value in after.values())
    assert not all(th.equal(value, before[key]) for key, value in after.items()), "nothing was trained"


def assert_equal_policies(first: PPOPlus, second: PPOPlus) -> None:
    """Two models have the same parameters, to the bit."""
    others = second.policy.state_dict()
    assert all(th.equal(value, others[key]) for key, value in first.policy.state_dict().items())


def resume(folder: Path, trusted: bool) -> tuple[PPOPlus, EvalCallback]:
    """Finish the run that was interrupted; return it with its callback."""
    model = PPOPlus.resume(folder, make_run_env(), device="cpu", trusted=trusted)
    assert model.num_timesteps < TOTAL_TIMESTEPS
    evaluation = make_evaluation()
    model.continue_learning([evaluation])
    assert model.num_timesteps == TOTAL_TIMESTEPS
    return model, evaluation


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
