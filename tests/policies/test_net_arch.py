"""Names of networks, and what else passes through."""

import pytest
from environments import make_env
from models import SETTINGS, build
from states import assert_same_training

from sb3_ppo_plus import ActorCriticPlusPolicy, PPOPlus
from sb3_ppo_plus.policies.net_arch import NET_ARCHS, resolve_net_arch


@pytest.mark.parametrize("net_arch", [None, [8], {"pi": [8], "vf": []}, []], ids=str)
def test_layers_pass_through(net_arch):
    assert resolve_net_arch(net_arch) is net_arch


def test_a_name_stays_a_name_in_a_saved_model(tmp_path):
    model = build(policy_kwargs={"net_arch": "tiny"}).learn(32)
    model.save(tmp_path / "model")
    for trusted in (True, False):
        loaded = PPOPlus.load(tmp_path / "model", trusted=trusted)
        assert loaded.policy_kwargs == {"net_arch": "tiny"}
        assert_same_training(model, loaded)
    # The policy alone is saved with its layers
    model.policy.save(tmp_path / "policy")
    assert ActorCriticPlusPolicy.load(tmp_path / "policy").net_arch == NET_ARCHS["tiny"]


def test_a_policy_of_the_users_may_understand_other_names():
    class Own(ActorCriticPlusPolicy):
        def __init__(self, *args, net_arch, **kwargs):
            super().__init__(*args, net_arch=[int(size) for size in net_arch.split("x")], **kwargs)

    model = PPOPlus(Own, make_env(), policy_kwargs={"net_arch": "8x4"}, **SETTINGS)
    assert model.policy.net_arch == [8, 4]


@pytest.mark.parametrize("net_arch", [{"actor": [8], "critic": [8]}, {"pi": [8], "qf": [8]}], ids=str)
def test_keys_that_sb3_passes_over_are_warned_of(net_arch):
    with pytest.warns(UserWarning, match=r"net_arch has the keys .*('actor', 'critic'|'qf'), which are not used"):
        build(policy_kwargs={"net_arch": net_arch})
