"""What reads foreign bytes, as functions of bytes: each takes any bytes, or refuses them with a documented error."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import torch as th
import yaml
from environments import SMALL_NET, make_env
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_plus import (
    CheckpointError,
    PPOPlus,
    ResumableEnv,
    TrainingCheckpoint,
    UntrustedFileError,
    WrapperStackError,
    export_policy,
    load_vec_normalize,
    save_vec_normalize,
)
from sb3_ppo_plus.export.contract import contract_path, read_contract
from sb3_ppo_plus.export.loading import load_exported
from sb3_ppo_plus.resuming.checkpoint_directory import MANIFEST, _sealed, read_checkpoint, write_checkpoint
from sb3_ppo_plus.untrusted.safe_zip import read_members
from sb3_ppo_plus.untrusted.tensor_file import load_tensors
from sb3_ppo_plus.zoo.enjoy import read_hyperparams

CPU = th.device("cpu")


class Target(NamedTuple):
    """A reader of foreign bytes.

    :param read: reads them; any error but those of ``documented`` is a find
    :param seeds: makes honest files to begin with
    :param documented: the errors with which bytes are refused
    :param is_json: whether to change values of JSON too, and not only bytes
    """

    read: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    documented: tuple[type[Exception], ...]
    is_json: bool = False


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    return path


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@cache
def models() -> tuple[bytes, ...]:
    """Model files of several policies, spaces and arguments."""
    dicts = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(3), "c": spaces.MultiDiscrete([2, 3])})
    cases = [
        {},
        {"action_dist": "beta", "net_arch": {"pi": [4], "vf": [5, 4]}, "activation_fn": th.nn.ReLU},
        {"features_extractor_class": "transformer", "features_extractor_kwargs": {"d_model": 8, "seq_len": 1}},
        {"memory": "gtrxl", "memory_kwargs": {"hidden_size": 8, "memory_length": 2, "n_layers": 1, "n_heads": 2}},
    ]
    files = [saved("MlpPolicy", make_env(), SMALL_NET | policy_kwargs) for policy_kwargs in cases]
    return (*files, saved("MultiInputPolicy", make_env(observation_space=dicts), SMALL_NET))


def saved(policy: str, env: object, policy_kwargs: dict[str, object]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PPOPlus(
            policy,
            env,
            n_steps=8,
            batch_size=8,
            n_epochs=1,
            learning_rate="lin_1e-3",
            policy_kwargs=policy_kwargs,
            device="cpu",
            seed=0,
        ).learn(8)
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def load(content: bytes) -> object:
    return PPOPlus.load(io.BytesIO(content), trusted=False, device="cpu")


# Models


def read_description(content: bytes) -> object:
    # With the tensors of the model that it looks like
    marks = (b"\0", b"beta", b"transformer", b"gtrxl", b"MultiInput")
    index = next((index for index, mark in enumerate(marks) if mark in content), 0)
    return load(zipped(unzipped(models()[index]) | {"ppo_plus.json": content}))


def read_pickle(content: bytes) -> object:
    members = {"archive/data.pkl": content, "archive/byteorder": b"little", "archive/version": b"3\n"}
    return load_tensors(zipped(members | {f"archive/data/{n}": bytes(16) for n in range(4)}), "data.pkl", CPU)


def read_legacy(content: bytes) -> object:
    return load_tensors(b"\x80" + content, "legacy", CPU, allows_legacy=True)


def read_optimizer(content: bytes) -> object:
    members = unzipped(models()[0])
    inner = {name.partition("/")[2]: part for name, part in unzipped(members["policy.optimizer.pth"]).items()}
    inner["data.pkl"] = content
    return load(zipped(members | {"policy.optimizer.pth": zipped({f"a/{name}": part for name, part in inner.items()})}))


def pickles(member: str) -> list[bytes]:
    archives = [unzipped(unzipped(model)[member]) for model in models()]
    return [content for archive in archives for name, content in archive.items() if name.endswith("data.pkl")]


def small_pickles() -> list[bytes]:
    states = [
        {"a": th.zeros(4), "b": th.zeros(2, 2).T},
        {"state": {0: {"step": th.ones(4)}}, "param_groups": [{"betas": (0.9, 0.99), "params": [0]}]},
        th.nn.Linear(2, 2, bias=False).state_dict(),
    ]
    found = []
    for state in states:
        file = io.BytesIO()
        th.save(state, file)
        found += [content for name, content in unzipped(file.getvalue()).items() if name.endswith("data.pkl")]
    return found


def legacy_files() -> list[bytes]:
    found = []
    for state in ({"a": th.zeros(4), "b": th.zeros(2, 2).T}, th.nn.Linear(2, 1).state_dict()):
        file = io.BytesIO()
        th.save(state, file, _use_new_zipfile_serialization=False)
        found.append(file.getvalue()[1:])
    return found


def read_zip(content: bytes) -> object:
    return read_members(io.BytesIO(content), "a zip", lambda name: True, 20)


# Normalisers and configurations


def read_normalizer(content: bytes) -> object:
    path = folder() / "vecnormalize.json"
    path.write_bytes(content)
    return load_vec_normalize(path, make_env())


def normalizers() -> list[bytes]:
    path = folder() / "seed.json"
    found = []
    for settings in ({}, {"norm_obs": False}, {"clip_obs": float("inf"), "norm_reward": False}):
        save_vec_normalize(VecNormalize(make_env(), **settings), path)
        found.append(path.read_bytes())
    return found


def read_config(content: bytes) -> object:
    (folder() / "config.yml").write_bytes(content)
    return read_hyperparams(str(folder()))


def configs() -> list[bytes]:
    text = b"""!!python/object/apply:collections.OrderedDict
