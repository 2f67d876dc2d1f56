"""Hostile model files: none of them runs code. Each is an UntrustedFileError, unless its hostile part is not read."""

import base64
import io
import json
import pickle
import stat
import zipfile

import cloudpickle
import numpy as np
import pytest
import torch as th
from altered_files import FORMS, described, load, refused, zipped
from environments import make_env
from hostile import Payload

from sb3_ppo_plus import PPOPlus, UntrustedFileError


def test_the_file_that_the_tests_alter_loads_and_the_payload_works(model_file, tmp_path):
    assert load(zipped(model_file)).num_timesteps == 32
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


# Code

DATA_FIELDS = [
    *("policy_class", "observation_space", "action_space", "learning_rate", "lr_schedule", "clip_range", "ent_coef"),
    *("policy_kwargs", "rollout_buffer_class", "ep_info_buffer", "_last_obs", "_last_episode_starts", "unheard_of"),
]


@pytest.mark.parametrize("field", DATA_FIELDS)
def test_pickles_among_sb3s_own_data_are_never_read(field, model_file, tmp_path):
    mark = tmp_path / "mark"
    data = json.loads(model_file["data"])
    code = base64.b64encode(cloudpickle.dumps(Payload(mark))).decode()
    data[field] = {":type:": "<class 'dict'>", ":serialized:": code}
    content = zipped(model_file | {"data": json.dumps(data)})
    load(content)
    assert not mark.exists()
    # With trust this file does run code
    with pytest.raises(Exception):  # noqa: B017  # some error of SB3 afterwards
        PPOPlus.load(io.BytesIO(content)).learn("no number")
    assert mark.exists()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth"])
def test_pickles_in_place_of_tensors_do_not_run(member, protocol, form, model_file, tmp_path):
    mark = tmp_path / "mark"
    refused(zipped(model_file | {member: form(pickle.dumps(Payload(mark), protocol))}))
    refused(zipped(model_file | {member: form(pickle.dumps({"state": Payload(mark)}, protocol))}))
    assert not mark.exists()


@pytest.mark.parametrize("member", ["pytorch_variables.pth", "system_info.txt", "_stable_baselines3_version"])
def test_pickles_in_members_that_are_not_needed_are_not_read(member, model_file, tmp_path):
    mark = tmp_path / "mark"
    load(zipped(model_file | {member: pickle.dumps(Payload(mark))}))
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "hostile.Payload"],
)
@pytest.mark.parametrize(
    "path",
    [
        ("policy",),
        ("arguments", "rollout_buffer_class"),
        ("arguments", "policy_kwargs", "activation_fn"),
        ("arguments", "policy_kwargs", "optimizer_class"),
        ("arguments", "policy_kwargs", "features_extractor_class"),
        ("arguments", "policy_kwargs", "net_arch"),
        ("arguments", "policy_kwargs", "features_extractor_kwargs", "extractors", "image"),
        ("arguments", "learning_rate"),
        ("observation_space",),
    ],
    ids=".".join,
)
@pytest.mark.parametrize("tag", ["class", "schedule", "tuple"])
def test_a_name_in_the_description_imports_nothing(tag, path, name, model_file):
    def change(description):
        for key in path[:-1]:
            description = description.setdefault(key, {})
        description[path[-1]] = {"$": tag, "name": name, "arguments": {}, "items": {}}

    refused(zipped(described(model_file, change)))


@pytest.mark.parametrize(("field", "foreign_name"), [("activation_fn", "adam"), ("optimizer_class", "relu")])
def test_each_field_has_its_own_table(field, foreign_name, model_file):
    def change(description):
        description["arguments"]["policy_kwargs"][field] = {"$": "class", "name": foreign_name}

    message = f"policy_kwargs.{field} is the class '{foreign_name}', which is not one of"
    refused(zipped(described(model_file, change)), message)


# The archive


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "..\\evil",
        "a/../../evil",
        "C:\\evil",
        "policy.pth/../../x",
        "more.pth",
        "policy.pth\0.x",
    ],
)
def test_no_member_has_another_name_than_sb3s(name, model_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.parent.glob("**/evil"))
    refused(zipped(model_file | {name: b"evil"}))
    assert set(tmp_path.parent.glob("**/evil")) == before


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_special_files_are_refused(kind, model_file):
    file = io.BytesIO(zipped({name: value for name, value in model_file.items() if name != "policy.pth"}))
    with zipfile.ZipFile(file, "a") as archive:
        link = zipfile.ZipInfo("policy.pth")
        link.create_system, link.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    refused(file.getvalue(), "is a link or another special file")


