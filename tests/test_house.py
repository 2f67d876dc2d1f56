"""The package's structure, read from its source: imports run one way, and nothing grows beyond a readable size."""

import ast
from pathlib import Path

import pytest

import sb3_ppo_plus

PACKAGE = Path(sb3_ppo_plus.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = Path(__file__).parent
TEST_FILES = sorted(TESTS.rglob("*.py"))
MODULES = {
    ".".join(("sb3_ppo_plus", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
MAY_IMPORT = {
    "zoo": {
        "ppo_plus",
        "export",
        "masking",
        "saving",
        "resuming",
        "env_states",
        "untrusted",
        "envs",
        "distributed",
        "ground",
    },
    "ppo_plus": {
        *("fast", "masking", "saving", "resuming", "rollout", "policies", "update", "envs", "distributed", "ground")
    },
    "fast": {"rollout", "policies", "update", "distributed", "ground"},
    "masking": {"policies", "envs", "ground"},
    "saving": {"policies", "untrusted", "ground"},
    "export": {"masking", "policies", "saving", "untrusted", "envs", "ground"},
    "resuming": {"env_states", "saving", "untrusted", "envs", "distributed", "ground"},
    "env_states": {"untrusted", "envs", "ground"},
    "rollout": {"policies", "envs", "distributed", "ground"},
    "policies": {"ground"},
    "update": {"distributed", "envs", "ground"},
    "envs": {"ground"},
    "distributed": {"envs", "ground"},
    "untrusted": {"ground"},
    "ground": set(),
}
"""What a package may import beside itself. Ground files are those directly in sb3_ppo_plus, but for ppo_plus."""

MAX_MODULES_AT_THE_TOP = 12
MAX_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 450, 400, 60


def folder_of(module):
    parts = module.split(".")[1:]
    if len(parts) > 1 or (PACKAGE / parts[0]).is_dir():
        return parts[0]
    return "ppo_plus" if parts == ["ppo_plus"] else "ground"


def imports_of(path):
    """Modules of ours that a file imports anywhere, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner
                elif node.module in MODULES:
                    yield node.module


IMPORTS = {module: sorted(set(imports_of(path))) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "sb3_ppo_plus"])
def test_imports_run_one_way(module):
    folder = folder_of(module)
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [name for name in IMPORTS[module] if name != "sb3_ppo_plus" and folder_of(name) not in allowed]
    assert not wrong, f"{folder} may import {sorted(allowed)}"
    assert "sb3_ppo_plus" not in IMPORTS[module], "a module imports from the one that defines, not from the package"


def test_no_module_imports_itself_by_way_of_others():
    finished = set()

    def visit(module, path):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in finished:
            for name in IMPORTS[module]:
                # A package's __init__ re-exports what its modules define
                if MODULES[name].name != "__init__.py":
                    visit(name, [*path, module])
            finished.add(module)

    for module in MODULES:
        visit(module, [])


def test_every_folder_is_known_and_used():
    assert {folder_of(module) for module in MODULES if module != "sb3_ppo_plus"} == MAY_IMPORT.keys()


def test_a_dozen_modules_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_MODULES_AT_THE_TOP


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_no_file_class_or_function_is_too_long(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            n_lines = node.end_lineno - node.lineno + 1
            assert n_lines <= (MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES), node.name


@pytest.mark.parametrize("path", TEST_FILES, ids=[str(path.relative_to(TESTS)) for path in TEST_FILES])
def test_no_file_of_tests_is_too_long(path):
    assert path.read_text().count("\n") <= MAX_LINES


def test_one_loop_collects_and_one_trains():
    names = [
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in ("collect_rollouts", "train")
    ]
    assert sorted(names) == ["collect_rollouts", "train"]
