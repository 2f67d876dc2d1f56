import copy
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

import sb3_ppo_plus
from sb3_ppo_plus import schedules
from sb3_ppo_plus.schedules import (
    SHAPES,
    Constant,
    Cosine,
    Exponential,
    Linear,
    ProgressSchedule,
    WarmupCosine,
    make_schedule,
    schedule_value,
)

EXAMPLES = [
    Constant(0.3),
    Linear(3e-4),
    Linear(3e-4, 1e-5, end_fraction=0.7),
    Linear(0.1, 0.4),
    Cosine(3e-4, 1e-5),
    WarmupCosine(3e-4, warmup_fraction=0.2, end=1e-5),
    Exponential(3e-4, 1e-6),
]

finite = st.floats(0, 1e6, allow_subnormal=False)
positive = st.floats(1e-12, 1e6)
fraction = st.floats(1e-6, 1.0)
any_progress = st.floats(-2, 3)
our_schedules = st.one_of(
    st.builds(Constant, finite),
    st.builds(Linear, finite, finite, fraction),
    st.builds(Cosine, finite, finite),
    st.builds(Exponential, positive, positive),
)


@pytest.mark.parametrize(
    ("schedule", "start", "middle", "end"),
    [
        (Constant(0.3), 0.3, 0.3, 0.3),
        (Linear(0.4), 0.4, 0.2, 0.0),
        (Linear(0.4, 0.1), 0.4, 0.25, 0.1),
        (Linear(0.4, 0.1, end_fraction=0.25), 0.4, 0.1, 0.1),
        (Cosine(0.4), 0.4, 0.2, 0.0),
        (Cosine(0.4, 0.1), 0.4, 0.25, 0.1),
        (WarmupCosine(0.4, warmup_fraction=0.5), 0.0, 0.4, 0.0),
        (WarmupCosine(0.4, warmup_fraction=1.0), 0.0, 0.2, 0.4),
        (Exponential(0.4, 0.1), 0.4, 0.2, 0.1),
    ],
)
def test_values_at_the_start_in_the_middle_and_at_the_end(schedule, start, middle, end):
    # Both ends are exact: an end of 0 is 0, and not 1e-20
    assert (schedule(1.0), schedule(0.0)) == (start, end)
    assert schedule(0.5) == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_progress_beyond_its_range_gives_the_nearest_end(schedule):
    assert schedule(-0.3) == schedule(0.0)
    assert schedule(1.7) == schedule(1.0)


def test_after_a_quarter_of_training_the_cosine_has_its_closed_form_value():
    assert Cosine(2.0, 1.0)(0.75) == pytest.approx(1.0 + 0.5 * (1 + math.cos(math.pi / 4)))


def test_the_warm_up_is_a_line_to_the_value_where_the_cosine_begins():
    schedule = WarmupCosine(1.0, warmup_fraction=0.1, end=0.2)
    assert schedule(0.95) == pytest.approx(0.5)
    assert schedule(0.9) == pytest.approx(1.0)
    assert schedule(0.45) == pytest.approx(Cosine(1.0, 0.2)(0.5))


@given(value=finite, end=finite, end_fraction=fraction, progress=st.floats(0, 1))
def test_linear_gives_the_bits_of_sb3_and_never_passes_its_end(value, end, end_fraction, progress):
    sb3 = LinearSchedule(value, end, end_fraction)(progress)
    assert Linear(value, end, end_fraction)(progress) == min(max(sb3, min(value, end)), max(value, end))


@given(schedule=our_schedules, progress=any_progress)
def test_values_lie_between_value_and_end(schedule, progress):
    end = getattr(schedule, "end", schedule.value)
    assert min(schedule.value, end) <= schedule(progress) <= max(schedule.value, end)


@given(value=positive, end=positive)
def test_curves_have_exact_values_at_both_ends(value, end):
    for schedule in (Cosine(value, end), Exponential(value, end)):
        assert (schedule(1.0), schedule(0.0)) == (value, end)
    assert WarmupCosine(value, 0.1, end)(0.0) == end


@given(value=finite, end=finite, warmup=fraction, progress=any_progress)
def test_warm_up_values_lie_between_zero_and_the_larger_of_value_and_end(value, end, warmup, progress):
    assert 0 <= WarmupCosine(value, warmup, end)(progress) <= max(value, end)


@given(value=finite, end=finite, one=st.floats(0, 1), other=st.floats(0, 1))
def test_a_schedule_only_rises_or_only_falls(value, end, one, other):
    early, late = max(one, other), min(one, other)
    for schedule in (Linear(value, end), Cosine(value, end), Exponential(value + 1e-9, end + 1e-9)):
        step = (schedule(late) - schedule(early)) * (1 if end >= value else -1)
        assert step >= -1e-12 * max(value, end)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_pickle_and_deepcopy_give_an_equal_schedule(schedule):
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule
        assert twin(0.37) == schedule(0.37)


