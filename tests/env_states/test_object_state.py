"""What the states of objects say of their classes, and of what the code has made in another way."""

import functools
import logging
import math
import operator

import nasty_environments as nasty
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from states import written_and_read

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.env_states.object_state import object_state
from sb3_ppo_plus.env_states.vec_env_state import set_vec_env_state, vec_env_state
from sb3_ppo_plus.errors import PlainStateError


class Parent(nasty.Nasty):
    level = 1
    n_steps = 0

    def act(self, action):
        Parent.level += action
        Parent.n_steps += 1

    def look(self):
        return Parent.level


Namesake = type("Parent", (Parent,), {"level": 100, "__module__": __name__})


def started(make):
    env = ResumableEnv(make())
    env.reset(seed=0)
    return env


@pytest.fixture(autouse=True)
def classes_as_they_were():
    yield
    Parent.level, Parent.n_steps, Namesake.level = 1, 0, 100


def test_data_of_two_classes_with_one_name_is_kept_apart():
    env = started(Namesake)
    Parent.level, Namesake.level = 7, 107
    state = env.get_resume_state()
    attributes = dict(state["layers"][0][1])
    assert attributes["Parent#1.level"] == ("plain", 107) and attributes["Parent#2.level"] == ("plain", 7)
    Parent.level, Namesake.level, Parent.n_steps = 1, 100, 5
    env.set_resume_state(state)
    assert (Parent.level, Namesake.level, Parent.n_steps) == (7, 107, 0)


def test_a_plain_name_that_two_classes_have_is_an_error():
    env = started(Namesake)
    state = env.get_resume_state()
    state["layers"][0][1]["Parent.level"] = ("plain", 3)
    with pytest.raises(ValueError, match=r"Parent\.level is no state of Parent"):
        env.set_resume_state(state)


class Hunt:
    """One of two states."""


class Flee:
    """The other one."""


@functools.lru_cache
def cached(n):
    return n


class Holding(nasty.Nasty):
    """Holds values that it may exchange."""

    def __init__(self, value=None):
        self.value = value

    def look(self):
        return 0.0


OTHERS = {
    "class": (Hunt, Flee, r":Hunt, the saved one was \S+:Flee"),
    "type": (int, float, "builtins:int, the saved one was builtins:float"),
    "ufunc": (np.cos, np.sin, "numpy:cos, the saved one was numpy:sin"),
    "builtin": (math.cos, len, "math:cos, the saved one was builtins:len"),
    "cache": (max, cached, "builtins:max, the saved one was .*:cached"),
    "getter": (operator.itemgetter(1), operator.itemgetter(2), r"itemgetter\(1\), .* operator.itemgetter\(2\)"),
    "class method": (dict.fromkeys, Hunt, "builtins:dict.fromkeys, the saved one was .*:Hunt"),
    "method": (str.lower, str.upper, "builtins:str.lower, the saved one was builtins:str.upper"),
}


