"""Alters model files, and loads them without trust."""

import io
import json
import pickle
import time
import zipfile

import pytest
import torch as th

from sb3_ppo_plus import PPOPlus, UntrustedFileError


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def load(content):
    return PPOPlus.load(io.BytesIO(content), trusted=False, device="cpu")


def refused(content, match=None):
    # Of this process: a loaded machine does not prolong it
    started = time.process_time()
    with pytest.raises(UntrustedFileError, match=match):
        load(content)
    assert time.process_time() - started < 5


def described(members, change):
    description = json.loads(members["ppo_plus.json"])
    change(description)
    return members | {"ppo_plus.json": json.dumps(description)}


def tensors(members, name, change):
    state = th.load(io.BytesIO(members[name]), weights_only=True)
    changed = change(state)
    state = state if changed is None else changed
    file = io.BytesIO()
    th.save(state, file)
    return members | {name: file.getvalue()}


def in_a_torch_archive(pickled):
    return zipped({"archive/data.pkl": pickled, "archive/version": "3\n", "archive/byteorder": "little"})


def legacy(pickled):
    prefix = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*prefix, pickled, pickle.dumps([], 2)])


def torchscript(pickled):
    files = {"archive/data.pkl": pickled, "archive/constants.pkl": pickled, "archive/version": "3\n"}
    return zipped(files | {"archive/code/__torch__.py": "import os; os.system('false')"})


FORMS = {
    "plain pickle": lambda pickled: pickled,
    "torch archive": in_a_torch_archive,
    "legacy": legacy,
    "torchscript": torchscript,
}
