"""Runs the blocks of code of a Markdown page, in their order, as a reader would who copies each into a file or a shell.

The blocks of a page share a folder, and nothing else. What is cut short, and what is not run, is in the tables here.
"""

import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from stable_baselines3 import PPO

#: Languages of blocks that are not run: output, fragments of files, differences, "py": Python for a simulator
SHOWN = {"text", "diff", "yaml", "bibtex", "py"}

#: The number of timesteps of a learn, in place of which there is 1: one rollout is collected, and one update done
TIMESTEPS = re.compile(r"(?<=\.learn\()[\d_]+")
#: Steps of each environment in a rollout, and epochs of an update, are at most so many
MAX_STEPS, MAX_EPOCHS = 64, 1

#: Commands of programs that are not run: they install, serve, start several processes, or need the network
NOT_RUN = (
    *("pip install", "make", "tensorboard", "torchrun"),
    *("python -m sb3_ppo_plus.zoo push", "python -m sb3_ppo_plus.zoo pull"),
)

#: Flags that are put after the user's for each command of the zoo, where the last one counts: little is trained
ZOO_FLAGS = {
    "train": ["--n-timesteps", "64", "--eval-freq", "-1", "--num-threads", "1", "--verbose", "0"],
    "enjoy": ["--n-timesteps", "20", "--no-render", "--num-threads", "1"],
    "resume": ["--n-timesteps", "600"],
    "record": ["--n-timesteps", "20"],
    "benchmark": ["--n-timesteps", "300", "--num-threads", "1"],
}
#: Further ones for a search: two trials of one evaluation each
SEARCH_FLAGS = ["--n-trials", "2", "--n-startup-trials", "1", "--n-evaluations", "1", "--eval-episodes", "1"]


@dataclass(frozen=True)
class Block:
    """A block of code, and the line of the page where it begins."""

    language: str
    code: str
    line: int


def blocks_of(page):
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [Block(fence[1], fence[2], text.count("\n", 0, fence.start()) + 2) for fence in fences]
    assert text.count("```") == 2 * len(blocks), f"{page.name} has a fence that was not understood"
    return blocks


def commands_of(block):
    """The commands of a block of shell, as lists of words; comments are left out, a backslash joins lines."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words for words in commands if words]


def is_run(words):
    """Whether a command is run, or only shown."""
    return not any(words[: len(shown.split())] == shown.split() for shown in NOT_RUN)


def run_python(block, folder, page):
    """Run a block of Python as a script, with little training; return its globals."""
    code = TIMESTEPS.sub("1", block.code)
    script = folder / f"{page.stem}_line_{block.line}.py"
    script.write_text(code, encoding="utf-8")
    return runpy.run_path(str(script), run_name="__main__")


def run_command(words, monkeypatch):
    """Run `python -m MODULE ...`, or `export NAME=VALUE`, in this process, whose imports are done already."""
    if words[0] == "export":
        name, _, value = words[1].partition("=")
        monkeypatch.setenv(name, value)
        # It has read the variables of a process that, for the reader, is another one
        end_wandb()
        return
    assert words[:2] == ["python", "-m"], f"no rule for {shlex.join(words)}"
    arguments = list(words[3:])
    if words[2] == "sb3_ppo_plus.zoo":
        arguments += ZOO_FLAGS.get(arguments[0], [])
        if "-optimize" in arguments or "--optimize-hyperparameters" in arguments:
            arguments += SEARCH_FLAGS
    monkeypatch.setattr(sys, "argv", [words[2], *arguments])
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code in (None, 0), f"{shlex.join(words)}: {stop.code}"


def end_wandb():
    """End the service of Weights & Biases. Processes that are started later would use it, and find their runs in it."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    assert "WANDB_SERVICE" not in os.environ


def shorten_rollouts(monkeypatch):
    """Have SB3's PPO, and so PPOPlus, collect and train little."""
    set_up = PPO._setup_model

    def set_up_with_little(self):
        self.n_steps, self.n_epochs = min(self.n_steps, MAX_STEPS), min(self.n_epochs, MAX_EPOCHS)
        set_up(self)

    monkeypatch.setattr(PPO, "_setup_model", set_up_with_little)


def run_page(page, folder, monkeypatch):
    """Run all blocks of a page in a folder; return the globals of each block of Python."""
    monkeypatch.chdir(folder)
    shorten_rollouts(monkeypatch)
    try:
        return [result for block in blocks_of(page) for result in run_block(block, folder, page, monkeypatch)]
    finally:
        end_wandb()


def run_block(block, folder, page, monkeypatch):
    """Run a block; return the globals of a block of Python, as a list of one."""
    if block.language == "python":
        return [run_python(block, folder, page)]
    if block.language == "bash":
        for words in commands_of(block):
            if is_run(words):
                run_command(words, monkeypatch)
    return []


def pages():
    """README and guides."""
    root = Path(__file__).resolve().parents[1]
    return [root / "README.md", *sorted((root / "examples" / "guides").glob("*.md"))]