- - [env_wrapper, [gymnasium.wrappers.TimeLimit: {max_episode_steps: 5}]]
  - [vec_env_wrapper, null]
  - [frame_stack, 4]
  - [normalize, "{'norm_obs': True}"]
  - [policy_kwargs, "dict(log_std_init=-2)"]
  - [learning_rate, 7.77e-05]
  - [n_timesteps, 50000.0]
  - [env_kwargs, {a: &x [1, true, 0x1f, 1:30, .inf], b: *x}]
"""
    return [text, yaml.safe_dump({"normalize": True, "env_kwargs": {"goal_velocity": 0.5}}).encode()]


# Checkpoints


def envs() -> DummyVecEnv:
    """Make environments of both kinds: one is saved by its attributes, the other plays its episode again."""
    makers = [lambda by=by: ResumableEnv(Monitor(gym.make("CartPole-v1")), by=by) for by in ("state", "replay")]
    env = DummyVecEnv(makers)
    env.seed(0)
    return env


@cache
def checkpoint() -> Path:
    model = PPOPlus(
        "MlpPolicy", VecNormalize(envs()), n_steps=8, batch_size=16, n_epochs=1, policy_kwargs=SMALL_NET, device="cpu"
    )
    model.learn(16, TrainingCheckpoint(1, folder() / "run"))
    assert model.last_checkpoint is not None
    return Path(model.last_checkpoint)


def read_manifest(content: bytes) -> object:
    """Read a manifest as it is; and as one whose seal fits, where it is JSON."""
    path = folder() / "manifest" / checkpoint().name
    if not path.exists():
        shutil.copytree(checkpoint(), path)
    (path / MANIFEST).write_bytes(content)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        try:
            sealed = _sealed(json.loads(content)["manifest"])
        except Exception:
            raise error from None
        (path / MANIFEST).write_bytes(sealed)
        return read_checkpoint(path)


def read_state(content: bytes) -> object:
    return resume({"training_state.json": content})


def read_arrays(content: bytes) -> object:
    return resume({"training_state.bin": content})


def resume(changes: dict[str, bytes]) -> object:
    files = dict(read_checkpoint(checkpoint()).files) | changes
    path = folder() / "forged"
    shutil.rmtree(path, ignore_errors=True)
    directory = write_checkpoint(path, files, 16)
    model = PPOPlus.resume(directory, VecNormalize(resumed_envs()), device="cpu", trusted=False)
    # Training goes on for as long as the file says, which may be for ever
    return model.continue_learning() if model._total_timesteps <= 64 else model


@cache
def resumed_envs() -> DummyVecEnv:
    return envs()


def file_of_checkpoint(name: str) -> Callable[[], list[bytes]]:
    return lambda: [(checkpoint() / name).read_bytes()]


# Exported policies


@cache
def exported(suffix: str) -> Path:
    """Export a policy with a memory and masks, which has inputs and outputs of all roles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PPOPlus(
            "MlpPolicy",
            make_env(action_space=spaces.MultiDiscrete([2, 3])),
            n_steps=8,
            batch_size=8,
            policy_kwargs=SMALL_NET | {"memory": "gru", "memory_kwargs": {"hidden_size": 4}},
            device="cpu",
        )
    return export_policy(model, folder() / f"policy{suffix}", deterministic=False)


