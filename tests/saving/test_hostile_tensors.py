"""Hostile tensors in model files, and hostile files for set_parameters."""

import io
import pickle
import zipfile

import pytest
import torch as th
from altered_files import FORMS, load, refused, tensors, zipped
from environments import SMALL_NET, make_env
from hostile import Payload
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from states import assert_same_bits

from sb3_ppo_plus import PPOPlus, UntrustedFileError

# Tensors

BIAS = "mlp_extractor.policy_net.0.bias"


def put(name, value):
    return lambda state: {**state, name: value(state[name]) if callable(value) else value}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put(BIAS, lambda bias: bias.double()), "float64"),
        (put(BIAS, lambda bias: bias.to(th.complex64)), "complex64"),
        (put(BIAS, lambda bias: bias.int()), "int32"),
        (put(BIAS, lambda bias: bias[:-1].clone()), "shape"),
        (put(BIAS, lambda bias: bias.reshape(1, -1)), "shape"),
        (put(BIAS, lambda bias: th.zeros(()).expand(8)), "more elements than numbers"),
        (put(BIAS, lambda bias: th.zeros(1).expand(10**12)), "more elements than numbers"),
        (put(BIAS, lambda bias: bias.to_sparse()), "no dense tensor|no plain tensors"),
        (put(BIAS, lambda bias: bias * float("nan")), f"'{BIAS}' holds NaN or infinity"),
        (put(BIAS, lambda bias: bias - float("inf")), f"'{BIAS}' holds NaN or infinity"),
        (put(BIAS, lambda bias: 1.0), "no tensor"),
        (put(BIAS, None), "no tensor"),
        (put("another", th.zeros(1)), "unknown tensor 'another'"),
        (put(5, th.zeros(1)), "no string"),
        (lambda state: {key: value for key, value in state.items() if key != BIAS}, f"has no tensor '{BIAS}'"),
        (lambda state: {"state": state}, "no tensor"),
        (lambda state: [], "no state dict"),
        (lambda state: th.zeros(3), "no state dict"),
    ],
)
def test_tensors_of_the_policy_must_be_those_of_the_policy(change, match, model_file):
    refused(zipped(tensors(model_file, "policy.pth", change)), match)


def in_group(**settings):
    def change(state):
        state["param_groups"][0].update(settings)

    return change


def in_state(index, name, value):
    def change(state):
        entry = state["state"][index]
        entry[name] = value(entry[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    "change",
    [
        in_group(lr="x"),
        in_group(lr=float("nan")),
        in_group(betas=(5.0, 0.9)),
        in_group(betas=(0.9,)),
        in_group(betas=0.9),
        in_group(eps=-1.0),
        in_group(fused="x"),
        in_group(unheard_of=1),
        in_group(params=[0]),
        in_group(params=list(range(100))),
        in_state(0, "exp_avg", lambda value: value.double()),
        in_state(0, "exp_avg", lambda value: value[:1].clone()),
        in_state(0, "exp_avg", lambda value: th.zeros(1).expand(10**12)),
        in_state(0, "exp_avg", lambda value: th.zeros(())),
        in_state(0, "exp_avg", lambda value: value * float("nan")),
        in_state(0, "step", th.tensor(float("inf"))),
        in_state(1, "exp_avg_sq", 0.5),
        in_state(1, "step", lambda value: th.zeros(10)),
        in_state(1, "step", lambda value: value.long()),
        in_state(1, "step", "x"),
        in_state(1, "more", th.zeros(1)),
        lambda state: state["state"][0].__delitem__("step"),
        lambda state: state["state"].update({99: {}}),
        lambda state: state["state"].update({"x": {}}),
        lambda state: state["state"].update({0: []}),
        lambda state: state["param_groups"].append(state["param_groups"][0]),
        lambda state: {"state": []},
        lambda state: {"state": [], "param_groups": []},
        lambda state: [],
    ],
)
def test_the_optimisers_state_must_be_one_that_the_optimiser_makes(change, model_file):
    refused(zipped(tensors(model_file, "policy.optimizer.pth", change)), "policy.optimizer.pth")


def test_settings_of_an_older_torch_are_completed(model_file):
    def change(state):
        del state["param_groups"][0]["decoupled_weight_decay"]

    model = load(zipped(tensors(model_file, "policy.optimizer.pth", change)))
    assert model.policy.optimizer.param_groups[0]["decoupled_weight_decay"] is False


# Parameters only


def set_parameters(content, tmp_path):
    (tmp_path / "model.zip").write_bytes(content)
    model = PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, policy_kwargs=SMALL_NET, device="cpu")
    model.set_parameters(tmp_path / "model.zip", device="cpu")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth"])
