"""What classes hold is put back in place, changes nothing else, and a proof leaves no trace of it."""

import nasty_classes
import pytest
from environments import ToyEnv
from nasty_environments import Nasty
from states import written_and_read
from test_nasty_environments import made, played

from sb3_ppo_plus import ResumableEnv

NAMES = [name for name in vars(nasty_classes) if hasattr(getattr(nasty_classes, name), "outcome") and name != "Nasty"]


@pytest.mark.parametrize("name", NAMES)
def test_the_proof_leaves_no_trace_in_classes(name):
    env = made(name)
    env.reset(seed=3)
    played(env, [1, 2, 1])
    before = env.unwrapped.look()
    env.prove_resumable()
    assert env.unwrapped.look() == before


def test_what_is_put_back_into_a_class_is_told_but_methods_that_count():
    def told(name):
        env, other = made(name), made(name)
        for each in (env, other):
            each.reset(seed=3)
        played(env, [2])
        other.set_resume_state(written_and_read(env.get_resume_state()))
        return other.resume_differences()

    assert told("HeldClass") == ["HeldClass.config.total was 0, and is 2 again, as it was saved"]
    assert told("DecoratedMethod") == told("MutableDefault") == told("CallableOfClass") == []


def with_method_replaced():
    class Replacing(Nasty):
        def act(self, action):
            type(self).look = lambda self: 1

        def look(self):
            return 0

    env = ResumableEnv(Replacing())
    env.reset(seed=0)
    return env


def test_a_method_that_was_replaced_is_told():
    env, other = with_method_replaced(), with_method_replaced()
    env.step(0)
    other.set_resume_state(env.get_resume_state())
    assert other.resume_differences() == ["Replacing.look is the function look, the saved one was <lambda>"]


SHARED = {}


def remembering(store):
    def decorate(method):
        def with_store(self, *arguments):
            store["calls"] = 0
            return method(self, *arguments)

        return with_store

    return decorate


class Remembers(ToyEnv):
    @remembering(SHARED)
    def step(self, action):
        return super().step(action)


def test_what_a_method_shares_with_its_module_stays_shared_where_it_is_equal():
    env = ResumableEnv(Remembers())
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.set_resume_state(env.get_resume_state())
    SHARED.clear()
    env.step(env.action_space.sample())
    assert SHARED == {"calls": 0}


def test_a_method_that_the_code_no_longer_has_is_told_and_no_error():
    env, other = made("DecoratedMethod"), made("DecoratedMethod")
    env.reset(seed=3)
    other.reset(seed=3)
    state = env.get_resume_state()
    type(other.unwrapped).act = property(lambda self: lambda action: None)
    other.set_resume_state(state)
    assert any("DecoratedMethod.act" in text for text in other.resume_differences())


def test_a_member_that_an_enum_lacks_is_an_error_that_names_the_others():
    env, other = made("EnumAttribute"), made("EnumAttribute")
    for each in (env, other):
        each.reset(seed=3)
    state = env.get_resume_state()
    state["table"] = [["enum", entry[1], "MEDIUM"] if entry[0] == "enum" else entry for entry in state["table"]]
    with pytest.raises(ValueError, match=r"mode was MEDIUM of the Enum fresh:Mode, which lacks it; there: .*EASY"):
        other.set_resume_state(state)


def test_without_trust_nothing_is_put_into_classes():
    env, other = made("Namespace"), made("Namespace")
    for each in (env, other):
        each.reset(seed=3)
    played(env, [2])
    left_out, error = other.set_resume_state_without_trust(written_and_read(env.get_resume_state()))
    assert error == "" and "Namespace.Namespace.Curriculum.total" in left_out
    assert other.unwrapped.look() == 0