def read_exported_contract(content: bytes) -> object:
    path = folder() / "foreign.onnx.json"
    path.write_bytes(content)
    return read_contract(path)


def read_onnx(content: bytes) -> object:
    return load_foreign(".onnx", content)


def read_program(content: bytes) -> object:
    members = unzipped(exported(".pt2").read_bytes())
    return load_foreign(".pt2", zipped(members | {program_name(): content}))


def load_foreign(suffix: str, content: bytes) -> object:
    """Load bytes as an exported policy, whose contract has their hash."""
    path = folder() / f"foreign{suffix}"
    contract = json.loads(contract_path(exported(suffix)).read_bytes())
    contract["sha256"] = hashlib.sha256(content).hexdigest()
    contract_path(path).write_text(json.dumps(contract))
    path.write_bytes(content)
    return load_exported(path)


def program_name() -> str:
    return next(name for name in unzipped(exported(".pt2").read_bytes()) if name.endswith("models/model.json"))


JSON_ERRORS = (UntrustedFileError,)
RESUME_ERRORS = (CheckpointError, WrapperStackError)
TARGETS = {
    "zip": Target(read_zip, lambda: list(models()), JSON_ERRORS),
    "model": Target(load, lambda: list(models()), JSON_ERRORS),
    "description": Target(
        read_description, lambda: [unzipped(model)["ppo_plus.json"] for model in models()], JSON_ERRORS, is_json=True
    ),
    "pickle": Target(read_pickle, small_pickles, JSON_ERRORS),
    "optimizer": Target(read_optimizer, lambda: pickles("policy.optimizer.pth")[:1], JSON_ERRORS),
    "legacy": Target(read_legacy, legacy_files, JSON_ERRORS),
    # A normaliser of other observations is refused by a ValueError that is no UntrustedFileError
    "normalizer": Target(read_normalizer, normalizers, (ValueError,), is_json=True),
    "config": Target(read_config, configs, JSON_ERRORS),
    "manifest": Target(read_manifest, file_of_checkpoint(MANIFEST), (CheckpointError,), is_json=True),
    "state": Target(read_state, file_of_checkpoint("training_state.json"), RESUME_ERRORS, is_json=True),
    "arrays": Target(read_arrays, file_of_checkpoint("training_state.bin"), RESUME_ERRORS),
    "contract": Target(
        read_exported_contract,
        lambda: [contract_path(exported(suffix)).read_bytes() for suffix in (".onnx", ".pt2")],
        JSON_ERRORS,
        is_json=True,
    ),
    "onnx": Target(read_onnx, lambda: [exported(".onnx").read_bytes()], JSON_ERRORS),
    "program": Target(
        read_program, lambda: [unzipped(exported(".pt2").read_bytes())[program_name()]], JSON_ERRORS, is_json=True
    ),
}


def run(target: Target, content: bytes) -> bool:
    """Read bytes.

    :param target: the reader
    :param content: the bytes
    :return: whether they were taken; otherwise they were refused by a documented error with a message
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(content)
        except target.documented as error:
            assert str(error), f"{type(error).__name__} without a message"
            return False
    return True