def test_repr_is_the_call_that_makes_the_schedule():
    assert repr(Linear(3e-4, end_fraction=0.5)) == "Linear(value=0.0003, end=0.0, end_fraction=0.5)"
    for schedule in EXAMPLES:
        assert eval(repr(schedule)) == schedule


@pytest.mark.parametrize("schedule", [*EXAMPLES, Constant(1), Linear(np.float32(1), 0), WarmupCosine(1, 1)], ids=repr)
@pytest.mark.parametrize("progress", [1, 0.5, 0, np.float64(0.25)])
def test_values_are_plain_floats(schedule, progress):
    assert type(schedule(progress)) is float


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(math.nan), r"Constant: value must be a finite number, got nan"),
        (lambda: Linear(math.inf), r"Linear: value must be a finite number, got inf"),
        (lambda: Linear(1, -math.inf), r"Linear: end must be a finite number, got -inf"),
        (lambda: Linear(1, end_fraction=0), r"Linear: end_fraction must be a finite number in \(0, 1\], got 0"),
        (lambda: Linear(1, end_fraction=1.1), r"Linear: end_fraction must be a finite number in \(0, 1\], got 1.1"),
        (lambda: Cosine(1, math.nan), r"Cosine: end must be a finite number, got nan"),
        (lambda: WarmupCosine(1, 0.0), r"WarmupCosine: warmup_fraction must be .* in \(0, 1\], got 0"),
        (lambda: WarmupCosine(1, end=math.nan), r"WarmupCosine: end must be a finite number, got nan"),
        (lambda: Exponential(0, 1), r"Exponential: value must be a finite number above 0, got 0"),
        (lambda: Exponential(1, 0), r"Exponential: end must be a finite number above 0, got 0"),
    ],
)
def test_arguments_out_of_range_are_named_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bad", [True, None, "1", [1], 1j])
def test_arguments_other_than_numbers_are_a_type_error(bad):
    with pytest.raises(TypeError, match="Linear: value must be a finite number, got "):
        Linear(bad)


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        (3e-4, Constant(3e-4)),
        (0, Constant(0.0)),
        (np.float32(0.5), Constant(0.5)),
        (np.int64(2), Constant(2.0)),
        ("3e-4", Constant(3e-4)),
        (" 0.5 ", Constant(0.5)),
        ("lin_3e-4", Linear(3e-4)),
        ("lin_3e-4_1e-5", Linear(3e-4, 1e-5)),
        ("cos_3e-4", Cosine(3e-4)),
        ("cos_3e-4_1e-5", Cosine(3e-4, 1e-5)),
        ("warmup_cos_3e-4", WarmupCosine(3e-4)),
        ("warmup_cos_3e-4_1e-5", WarmupCosine(3e-4, end=1e-5)),
        ("exp_3e-4_1e-5", Exponential(3e-4, 1e-5)),
        ("lin_0.2", Linear(0.2)),
        ("lin_0_0.5", Linear(0, 0.5)),
    ],
)
def test_numbers_and_strings_become_schedules(given_value, expected):
    assert make_schedule(given_value) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_of_the_table_makes_its_own_class_from_value_and_end(shape):
    schedule = make_schedule(f"{shape}_0.3_0.1")
    assert type(schedule) is SHAPES[shape]
    assert (schedule.value, schedule.end) == (0.3, 0.1)


def test_every_class_is_public_and_all_but_the_constant_have_a_string_form():
    ours = {cls for cls in ProgressSchedule.__subclasses__() if cls.__module__ == schedules.__name__}
    assert {*SHAPES.values(), Constant} == ours
    assert {cls.__name__ for cls in ours} <= set(schedules.__all__) & set(sb3_ppo_plus.__all__)


@dataclass(frozen=True)
class Stairs(ProgressSchedule):
    end: float = 0.0

    def __call__(self, progress_remaining):
        return self.value if progress_remaining > 0.5 else self.end


@dataclass(frozen=True)
class Overshooting(Stairs):
    @property
    def limits(self):
        return self.value, self.end - 1


def test_a_new_shape_needs_no_more_than_its_line_in_the_table(monkeypatch):
    monkeypatch.setitem(SHAPES, "stairs", Stairs)
    assert make_schedule("stairs_0.3_0.1") == Stairs(0.3, 0.1)
    assert make_schedule("stairs_0.3") == Stairs(0.3)
    stairs = Stairs(0.3)
    assert make_schedule(stairs) is stairs


