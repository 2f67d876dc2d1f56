"""CONTRIBUTING.md and SECURITY.md name what exists."""

import re
from pathlib import Path

import pytest
from test_house import MAY_IMPORT

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sb3_ppo_plus"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_map_has_a_line_for_each_folder_and_for_each_module_at_the_top():
    package = re.search(r"```\nsb3_ppo_plus/\n(.*?)^\w", CONTRIBUTING, re.DOTALL | re.MULTILINE)[1]
    named = {line.split()[0] for line in package.splitlines() if not line.startswith("    ")}
    modules = {path.name for path in PACKAGE.glob("*.py")}
    folders = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.glob("*/**/__init__.py")}
    assert named == modules | folders


def test_the_map_names_each_module_of_each_folder_once():
    named = []
    for folder, text in re.findall(r"^  (\w+(?:/\w+)?)/ .*\n((?:    .*\n)+)", CONTRIBUTING, re.MULTILINE):
        for names in re.findall(r"^    (\w+(?:, \w+)*)  +\S", text, re.MULTILINE):
            named += [f"{folder}/{name}.py" for name in names.split(", ")]
    modules = [str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("*/**/*.py") if not path.name.startswith("__")]
    assert sorted(named) == sorted(modules)


def test_the_table_of_imports_is_the_one_that_is_tested():
    table = CONTRIBUTING.partition("| folder | may import |\n|---|---|\n")[2].partition("\n\n")[0]
    allowed = {}
    for line in table.splitlines():
        folders, imports = re.fullmatch(r"\| (.+) \| (.+) \|", line).groups()
        for folder in folders.split(", "):
            assert folder not in allowed
            allowed[folder] = set() if imports == "nothing" else set(imports.split(", "))
    assert allowed == MAY_IMPORT


def test_every_name_of_code_exists():
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    names = {name.split(".")[-1] for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\([^`]*\))?`", CONTRIBUTING)}
    of_files_and_others = {"py", "md", "yml", "toml", "heavy", "pypi", "Z"}
    assert len(names) > 50
    assert {name for name in names - of_files_and_others if not re.search(rf"\b{name}\b", source)} == set()


def test_the_release_replaces_the_placeholder_in_the_security_policy():
    (placeholder,) = re.findall(r"\*\*(\S+@\S+)\*\* \(a placeholder", (ROOT / "SECURITY.md").read_text())
    assert placeholder in (ROOT / ".github" / "RELEASING.md").read_text()


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
