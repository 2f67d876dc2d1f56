"""CONTRIBUTING.md and SECURITY.md name what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sb3_ppo_plus"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_map_has_a_line_for_each_folder_and_for_each_module_at_the_top():
    package = re.search(r"```\nsb3_ppo_plus/\n(.*?)^\w", CONTRIBUTING, re.DOTALL | re.MULTILINE)[1]
    named = {line.split()[0] for line in package.splitlines() if not line.startswith("    ")}
    modules = {path.name for path in PACKAGE.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert named == modules | folders


def test_the_files_that_the_map_names_in_a_folder_are_there():
    lines = re.findall(r"^  (\w+)/ .*\n((?:    .*\n)+)", CONTRIBUTING, re.MULTILINE)
    named = [(folder, name) for folder, text in lines for name in re.findall(r"^    (\w+) ", text, re.MULTILINE)]
    assert len(named) > 20
    assert [pair for pair in named if not (PACKAGE / pair[0] / f"{pair[1]}.py").exists()] == []


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_every_path_that_is_named_exists(name):
    paths = set(re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|md|yml|toml))`", (ROOT / name).read_text()))
    assert len(paths) > 5
    assert {path for path in paths if not ((ROOT / path).exists() or (PACKAGE / path).exists())} == set()


def test_every_command_of_make_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"make ([\w-]+)", makefile.partition("\n$(VENV)")[0].partition("help:")[2]))
    assert commands == set(re.findall(r"^\| `make ([\w-]+)", CONTRIBUTING, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(_?[A-Z][A-Z_]+)`", CONTRIBUTING))))
def test_every_table_that_is_named_exists(name):
    assert any(re.search(rf"^{name}\b", path.read_text(), re.MULTILINE) for path in PACKAGE.rglob("*.py"))


def test_contributing_is_short():
    assert len(CONTRIBUTING.splitlines()) < 200
