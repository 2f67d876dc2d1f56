"""No environment resumes wrongly in silence: its state is restored, or an error says that it is not."""

import importlib.util
from pathlib import Path

import nasty_callables
import nasty_classes
import nasty_environments
import numpy as np
import pytest
from states import written_and_read

from sb3_ppo_plus import ResumableEnv
from sb3_ppo_plus.errors import PlainStateError

MODULES = {}
for module in (nasty_environments, nasty_callables, nasty_classes):
    for name, value in vars(module).items():
        if hasattr(value, "outcome") and value is not nasty_environments.Nasty:
            MODULES.setdefault(name, module)
OUTCOMES = {name: getattr(module, name).outcome for name, module in MODULES.items()}


def made(name):
    """An environment as a new process would make it: with constants and classes of its own."""
    spec = importlib.util.spec_from_file_location("fresh", Path(MODULES[name].__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ResumableEnv(getattr(module, name)())


def played(env, actions):
    seen = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


def test_there_are_many():
    assert len(OUTCOMES) >= 30


@pytest.mark.parametrize("name, outcome", OUTCOMES.items())
def test_it_is_restored_or_refused_before_the_first_step(name, outcome):
    env = made(name)
    env.reset(seed=3)
    if outcome == "refused":
        with pytest.raises(PlainStateError, match=r"get_resume_state\(\).*constant="):
            env.get_resume_state()
        return
    finding = env.prove_resumable()
    assert (finding is not None and finding.is_error) == (outcome == "disproved"), finding


@pytest.mark.parametrize("n_before", [0, 1, 37])
@pytest.mark.parametrize("name", [name for name in OUTCOMES if OUTCOMES[name] == "restored"])
def test_it_goes_on_in_another_process_as_the_saved_one_would(name, n_before):
    random = np.random.default_rng(n_before)
    env = made(name)
    env.reset(seed=3)
    np.random.seed(0)
    played(env, random.integers(3, size=n_before))
    state = written_and_read(env.get_resume_state())
    actions = random.integers(3, size=200)
    expected = played(env, actions)
    other = made(name)
    other.reset(seed=4)
    for _ in range(2):
        other.set_resume_state(state)
        np.testing.assert_equal(played(other, actions), expected)


def test_a_class_gets_the_member_of_an_enum_that_it_had_which_is_told():
    env, other = made("ClassEnum"), made("ClassEnum")
    env.reset(seed=3)
    env.step(0)
    other.reset(seed=3)
    other.set_resume_state(written_and_read(env.get_resume_state()))
    assert other.unwrapped.phase is type(other.unwrapped.phase).FLEE
    (difference,) = other.resume_differences()
    assert "ClassEnum.phase was <Phase.HUNT: 1>, and is <Phase.FLEE: 2> again" in difference
