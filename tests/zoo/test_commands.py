"""The commands, their help, and errors that name the nearest right command or flag."""

import argparse
import importlib.util
import subprocess
import sys

import pytest

from sb3_ppo_plus import zoo
from sb3_ppo_plus.zoo import commands
from sb3_ppo_plus.zoo.parser import ZooParser, argparse_with

COMMANDS = [*commands._RL_ZOO_COMMANDS, *commands._OWN_COMMANDS]


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        zoo.main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def help_of(*argv):
    command = [sys.executable, "-m", "sb3_ppo_plus.zoo", *argv, "--help"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_help_has_a_line_for_each_command():
    lines = help_of().splitlines()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 3


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ["--checkpoint-freq", "--no-checkpoint", "--optimize-hyperparameters", "--hyperparams"]),
        ("enjoy", ["--trust", "--load-best"]),
        ("resume", ["RUN_FOLDER", "--n-timesteps", "--trust", "--gym-packages"]),
    ],
)
def test_the_help_of_a_command_has_the_rl_zoos_flags_and_ours(command, flags):
    text = help_of(command)
    assert [flag for flag in flags if flag not in text] == []


def test_an_unknown_command_names_the_known_ones(capsys):
    message = error_of(["fly"], capsys)
    assert [name for name in COMMANDS if name not in message] == []


@pytest.mark.parametrize(("given", "meant"), [("trian", "train"), ("Enjoy", "enjoy"), ("resum", "resume")])
def test_an_unknown_command_names_the_nearest(given, meant, capsys):
    assert f"did you mean '{meant}'?" in error_of([given], capsys)


@pytest.mark.parametrize("argv", [[], ["--env", "CartPole-v1"]])
def test_the_command_comes_first(argv, capsys):
    assert "required: COMMAND" in error_of(argv, capsys)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["train", "--chekpoint-freq", "5"], "--checkpoint-freq"),
        (["train", "--evalfreq=5"], "--eval-freq"),
        (["train", "--algo", "ppo", "--n-timestep5", "5"], "--n-timesteps"),
        (["enjoy", "--load-bestt"], "--load-best"),
        (["enjoy", "--truts"], "--trust"),
        (["resume", "folder", "--n-timestep5", "3"], "--n-timesteps"),
        (["record", "--foldr", "x"], "--folder"),
        (["benchmark", "--log-dirr", "x"], "--log-dir"),
        (["report", "logs", "--ouput", "x"], "--output"),
        (["push", "-orga", "me", "--foldr", "x"], "--folder"),
        (["pull", "--env", "CartPole-v1", "--foldr", "x"], "--folder"),
    ],
)
def test_an_unknown_flag_names_the_nearest(argv, meant, capsys):
    assert f"did you mean '{meant}'?" in error_of(argv, capsys)


def test_the_rl_zoo_gets_all_of_argparse_with_our_parser():
    given = argparse_with(ZooParser)
    assert given.ArgumentParser is ZooParser and given.Namespace is argparse.Namespace
    assert argparse.ArgumentParser is not ZooParser


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_checkpoint_every_no_steps_is_an_error(value, capsys):
    assert "must be at least 1" in error_of(["train", "--checkpoint-freq", value], capsys)


def test_checkpoints_are_for_ppo_plus(capsys):
    message = error_of(["train", "--algo", "ppo", "--checkpoint-freq", "5"], capsys)
    assert "unrecognized arguments: --checkpoint-freq" in message


def test_tracking_without_its_package_names_the_extra(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert "it comes with the extra [track]" in error_of(["train", "--track"], capsys)


@pytest.mark.parametrize("command", ["enjoy", "record"])
@pytest.mark.parametrize("flags", [[], ["--load-last-checkpoint"]])
def test_a_run_without_a_model_names_resume(command, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs/ppo_plus/CartPole-v1_1/CartPole-v1").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"(?s)No .* found for ppo_plus on CartPole-v1.*`resume RUN_FOLDER`"):
        zoo.main([command, *flags])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("train", "resume")])
def test_commands_of_one_process_are_not_started_in_several(command, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{command} works in one process, start it without torchrun: there are 2"):
        zoo.main([command, "--env", "CartPole-v1"])