def test_set_parameters_runs_no_pickle(member, form, model_file, tmp_path):
    mark = tmp_path / "mark"
    content = zipped(model_file | {member: form(pickle.dumps(Payload(mark))), "data": pickle.dumps(Payload(mark))})
    with pytest.raises(UntrustedFileError, match=member):
        set_parameters(content, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("inside", [False, True])
def test_set_parameters_unpacks_no_bomb(inside, model_file, tmp_path):
    zeros = b"\0" * 2**24
    files = {"archive/data.pkl": pickle.dumps({}, 2), "archive/data/0": zeros}
    compression = zipfile.ZIP_STORED if inside else zipfile.ZIP_DEFLATED
    member = zipped(files, zipfile.ZIP_DEFLATED) if inside else zeros
    bomb = zipped(model_file | {"policy.pth": member}, compression)
    assert len(bomb) < 2**18
    with pytest.raises(UntrustedFileError, match="is compressed"):
        set_parameters(bomb, tmp_path)


def test_set_parameters_takes_what_torch_saved_before_1_6(model_file, tmp_path):
    old = io.BytesIO()
    state = th.load(io.BytesIO(model_file["policy.pth"]), weights_only=True)
    th.save(state, old, _use_new_zipfile_serialization=False)
    set_parameters(zipped(model_file | {"policy.pth": old.getvalue(), "tensors.pth": b"no state dict"}), tmp_path)
    with pytest.raises(UntrustedFileError, match="no readable zip archive"):
        load(zipped(model_file | {"policy.pth": old.getvalue()}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_set_parameters_takes_finite_parameters_only(value, model_file, tmp_path):
    content = zipped(tensors(model_file, "policy.pth", put(BIAS, lambda bias: bias + value)))
    with pytest.raises(UntrustedFileError, match=f"'{BIAS}' holds NaN or infinity"):
        set_parameters(content, tmp_path)
    # With trust it loads, as in SB3
    PPOPlus.load(tmp_path / "model.zip", device="cpu")


def test_a_buffer_may_hold_infinity(tmp_path):
    model = PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, policy_kwargs=SMALL_NET, device="cpu")
    model.policy.register_buffer("mask", th.tensor([0.0, -float("inf")]))
    model.save(tmp_path / "model.zip")
    model.set_parameters(tmp_path / "model.zip", device="cpu")


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("policy.optimizer.pth", in_state(0, "exp_avg", lambda value: value[:1].clone())),
        ("policy.optimizer.pth", in_state(0, "exp_avg", lambda value: value * float("inf"))),
        ("policy.optimizer.pth", in_state(0, "exp_avg", [[[]]])),
        ("policy.optimizer.pth", in_group(lr="x")),
        ("policy.optimizer.pth", lambda state: []),
        ("policy.pth", lambda state: []),
        ("policy.pth", lambda state: th.zeros(3)),
        ("policy.pth", put(BIAS, 1.0)),
    ],
)
def test_set_parameters_checks_what_pytorch_does_not(member, change, model_file, tmp_path):
    with pytest.raises(UntrustedFileError, match=member):
        set_parameters(zipped(tensors(model_file, member, change)), tmp_path)


class WithExtraState(th.nn.Linear):
    """A layer that saves more than tensors."""

    def get_extra_state(self):
        return {"n": 3}

    def set_extra_state(self, state):
        self.n = state["n"]


@pytest.mark.parametrize(
    "optimizer_class",
    [
        *(th.optim.Adam, th.optim.AdamW, th.optim.SGD, th.optim.RMSprop, th.optim.NAdam, th.optim.RAdam, th.optim.ASGD),
        *(th.optim.Adafactor, th.optim.Adagrad, th.optim.Adadelta, th.optim.Adamax, th.optim.Rprop, RMSpropTFLike),
    ],
)
def test_set_parameters_takes_the_state_of_the_models_own_optimiser(optimizer_class, tmp_path):
    policy_kwargs = SMALL_NET | {"optimizer_class": optimizer_class}

    def make():
        return PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, policy_kwargs=policy_kwargs, device="cpu")

    saved = make().learn(16)
    saved.save(tmp_path / "model.zip")
    model = make()
    model.set_parameters(tmp_path / "model.zip", device="cpu")
    assert_same_bits(model.get_parameters(), saved.get_parameters())
    loaded = PPOPlus.load(tmp_path / "model.zip", device="cpu", trusted=False, allow=[optimizer_class])
    assert_same_bits(loaded.get_parameters(), saved.get_parameters())


def test_set_parameters_hands_extra_state_to_its_module(tmp_path):
    model = PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, policy_kwargs=SMALL_NET, device="cpu")
    model.policy.value_net = WithExtraState(model.policy.value_net.in_features, 1)
    model.save(tmp_path / "model.zip")
    model.set_parameters(tmp_path / "model.zip", device="cpu")
    assert model.policy.value_net.n == 3


def test_the_state_of_another_optimiser_is_named_as_such(model_file, tmp_path):
    (tmp_path / "model.zip").write_bytes(zipped(model_file))
    policy_kwargs = SMALL_NET | {"optimizer_class": th.optim.SGD}
    model = PPOPlus("MlpPolicy", make_env(), n_steps=8, batch_size=8, policy_kwargs=policy_kwargs, device="cpu")
    with pytest.raises(UntrustedFileError, match="is of another optimiser than the model's, which has no setting"):
        model.set_parameters(tmp_path / "model.zip", device="cpu")


@pytest.mark.parametrize(
    "name", ["policy.action_net", "_coefficients._groups.optimizer", "rollout_buffer", "policy.__class__"]
)
def test_set_parameters_follows_no_name_into_the_model(name, model_file, tmp_path):
    content = zipped(model_file | {f"{name}.pth": model_file["policy.pth"]})
    with pytest.raises(UntrustedFileError, match=f"the model has no parameters of the name '{name}.pth'"):
        set_parameters(content, tmp_path)
