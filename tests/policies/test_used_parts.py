import pytest
from gymnasium import spaces

from sb3_ppo_plus.policies.flat_actions import FlatActionSpace
from sb3_ppo_plus.policies.used_parts import Condition, conditions_of

BOX = spaces.Box(-1, 1, (2,))
SPACE = spaces.Tuple((spaces.Discrete(3), spaces.Tuple((BOX, BOX, BOX)), spaces.Dict({"aim": spaces.Discrete(2)})))


def conditions(used_parts, space=SPACE):
    return conditions_of(FlatActionSpace(space), used_parts)


def test_parts_that_no_list_names_and_parts_that_each_list_names_are_always_used():
    assert conditions(None) == [[]] * 5
    assert conditions({"0": [["1.0", "1.1"], ["1.1"], ["1.1"]]}) == [[], [Condition(0, (0,))], [], [], []]


def test_a_name_of_a_tuple_or_dict_stands_for_all_parts_in_it():
    by_group = conditions({"0": [["1"], ["2"], []]})
    assert by_group == [[], *[[Condition(0, (0,))]] * 3, [Condition(0, (1,))]]
    assert by_group == conditions({"0": [["1.0", "1.1", "1.2"], ["2.aim"], []]})


def test_a_dot_in_a_key_puts_no_part_into_another():
    space = spaces.Dict({"kind": spaces.Discrete(2), "move": BOX, "move.fast": BOX, "move.slow": spaces.Tuple((BOX,))})
    found = conditions({"kind": [["move"], ["move.fast", "move.slow"]]}, space)
    assert found == [[], [Condition(0, (0,))], *[[Condition(0, (1,))]] * 2]


def test_a_path_of_two_parts_is_refused():
    inner = spaces.Dict({"b": spaces.Dict({"c": BOX})})
    space = spaces.Dict({"a": inner, "a.b": BOX, "kind": spaces.Discrete(2)})
    assert conditions({"kind": [["a"], []]}, space) == [[Condition(2, (0,))], [], []]
    with pytest.raises(ValueError, match=r"used_parts\['kind'\]: 'a.b' is the path of two parts"):
        conditions({"kind": [["a.b"], []]}, space)


def test_a_part_that_two_choosers_name_is_used_if_both_use_it():
    found = conditions({"0": [["1.0"], [], ["1.0"]], "2.aim": [["1.0"], []]})
    assert found[1] == [Condition(0, (0, 2)), Condition(4, (0,))]


@pytest.mark.parametrize(
    ("used_parts", "message"),
    [
        ({"2.aims": [[], []]}, "no part '2.aims'.*did you mean '2.aim'"),
        ({"1.0": [[], []]}, "part '1.0' must be Discrete"),
        ({"0": [["1.0"], []]}, "must have 3 lists"),
        ({"0": [["1.0"], ["1.3"], []]}, r"used_parts\['0'\]: the action space has no part '1.3'"),
        ({"0": [["2"], [], []], "2.aim": [["1"], []]}, "part '2.aim' chooses what is used"),
        ({"0": [["0"], [], []]}, "part '0' chooses what is used"),
    ],
)
def test_what_does_not_fit_the_action_space_is_named(used_parts, message):
    with pytest.raises(ValueError, match=message):
        conditions(used_parts)


@pytest.mark.parametrize("used_parts", [[["1.0"]], {"0": "1.0"}, {"0": ["1.0", "1.1", "1.2"]}, {"0": 3}])
def test_another_type_is_refused(used_parts):
    with pytest.raises(TypeError, match="used_parts"):
        conditions(used_parts)


def test_other_action_spaces_have_no_parts_to_use():
    with pytest.raises(ValueError, match="needs a Tuple or Dict action space"):
        conditions_of(spaces.Discrete(3), {"0": [[], [], []]})
