"""A snapshot becomes the bytes that ``save`` would have written when it was taken."""

import io
import json
import zipfile

import pytest
import torch as th
from environments import ToyEnv
from models import build
from states import assert_same_bits, state_of

from sb3_ppo_plus import PPOPlus
from sb3_ppo_plus.saving import model_snapshot
from sb3_ppo_plus.saving.model_snapshot import ModelSnapshots, _copied, _tensors_in

N_STEPS = 16
KINDS = {
    "mlp": {},
    "lstm": {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8}},
    "gsde": {"use_sde": True},
    "schedules": {"learning_rate": "lin_1e-3", "clip_range": lambda progress: 0.1 + 0.1 * progress},
    "critic": {"critic_learning_rate": 1e-3},
    "class": {"policy_kwargs": {"optimizer_class": th.optim.SGD, "activation_fn": th.nn.ELU}},
}


def trained(**kwargs):
    model = build(ToyEnv(), **{"n_steps": N_STEPS, "batch_size": N_STEPS, "n_epochs": 2} | kwargs)
    return model.learn(2 * N_STEPS)


def members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def saved(model, exclude=()):
    file = io.BytesIO()
    model.save(file, exclude=exclude)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_members_of_the_file_are_those_that_save_writes(kind):
    model, snapshots = trained(**KINDS[kind]), ModelSnapshots()
    for exclude in ([], ["_last_obs", "ep_info_buffer"]):
        # Twice: the second time it remembers what has not changed
        for _ in range(2):
            assert members(snapshots.take(model, exclude)()) == members(saved(model, exclude))


def test_training_on_changes_nothing_in_a_snapshot_that_is_written_later():
    model, snapshots = trained(), ModelSnapshots()
    at_once, make = saved(model), snapshots.take(model, [])
    model.learning_rate = 1.0
    model.policy_kwargs["net_arch"] = [1]
    model.learn(2 * N_STEPS, reset_num_timesteps=False)
    assert members(make()) == members(at_once)
    assert members(snapshots.take(model, [])()) == members(saved(model))


def test_what_has_changed_in_place_is_written_anew():
    model, snapshots = trained(policy_kwargs={"activation_fn": th.nn.ELU}), ModelSnapshots()
    snapshots.take(model, [])
    model.policy_kwargs["activation_fn"] = th.nn.ReLU
    model.observation_space.low[0] = -3.0
    assert members(snapshots.take(model, [])()) == members(saved(model))


@pytest.mark.parametrize("trusted", [True, False])
def test_it_loads_with_trust_and_without(tmp_path, trusted):
    model = trained()
    path = tmp_path / "model.zip"
    path.write_bytes(ModelSnapshots().take(model, [])())
    assert_same_bits(state_of(PPOPlus.load(path, device="cpu", trusted=trusted)), state_of(model))


def test_a_save_of_ones_own_is_called():
    class Own(PPOPlus):
        def save(self, path, exclude=None, include=None):
            super().save(path, [*exclude, "seed"], include)

    model = Own("MlpPolicy", ToyEnv(), n_steps=N_STEPS, batch_size=N_STEPS, device="cpu")
    assert "seed" not in json.loads(members(ModelSnapshots().take(model, [])())["data"])
    model = trained()
    model.save = lambda path, exclude: path.write(b"mine")
    assert ModelSnapshots().take(model, [])() == b"mine"


def test_tensors_on_another_device_are_written_at_once(monkeypatch):
    model, made = trained(), []
    monkeypatch.setattr(model_snapshot, "_archive", lambda *arguments: made.append(1) or b"archive")
    make = ModelSnapshots().take(model, [])
    assert made == []
    monkeypatch.setattr(model, "get_parameters", lambda: {"policy": {"weight": th.zeros(2, device="meta")}})
    make = ModelSnapshots().take(model, ["get_parameters"])
    assert made == [1] and make() == b"archive"


def test_shared_tensors_stay_shared_and_views_keep_their_storages():
    flat = th.arange(12.0)
    shared = th.zeros(3)
    tree = {
        "views": [flat[:4], flat[4:]],
        "part": th.arange(10.0)[2:5],
        "tied": {"one": shared, "other": shared.detach()},
        "transposed": th.arange(6.0).reshape(2, 3).T,
        "parameter": th.nn.Parameter(th.ones(2)),
        "steps": (3, None, [th.tensor(1.5)]),
    }
    copied = _copied(tree, list(_tensors_in(tree)))
    files = []
    for one in (tree, copied):
        file = io.BytesIO()
        th.save(one, file)
        files.append(members(file.getvalue()))
    assert files[0] == files[1]
    for tensor in _tensors_in(tree):
        tensor.detach().fill_(-1.0)
    assert not any((tensor == -1).any() for tensor in _tensors_in(copied))


def test_the_order_and_the_metadata_of_a_state_dict_are_copied():
    state = trained().policy.state_dict()
    copied = _copied(state, list(_tensors_in(state)))
    assert type(copied) is type(state) and list(copied) == list(state)
    assert copied._metadata == state._metadata and copied._metadata is not state._metadata