def test_the_limits_that_a_schedule_names_are_checked():
    assert make_schedule(Stairs(0.3, 0.1), "ent_coef") == Stairs(0.3, 0.1)
    with pytest.raises(ValueError, match="ent_coef must be finite and at least 0 throughout"):
        make_schedule(Overshooting(0.3, 0.1), "ent_coef")


@pytest.mark.parametrize("schedule", [*EXAMPLES, FloatSchedule(0.1)], ids=repr)
def test_a_schedule_object_is_returned_unchanged(schedule):
    assert make_schedule(schedule) is schedule


@pytest.mark.parametrize("returned", [np.float32(0.25), np.float64(0.25), np.array(0.25), 0.25])
def test_a_users_own_callable_returns_plain_floats(returned):
    schedule = make_schedule(lambda progress: returned * progress)
    assert type(schedule(1.0)) is float
    assert schedule(0.5) == 0.125


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.1, "nan", "inf", "-0.1", np.float32(-1)])
def test_a_bad_number_is_refused_with_the_coefficients_name(number):
    with pytest.raises(ValueError, match=r"ent_coef.*finite") as caught:
        make_schedule(number, "ent_coef")
    assert repr(number) in str(caught.value)


@pytest.mark.parametrize("given_value", [Linear(1.0, -0.5), "lin_1_-0.5", "cos_-1", lambda _: -0.5, lambda _: math.nan])
def test_a_schedule_that_goes_below_the_minimum_is_refused(given_value):
    with pytest.raises(ValueError, match="clip_range must be finite and at least 0 throughout, got "):
        make_schedule(given_value, "clip_range")


def test_the_caller_chooses_the_minimum():
    assert make_schedule(0.5, minimum=0.5) == Constant(0.5)
    assert make_schedule("lin_1_-1", minimum=-1) == Linear(1, -1)
    with pytest.raises(ValueError, match=r"at least 0\.5 throughout, got 0\.4"):
        make_schedule(0.4, minimum=0.5)


def test_a_warm_up_may_start_at_zero_below_the_minimum():
    assert make_schedule(WarmupCosine(1.0, end=0.5), minimum=0.1)(1.0) == 0.0


@pytest.mark.parametrize("bad", [True, False, None, [1e-3], {"value": 1}, Linear, 1j])
def test_other_types_are_refused_with_the_name_the_value_and_what_is_allowed(bad):
    with pytest.raises(TypeError, match=r"learning_rate must be a number of at least 0, .*warmup_cos_3e-4") as caught:
        make_schedule(bad, "learning_rate")
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "linear", "linear_3e-4", "lin_", "lin", "lin_a", "lin_1_2_3", "cos_1_", "warmup_3e-4", "1_2", "LIN_1"]
)
def test_unknown_strings_list_the_allowed_forms(text):
    with pytest.raises(ValueError, match=r'learning_rate: unknown schedule in .*"lin_3e-4_1e-5".*"exp_3e-4_1e-5"') as e:
        make_schedule(text, "learning_rate")
    assert repr(text) in str(e.value)


def test_an_exponential_string_needs_its_end():
    with pytest.raises(ValueError, match="vf_coef: a schedule of the shape exp needs its end in 'exp_3e-4'"):
        make_schedule("exp_3e-4", "vf_coef")


@pytest.mark.parametrize("text", ["lin_nan", "cos_1_inf", "exp_0_1", "exp_1_-1"])
def test_a_string_with_numbers_out_of_range_names_coefficient_string_and_range(text):
    with pytest.raises(ValueError, match=f"vf_coef='{text}': .* must be a finite number"):
        make_schedule(text, "vf_coef")


def test_a_callable_that_returns_no_number_is_named():
    with pytest.raises(TypeError, match=r"ent_coef: the schedule .* must take progress_remaining and return a number"):
        make_schedule(lambda progress: None, "ent_coef")
    with pytest.raises(TypeError, match=r"ent_coef: the schedule .* must take progress_remaining"):
        make_schedule(lambda: 1.0, "ent_coef")


def test_schedule_value_is_the_schedules_value():
    assert schedule_value(Linear(0.5), 0.25, "ent_coef") == 0.125
    assert schedule_value(Constant(0.0), 1.0, "ent_coef") == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-9])
def test_schedule_value_refuses_values_that_no_coefficient_may_have(bad):
    schedule = make_schedule(lambda progress: 0.1 if progress > 0.5 else bad)
    assert schedule_value(schedule, 0.6, "clip_range") == 0.1
    with pytest.raises(ValueError, match=r"clip_range must be finite and not negative.*progress_remaining=0\.4") as e:
        schedule_value(schedule, 0.4, "clip_range")
    assert repr(bad) in str(e.value)