@pytest.mark.parametrize("name", ["ppo_plus.json", "policy.pth", "policy.optimizer.pth"])
def test_missing_members_are_named(name, model_file):
    refused(zipped({key: value for key, value in model_file.items() if key != name}), name)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_occur_twice_are_refused(model_file):
    file = io.BytesIO(zipped(model_file))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("policy.pth", model_file["policy.pth"])
    refused(file.getvalue(), "'policy.pth' occurs twice")


@pytest.mark.parametrize("member", ["ppo_plus.json", "policy.pth", "data"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs_are_not_unpacked(compression, member, model_file):
    bomb = zipped(model_file | {member: b"\0" * 2**24}, compression)
    assert len(bomb) < 2**18
    refused(bomb, "is compressed")


def test_a_zip_bomb_inside_the_tensors_is_not_unpacked(model_file):
    files = {"archive/data.pkl": pickle.dumps({}, 2), "archive/data/0": b"\0" * 2**24}
    refused(zipped(model_file | {"policy.pth": zipped(files, zipfile.ZIP_DEFLATED)}), "is compressed")


def overlapping(members):
    """Make an archive in which all members share the bytes of one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in members:
            archive.writestr(name, b"x" * 1000 if name == "data" else b"")
        sizes = next(info for info in archive.infolist() if info.filename == "data")
        for info in archive.infolist():
            info.header_offset, info.CRC = sizes.header_offset, sizes.CRC
            info.file_size = info.compress_size = sizes.file_size
    return file.getvalue()


def test_members_that_share_bytes_are_refused(model_file):
    refused(overlapping(model_file))


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip", b"PK\5\6" + b"\0" * 18, b"PK\3\4" + b"\xff" * 100])
def test_what_is_no_archive_is_refused(content):
    refused(content)


def test_a_flipped_bit_is_found(model_file):
    content = bytearray(zipped(model_file))
    content[content.index(model_file["policy.pth"]) + len(model_file["policy.pth"]) // 2] ^= 1
    refused(bytes(content), "CRC")


# The description's JSON


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 10**6,
        b'{"a":' * 10**6,
        b'"' + b'\\"' * 10**6,
        b'{"format": ' + b"9" * 10**6 + b"}",
        b'{"format": 1e999}',
        b'{"format": NaN}',
        b'{"format": -Infinity}',
        b'{"format": "x", "format": "y"}',
        b'{"format": "sb3_ppo_plus.model/2"}',
        b'{"format": "sb3_ppo_plus.model/1"}',
        b" " * (2**25 + 1),
        b'{"format": [' + b"[]," * 2**20 + b"[]]}",
    ],
    ids=lambda text: text[:20].decode(errors="replace"),
)
def test_json_that_is_not_ours_is_refused(text, model_file):
    refused(zipped(model_file | {"ppo_plus.json": text}))


NUMBERS = [10**17, -1, 0, 1e300, 1e-300, "1", [], {}, True, None, {"$": "number", "value": "nan"}]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "name", ["n_steps", "batch_size", "gamma", "gae_lambda", "max_grad_norm", "seed", "learning_rate", "clip_range"]
)
def test_arguments_are_taken_or_refused(name, value, model_file):
    def change(description):
        description["arguments"][name] = value

    try:
        load(zipped(described(model_file, change)))
    except UntrustedFileError:
        return
    # A value that is not refused must be one that the constructor takes
    PPOPlus("MlpPolicy", make_env(), device="cpu", **{"n_steps": 32, "batch_size": 16} | {name: value})


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"net_arch": [10**9, 10**9]},
        {"net_arch": [10**5, 10**5]},
        {"net_arch": [10**17]},
        {"net_arch": [4090, 4000]},
        {"net_arch": {"pi": [4090, 4000], "vf": []}},
        {"memory": "lstm", "memory_kwargs": {"hidden_size": 4000}},
        {"net_arch": [-1]},
        {"net_arch": [8] * 100_000},
        {"net_arch": [0] * 100_000},
        {"net_arch": {"pi": "x"}},
        {"features_extractor_class": "transformer", "features_extractor_kwargs": {"n_layers": 10**9, "d_model": 8}},
        {"features_extractor_class": "transformer", "features_extractor_kwargs": {"d_model": 10**6}},
        {"features_extractor_class": "transformer", "features_extractor_kwargs": {"d_feedforward": 10**12}},
        {"unheard_of": 1},
        {"activation_fn": "os.system"},
        {"activation_fn": "x" * 10**7},
        {"action_dist": "__import__('os')"},
        {"optimizer_kwargs": {"foo": 1}},
        {"lr_schedule": 1},
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_network_that_is_not_the_files_is_not_built(policy_kwargs, model_file):
    def change(description):
        description["arguments"]["policy_kwargs"] = policy_kwargs

    refused(zipped(described(model_file, change)))


@pytest.mark.parametrize(
    ("policy_kwargs", "shape"),
    [
        ({"memory": "gtrxl", "memory_kwargs": {"memory_length": 10**6, "hidden_size": 64}}, [3]),
        ({"features_extractor_class": "transformer", "features_extractor_kwargs": {"d_model": 2**16}}, [2**10, 1]),
    ],
)
def test_tables_larger_than_those_of_the_file_are_not_filled(policy_kwargs, shape, model_file, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a large table is filled")

    def change(description):
        description["arguments"]["policy_kwargs"] = policy_kwargs
        description["observation_space"]["shape"] = shape

    monkeypatch.setattr("sb3_ppo_plus.policies.gtrxl.sinusoidal_encoding", refuse)
    monkeypatch.setattr(th, "randn", refuse)
    refused(zipped(described(model_file, change)), "is larger than the one in policy.pth")


def encoded(shape, dtype="float32", data=b""):
    return {"dtype": dtype, "shape": shape, "base64": base64.b64encode(data).decode()}


ZERO, ONE = (encoded([], data=np.float32(number).tobytes()) for number in (0, 1))

BOX = {"space": "Box", "shape": [3], "dtype": "float32", "low": ZERO, "high": ONE}


@pytest.mark.parametrize(
    "space",
    [
        BOX | {"shape": [10**17]},
        BOX | {"shape": [10**9, 10**9]},
        BOX | {"shape": [2**24]},
        BOX | {"shape": [0] * 100},
        BOX | {"shape": [-1]},
        BOX | {"shape": [2.5]},
        BOX | {"shape": "3"},
        BOX | {"shape": [4]},
        BOX | {"dtype": "object"},
        BOX | {"dtype": "float64"},
        BOX | {"low": ONE, "high": ZERO},
        BOX | {"low": encoded([], data=np.float32(np.nan).tobytes())},
        BOX | {"low": encoded([3], data=b"\0" * 11)},
        BOX | {"low": ZERO | {"base64": "!"}},
        BOX | {"low": encoded([], "object", b"\0" * 8)},
        {"space": "Dict", "spaces": [["a", BOX | {"shape": [2**23]}]] * 3},
        {"space": "Dict", "spaces": [["a", BOX], ["a", BOX]]},
        {"space": "Dict", "spaces": [[str(index), BOX] for index in range(5000)]},
        {"space": "Dict", "spaces": [[1, BOX]]},
        {"space": "Dict", "spaces": {}},
        {"space": "Discrete", "n": 0, "start": 0, "dtype": "int64"},
        {"space": "Discrete", "n": 10**17, "start": 0, "dtype": "int64"},
        {"space": "Discrete", "n": 2, "start": 0, "dtype": "float32"},
        {"space": "MultiBinary", "shape": [], "is_flat": True},
        {"space": "MultiBinary", "shape": [2**24], "is_flat": True},
        {"space": "MultiDiscrete", "dtype": "int64", "nvec": encoded([0], "int64"), "start": encoded([0], "int64")},
        {
            "space": "MultiDiscrete",
            "dtype": "int8",
            "nvec": encoded([2**20], "int8", b"\2" * 2**20),
            "start": encoded([2**20], "int8", b"\0" * 2**20),
        },
        {"space": "Text"},
        {"space": "Custom", "entry_point": "os:system"},
    ],
    ids=lambda space: str(space)[:60],
)
@pytest.mark.parametrize("which", ["observation_space", "action_space"])
def test_spaces_that_are_not_the_models_are_refused(which, space, model_file):
    def change(description):
        description[which] = space

    refused(zipped(described(model_file, change)))


@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True])
@pytest.mark.parametrize("name", ["num_timesteps", "_n_updates", "n_envs"])
def test_counters_are_checked(name, value, model_file):
    def change(description):
        (description if name == "n_envs" else description["counters"])[name] = value

    refused(zipped(described(model_file, change)), name)


@pytest.mark.parametrize("n_steps, n_envs", [(10**9, 1), (10**5, 2**20)])
def test_a_rollout_buffer_that_no_memory_holds_is_refused(n_steps, n_envs, model_file):
    def change(description):
        description["arguments"] |= {"n_steps": n_steps, "batch_size": 64}
        description["n_envs"] = n_envs

    refused(zipped(described(model_file, change)), "would take .* bytes; allowed without trust")


def test_a_long_text_is_no_schedule(model_file):
    def change(description):
        description["arguments"]["learning_rate"] = "_".join(["1"] * 10**6)

    refused(zipped(described(model_file, change)), "learning_rate")
