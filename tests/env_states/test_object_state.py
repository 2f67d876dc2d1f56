"""What the states of objects say of their classes, and of what the code has made in another way."""

import gymnasium as gym
import nasty_environments as nasty
import pytest

from sb3_ppo_plus import ResumableEnv


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
