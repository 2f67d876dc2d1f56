"""Hyperparameters on the command line need no quotes inside quotes."""

import argparse

import pytest
from torch import nn

from sb3_ppo_plus.zoo.arguments import StorePlainDict, ZooParser


def stored(*pairs):
    parser = ZooParser()
    parser.add_argument("-params", "--hyperparams", nargs="+", action=StorePlainDict)
    return parser.parse_args(["-params", *pairs]).hyperparams


@pytest.mark.parametrize(
    "text", ["cos_1e-3", "lin_3e-4", "lin_0.001", "exp_3e-4_1e-5", "warmup_cos_1e-3", "MlpPolicy", "bf16"]
)
def test_a_word_is_a_text(text):
    assert stored(f"key:{text}") == {"key": text} == stored(f"key:'{text}'")


def test_a_dotted_name_is_a_text():
    assert stored("env_wrapper:sb3_ppo_plus.ResumableEnv") == {"env_wrapper": "sb3_ppo_plus.ResumableEnv"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        ("True", True),
        ("None", None),
        ("'lin_3e-4'", "lin_3e-4"),
        ("[8, 8]", [8, 8]),
        ("dict(net_arch=[8], activation_fn=nn.ReLU)", {"net_arch": [8], "activation_fn": nn.ReLU}),
        ("nn.Tanh", nn.Tanh),
        ("{'a': 'b:c'}", {"a": "b:c"}),
        ("int(1e3)", 1000),
    ],
)
def test_python_stays_python(text, value):
    assert stored(f"key:{text}") == {"key": value}


def test_several_pairs_are_one_dict():
    assert stored("a:1", "b:lin_1", "c:True") == {"a": 1, "b": "lin_1", "c": True}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("normalize:true", "write normalize:True, as in Python"),
        ("clip_range_vf:none", "write clip_range_vf:None, as in Python"),
        ("gamma", "must be key:value, got 'gamma'"),
        ("policy_kwargs:dict(action_dist=beta)", "the value must be Python or one word, and is NameError"),
        ("gamma:0..9", "the value must be Python or one word, and is SyntaxError"),
    ],
)
def test_what_is_neither_is_an_error_that_names_it(pair, message, capsys):
    with pytest.raises(SystemExit):
        stored("n_envs:1", pair)
    assert message in capsys.readouterr().err


def test_nothing_is_evaluated_twice(monkeypatch):
    import rl_zoo3.utils

    calls = []
    monkeypatch.setattr(rl_zoo3.utils, "count", lambda: calls.append(1), raising=False)
    stored("key:count()")
    assert calls == [1]


def test_known_flags_are_parsed_as_by_argparse():
    parser = ZooParser()
    parser.add_argument("--flag", type=int)
    assert parser.parse_args(["--fl", "3"]) == argparse.Namespace(flag=3)
