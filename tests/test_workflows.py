"""The workflows of GitHub and the hooks of pre-commit: valid, with few rights, and about the versions we name."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import sb3_ppo_plus

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def check_schema(schema, *paths):
    """Check YAML files against a JSON schema of SchemaStore that the package check-jsonschema holds."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *paths]
    return subprocess.run(command, capture_output=True, text=True)


def read(path):
    # YAML 1.1 reads the key "on" as true
    return yaml.safe_load(path.read_text())


def jobs():
    return [(path, job) for path in WORKFLOWS for job in read(path)["jobs"].values()]


def steps():
    return [step for _, job in jobs() for step in job["steps"]]


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_workflows_have_the_form_that_github_asks_for(schema):
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "publish.yml", "site.yml"]
    checked = check_schema(schema, *WORKFLOWS)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_schema_finds_a_misspelt_key(tmp_path):
    text = WORKFLOWS[0].read_text()
    (tmp_path / "ci.yml").write_text(text.replace("runs-on:", "runs_on:"))
    assert text.count("runs-on:") > 0 and check_schema("vendor.github-workflows", tmp_path / "ci.yml").returncode == 1


def test_actions_are_pinned_to_commits_with_their_version_beside_them():
    lines = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "uses:" in line]
    assert len(lines) == sum("uses" in step for step in steps())
    for line in lines:
        assert re.search(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_each_action_has_one_version():
    versions = {}
    for step in steps():
        if "uses" in step:
            name, _, commit = step["uses"].partition("@")
            versions.setdefault(name, set()).add(commit)
    assert [name for name, commits in versions.items() if len(commits) > 1] == []


def test_only_publishing_may_write_and_only_pages_and_an_identity_token():
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}, path.name
    with_rights = [
        (path.name, job["permissions"], job["environment"]["name"]) for path, job in jobs() if "permissions" in job
    ]
    assert with_rights == [
        ("publish.yml", {"id-token": "write"}, "pypi"),
        ("site.yml", {"pages": "write", "id-token": "write"}, "github-pages"),
    ]


def test_the_site_that_is_published_is_the_one_that_was_built_strictly():
    jobs = read(ROOT / ".github/workflows/site.yml")["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert any(step.get("run", "").startswith("make site") for step in jobs["build"]["steps"])
    assert "mkdocs build --strict" in MAKEFILE


def test_what_is_published_was_tested_and_built_first():
    publishing = read(ROOT / ".github/workflows/publish.yml")["jobs"]
    assert set(publishing["pypi"]["needs"]) == {"test", "build"}
    assert any(step.get("run", "").startswith("make test-all") for step in publishing["test"]["steps"])


@pytest.mark.parametrize(("address", "status"), [("security@example.org", 1), ("security@sb3-ppo-plus.dev", 0)])
def test_a_release_with_the_placeholder_of_the_address_is_stopped(tmp_path, address, status):
    text = (ROOT / "SECURITY.md").read_text()
    (tmp_path / "SECURITY.md").write_text(re.sub(r"\*\*\S+@\S+\*\*", f"**{address}**", text))
    building = read(ROOT / ".github/workflows/publish.yml")["jobs"]["build"]["steps"]
    (script,) = [step["run"] for step in building if "SECURITY.md" in step.get("run", "")]
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True).returncode == status


def test_no_checkout_leaves_its_token_behind():
    checkouts = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_no_expression_is_pasted_into_a_shell_script():
    for step in steps():
        assert "${{" not in step.get("run", ""), step["run"]


def test_runs_of_one_kind_are_in_a_concurrency_group():
    for path in WORKFLOWS:
        assert {"group", "cancel-in-progress"} == read(path)["concurrency"].keys()


def matrix():
    """The combinations of the tests' matrix, as GitHub makes them."""
    given = dict(read(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"])
    includes = given.pop("include")
    combinations = [
        {"python": python, "versions": versions} for python in given["python"] for versions in given["versions"]
    ]
    for combination in combinations:
        original = dict(combination)
        for include in includes:
            if all(include.get(name, value) == value for name, value in original.items()):
                combination.update(include)
    return combinations


def test_the_pythons_of_the_classifiers_are_tested():
    prefix = "Programming Language :: Python :: 3."
    declared = {
        text.removeprefix("Programming Language :: Python :: ")
        for text in PROJECT["classifiers"]
        if text.startswith(prefix)
    }
    assert declared == {combination["python"] for combination in matrix()}
    oldest = min(declared, key=lambda version: int(version.partition(".")[2]))
    assert PROJECT["requires-python"] == f">={oldest}"


def test_the_oldest_versions_are_the_lower_bounds_of_the_project():
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", text).groups() for text in PROJECT["dependencies"])
    for combination in matrix():
        assert {"torch", "gymnasium", "numpy"} <= combination.keys()
        for name in ("torch", "gymnasium", "numpy"):
            version = combination[name].partition("==")[2]
            if combination["versions"] == "newest":
                assert version == "", "the newest that is allowed has no number"
            elif (name, combination["python"]) != ("numpy", "3.13"):
                # For Python 3.13 there are no wheels of the oldest NumPy
                assert re.fullmatch(rf"{re.escape(bounds[name])}(\.0)*", version), combination


def test_the_tests_install_every_extra():
    (install,) = (step["run"] for step in steps() if step.get("name") == "Install")
    assert set(re.search(r'-e "\.\[([\w,]+)\]"', install)[1].split(",")) == set(PROJECT["optional-dependencies"])


def test_commands_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    called = [name for step in steps() for name in re.findall(r"\bmake ((?:[a-z][\w-]* ?)+)", step.get("run", ""))]
    assert called and {name for names in called for name in names.split()} <= targets


def test_the_hooks_of_pre_commit_are_the_commands_of_make():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format", "mypy"]
    for hook in repository["hooks"]:
        assert hook["entry"].replace(" --force-exclude", "") in MAKEFILE


def test_the_package_has_one_version():
    assert sb3_ppo_plus.__version__ == PROJECT["version"]
