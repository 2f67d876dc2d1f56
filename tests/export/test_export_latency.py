"""examples/benchmarks/export_latency.py measures what it says it does."""

import numpy as np
from export_cases import disturb
from export_latency import Still, by_predict, by_session, measure

from sb3_ppo_plus import PPOPlus, export_policy
from sb3_ppo_plus.export import load_exported


def test_every_way_is_measured_for_both_policies():
    times = measure(calls=3, rounds=1)
    ways = ["onnxruntime", "load_exported(...).predict", "PPOPlus.predict", "SB3's predict"]
    assert list(times) == ["MLP 64x64", "LSTM 64"]
    for measured in times.values():
        assert list(measured) == ways and min(measured.values()) > 0


def test_the_state_is_handed_on(tmp_path):
    model = PPOPlus("MlpPolicy", Still(), device="cpu", policy_kwargs={"memory": "lstm"})
    disturb(model)
    path = export_policy(model, tmp_path / "policy.onnx")
    ways = [by_session(path), by_predict(load_exported(path)), by_predict(model)]
    observation = np.ones((1, 8), np.float32)
    first, second, third = ([act(observation)[0, 0] for act in ways] for _ in range(3))
    for actions in (first, second, third):
        np.testing.assert_allclose(actions, actions[0], atol=1e-5)
    assert abs(first[0] - second[0]) > 1e-3 and abs(second[0] - third[0]) > 1e-3