@pytest.mark.parametrize("is_deep", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_a_class_or_a_callable_that_is_another_one_than_the_saved_is_an_error(name, is_deep):
    value, other, message = OTHERS[name]
    if is_deep:
        value, other = {"all": [value]}, {"all": [other]}
    env = started(lambda: Holding(value))
    state = written_and_read(env.get_resume_state())
    env.set_resume_state(state)
    env.unwrapped.value = other
    state = written_and_read(env.get_resume_state())
    env.set_resume_state(state)
    env.unwrapped.value = value
    with pytest.raises(ValueError, match=rf"^Holding\.value\S* is .*{message}"):
        env.set_resume_state(state)


def test_a_class_that_is_missing_is_an_error():
    env, other = started(lambda: Holding(Hunt)), started(lambda: Holding(Hunt))
    del other.unwrapped.value
    with pytest.raises(ValueError, match=r"Holding\.value is missing, the saved one was \S+:Hunt"):
        other.set_resume_state(env.get_resume_state())


def test_the_module_of_a_script_may_have_another_name(monkeypatch):
    env = started(lambda: Holding(Hunt))
    state = env.get_resume_state()
    monkeypatch.setattr(Hunt, "__module__", "__main__")
    env.set_resume_state(state)


def test_a_state_that_tells_no_classes_and_no_places_of_functions_loads():
    env = started(lambda: Holding([Hunt, lambda: 1]))
    state = env.get_resume_state()
    (items,) = [entry for entry in state["table"] if entry[0] == "list"]
    (function,) = [entry for entry in state["table"] if entry[0] == "function"]
    items[1][0] = []
    del function[3]
    env.unwrapped.value = [Flee, lambda: 2]
    env.set_resume_state(state)
    assert env.unwrapped.value[0] is Flee and env.resume_differences() == []


class Switching(nasty.Nasty):
    def __init__(self):
        self.by = lambda: 1

    def act(self, action):
        self.by = lambda: 2

    def look(self):
        return self.by()


def test_another_lambda_is_a_difference_that_the_trial_finds():
    env, other = started(Switching), started(Switching)
    env.step(0)
    other.set_resume_state(env.get_resume_state())
    (difference,) = other.resume_differences()
    assert "Switching.by is the function" in difference and "Switching.act.<locals>.<lambda> in line" in difference
    other.set_resume_state(other.get_resume_state())
    assert other.resume_differences() == []
    assert other.prove_resumable().is_error


class Edited(nasty.Nasty):
    """Code that somebody may edit."""

    speed = 1.0
    steps = ()

    def __init__(self):
        if self.speed > 1:
            self.added = 5

    def look(self):
        return self.speed


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_an_edit_of_the_code_that_is_undone_is_one_warning_also_from_workers(vec_env_cls, monkeypatch):
    def make():
        # Workers have classes of their own
        Edited.speed = speed
        return Edited()

    monkeypatch.setattr(Edited, "speed", 1.0)
    speed = 1.0
    env = make_vec_env(make, 2, wrapper_class=ResumableEnv)
    env.reset()
    state = written_and_read(vec_env_state(env))
    speed = 2.0
    other = make_vec_env(make, 2, wrapper_class=ResumableEnv, vec_env_cls=vec_env_cls)
    message = r"Edited\.speed was 2\.0, and is 1\.0 again.*Edited\.added was deleted"
    with pytest.warns(UserWarning, match=message) as warned:
        set_vec_env_state(other, state)
    assert len([warning for warning in warned if "Edited" in str(warning.message)]) == 1
    assert not hasattr(other.envs[0].unwrapped if vec_env_cls is DummyVecEnv else None, "added")
    other.close()


def test_where_nothing_differs_there_is_no_warning(recwarn):
    env = make_vec_env(Edited, 2, wrapper_class=ResumableEnv)
    env.reset()
    set_vec_env_state(env, written_and_read(vec_env_state(env)))
    assert [str(warning.message) for warning in recwarn if "put back" in str(warning.message)] == []


class Inheriting(Parent):
    """Gets data of its own in a step."""

    def act(self, action):
        type(self).n_steps += 1
        type(self).latest = action

    def look(self):
        return self.n_steps + 10 * getattr(type(self), "latest", 9)


def test_data_that_a_class_gets_in_a_step_is_put_back_and_leaves_no_trace():
    before = set(vars(Inheriting))
    env = started(Inheriting)
    assert env.prove_resumable() is None
    assert set(vars(Inheriting)) == before
    state = written_and_read(env.get_resume_state())
    expected = env.step(1)
    for _ in range(2):
        env.set_resume_state(state)
        assert set(vars(Inheriting)) == before
        np.testing.assert_equal(env.step(1), expected)
    del state["class_names"]
    # A state of an earlier version
    env.set_resume_state(state)
    assert "n_steps" in vars(Inheriting)
    del Inheriting.n_steps, Inheriting.latest


class Forgetful(nasty.Nasty):
    """Saves an attribute by a name that changes."""

    names = iter("abcdefgh")

    def get_resume_state(self):
        return dict.fromkeys(["x" * 100, next(self.names)])

    def set_resume_state(self, state):
        pass

    def act(self, action):
        pass

    def look(self):
        return 0.0


def test_a_state_with_another_key_names_this_key_alone():
    finding = started(Forgetful).prove_resumable()
    assert "lacks 'a', which was there before" in finding.text and "xxx" not in finding.text


def of_module(module):
    class Counter:
        def __init__(self):
            self.n = 0

        def __call__(self):
            self.n += 1
            return self.n

    Counter.__module__ = module
    return Counter()


@pytest.mark.parametrize("module", ["logging_env_tools", "pygame_snake", "pygame_snake.game", "logging"])
def test_modules_whose_names_begin_as_those_of_libraries_hold_state(module):
    env = started(lambda: Holding(of_module(module)))
    state = written_and_read(env.get_resume_state())
    assert [env.unwrapped.value() for _ in range(2)] == [1, 2]
    env.set_resume_state(state)
    assert env.unwrapped.value() == 1


@pytest.mark.parametrize("value", [logging.getLogger("any"), logging.StreamHandler(), of_module("pygame.font")])
def test_loggers_and_what_renders_are_no_state(value):
    assert "value" not in started(lambda: Holding(value)).get_resume_state()["layers"][0][1]


def read_only(array):
    array.flags.writeable = False
    return array


def test_arrays_that_are_read_only_stay_so():
    shared = read_only(np.arange(3.0))
    grid = np.zeros((2, 2))
    env = started(lambda: Holding(read_only(np.arange(4))))
    env.unwrapped.shared = [shared, shared, grid, read_only(grid[0])]
    env.set_resume_state(written_and_read(env.get_resume_state()))
    one, two, there, row = env.unwrapped.shared
    assert one is two and not one.flags.writeable and not env.unwrapped.value.flags.writeable
    assert there.flags.writeable and not row.flags.writeable and np.shares_memory(there, row)


def test_without_trust_an_array_that_is_read_only_stays_so():
    env, other = (
        started(lambda: Holding(read_only(np.arange(4)))),
        started(lambda: Holding(read_only(np.zeros(4, int)))),
    )
    left_out, error = other.set_resume_state_without_trust(written_and_read(env.get_resume_state()))
    assert (left_out, error) == ([], "")
    assert list(other.unwrapped.value) == [0, 1, 2, 3] and not other.unwrapped.value.flags.writeable


def test_without_trust_classes_are_compared_and_not_put_back():
    env, other = started(lambda: Holding(Hunt)), started(lambda: Holding(Hunt))
    state = written_and_read(env.get_resume_state())
    assert other.set_resume_state_without_trust(state) == ([], "")
    for saved in ("builtins:int", 5, None):
        state["layers"][0][1]["value"] = ("reference", saved)
        assert other.set_resume_state_without_trust(state) == (["Holding.value"], "")
    assert other.unwrapped.value is Hunt


class Chain:
    def __init__(self, link):
        self.link = link


@pytest.mark.parametrize("add", [lambda link: (link, 1), lambda link: {"before": link}, lambda link: [link]])
def test_what_is_nested_too_deep_is_an_error_that_names_it(add):
    link = 0
    for _ in range(5000):
        link = add(link)
    with pytest.raises(PlainStateError, match=r"Chain\.link is nested too deep"):
        object_state(Chain(link))
