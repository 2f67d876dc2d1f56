"""Coefficients are numbers, schedules, callables or strings; other values are refused."""

import numpy as np
import pytest
from environments import logs_of_updates
from models import STEPS, assert_refused, build
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_plus import Constant, Cosine

NAN, INF = float("nan"), float("inf")
COEFFICIENTS = ["learning_rate", "critic_learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef"]

FORMS = {
    "number": (0.25, 0.25, 0.25),
    "integer": (1, 1.0, 1.0),
    "numeric string": ("2.5e-1", 0.25, 0.25),
    "schedule": (Cosine(0.4, 0.2), 0.3, 0.2),
    "lin": ("lin_0.5_0.3", 0.4, 0.3),
    "cos": ("cos_0.4_0.2", 0.3, 0.2),
    "warmup_cos": ("warmup_cos_0.5_0.1", 0.1 + 0.4 * (1 + np.cos(np.pi * 0.4 / 0.9)) / 2, 0.1),
    "exp": ("exp_0.4_0.1", 0.2, 0.1),
    "callable": (lambda progress: 0.1 + progress, 0.6, 0.1),
    "SB3's": (LinearSchedule(0.5, 0.3, 1.0), 0.4, 0.3),
    "numpy": (np.float32(0.25), 0.25, 0.25),
}


@pytest.mark.parametrize(("given", "halfway", "end"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_each_coefficient_takes_each_form_and_logs_its_value(name, given, halfway, end):
    logs = logs_of_updates(build(**{name: given}), 2 * STEPS)
    assert [update[f"train/{name}"] for update in logs] == pytest.approx([halfway, end])


def test_every_coefficient_has_an_effect_of_its_own():
    """Every coefficient moves the parameters in its own way."""
    reached = []
    for changed in (
        {},
        *({name: 0.01} for name in COEFFICIENTS),
        {"clip_range_vf": 0.01, "pessimistic_value_clip": False},
    ):
        model = build(**{"learning_rate": 3e-3, "n_epochs": 4} | changed)
        reached.append(model.learn(2 * STEPS).policy.parameters_to_vector())
    for i, first in enumerate(reached):
        assert not any(np.array_equal(first, second) for second in reached[:i])


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.125, 0.125), ("lin_0.5_0.3", 0.3), (lambda progress: 0.125 + progress, 0.125)],
    ids=["number", "string", "callable"],
)
def test_an_assigned_coefficient_takes_effect_at_the_next_update(name, value, expected):
    initial = {"clip_range_vf": 0.2, "critic_learning_rate": 1e-3}
    model = build(**initial)
    model.learn(STEPS)
    setattr(model, name, value)
    (logs,) = logs_of_updates(model, STEPS)
    assert logs[f"train/{name}"] == pytest.approx(expected)


def test_value_clipping_can_be_switched_on_and_off_between_updates():
    model = build()
    assert "train/clip_range_vf" not in logs_of_updates(model, STEPS)[0]
    model.clip_range_vf = "0.1"
    assert logs_of_updates(model, STEPS)[0]["train/clip_range_vf"] == 0.1
    model.clip_range_vf = None
    assert "train/clip_range_vf" not in logs_of_updates(model, STEPS)[0]


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate", "ent_coef", "vf_coef"])
def test_attributes_keep_what_was_given(name):
    for given in ("lin_0.1", 0.1, Constant(0.1)):
        model = build(**{name: given})
        assert getattr(model, name) == given
        model.learn(STEPS)
        assert getattr(model, name) == given


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_an_assigned_value_that_is_not_allowed_stops_the_update(name):
    model = build(clip_range_vf=0.2, critic_learning_rate=1e-3)
    model.learn(STEPS)
    setattr(model, name, -1.0)
    with pytest.raises(ValueError, match=name):
        model.learn(STEPS)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("later", [-0.1, NAN, INF])
def test_a_schedule_that_gives_a_bad_value_later_is_caught(name, later):
    model = build(**{name: lambda progress: 0.1 if progress > 0.1 else later})
    with pytest.raises(ValueError, match=rf"{name}.*(finite|negative)"):
        model.learn(STEPS)


BAD_VALUES = [-0.1, -1, NAN, INF, -INF, "-0.1", "nan", "lin_-0.1", "lin_0.1_-0.1", "cos_nan"]


@pytest.mark.parametrize("value", BAD_VALUES, ids=str)
@pytest.mark.parametrize("name", [name for name in COEFFICIENTS if name != "clip_range_vf"])
def test_coefficients_that_are_negative_or_not_finite_are_refused(name, value):
    assert_refused(ValueError, name, repr(value), **{name: value})


@pytest.mark.parametrize("value", [INF, "-0.1", "nan", "lin_0.1_-0.1"], ids=str)
def test_value_clip_ranges_that_are_negative_or_not_finite_are_refused(value):
    assert_refused(ValueError, "clip_range_vf", repr(value), clip_range_vf=value)


@pytest.mark.parametrize("value", [0, -1, -0.1, NAN])
def test_sb3s_own_check_of_the_value_clip_range_stays(value):
    assert_refused(AssertionError, "`clip_range_vf` must be positive", clip_range_vf=value)


UNKNOWN_STRINGS = ["linear_1e-3", "lin", "lin_", "lin_a", "exp_1e-3", "cos_1_2_3", "", "1e-3_1e-4", "step_1"]


@pytest.mark.parametrize("value", UNKNOWN_STRINGS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_unknown_schedule_strings_are_refused(name, value):
    assert_refused(ValueError, name, repr(value), "lin_3e-4", "warmup_cos_3e-4", **{name: value})


@pytest.mark.parametrize("value", [[0.1], {"a": 1}, True, object, b"lin_1"], ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_of_another_type_are_refused(name, value):
    assert_refused((TypeError, ValueError), name, **{name: value})


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("schedule", [lambda progress: -1.0, lambda progress: NAN], ids=["negative", "nan"])
def test_callables_that_start_with_a_bad_value_are_refused(name, schedule):
    assert_refused(ValueError, name, **{name: schedule})


@pytest.mark.parametrize("name", ["learning_rate", "ent_coef"])
def test_callables_that_return_no_number_are_refused(name):
    assert_refused(ValueError, name, "progress_remaining", **{name: lambda progress: "fast"})
    assert_refused(TypeError, name, "progress_remaining", **{name: lambda: 1.0})
