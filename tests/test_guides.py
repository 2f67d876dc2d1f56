"""README and guides: every block of code runs, and what they name exists."""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from code_blocks import SHOWN, blocks_of, commands_of, is_run, pages, run_page
from environments import ToyEnv
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_plus import PPOPlus

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "examples" / "guides"
PAGES = pages()
#: Pages of figures, whose commands take hours
OTHER_PAGES = [ROOT / "examples/benchmarks" / name for name in ("SPEED.md", "RETURNS.md", "SCALING.md")]
#: Stands for the repository's address, of which there is none yet
PLACEHOLDER = "https://example.org/sb3-ppo-plus.git"
#: Commands that a page shows, and no test runs
SHOWN_COMMANDS: dict[str, list[str]] = {
    "README.md": [
        "torchrun --nproc-per-node 2 examples/torchrun.py",
        "torchrun --nproc-per-node 2 -m sb3_ppo_plus.zoo train --env CartPole-v1",
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        f"pip install 'sb3-ppo-plus[zoo] @ git+{PLACEHOLDER}'",
        "make demo",
        "make test",
    ],
    "clusters.md": [
        "torchrun --nproc-per-node 2 examples/torchrun.py",
        "torchrun --nproc-per-node 2 --max-restarts 3 examples/torchrun.py",
    ],
    "distributed.md": ["torchrun --nproc-per-node 2 train.py"],
    "tracking.md": ["tensorboard --logdir logs"],
    "zoo.md": [
        "python -m sb3_ppo_plus.zoo push --env CartPole-v1 -orga YOUR_NAME",
        "python -m sb3_ppo_plus.zoo pull --env CartPole-v1 -orga THEIR_NAME",
        "torchrun --nproc-per-node 2 -m sb3_ppo_plus.zoo train --env CartPole-v1",
        "torchrun --nproc-per-node 2 -m sb3_ppo_plus.zoo resume logs/ppo_plus/CartPole-v1_1 --n-timesteps 200000",
    ],
}
POLICY_KWARGS = [
    (page.name, text) for page in PAGES for text in re.findall(r"`policy_kwargs=(\{.*?\})`", page.read_text())
]
#: What a message has in place of names and numbers
GAP = re.compile(r"\.\.\.|<[^>]*>")

VECTOR = spaces.Box(-1, 1, (24,), np.float32)
IMAGE = spaces.Box(0, 255, (7, 7, 3), np.uint8)
PARAMETRISED = spaces.Dict({"kind": spaces.Discrete(2), "run": VECTOR, "kick": VECTOR})


#: Pages whose blocks take long: W&B starts a process of its own
SLOW = {"tracking.md"}
WITH_BLOCKS = [
    pytest.param(page, marks=pytest.mark.heavy if page.name in SLOW else ()) for page in PAGES if blocks_of(page)
]


def name_of(page):
    return page.name


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_the_blocks_of_a_page_run_as_they_stand(page, tmp_path, monkeypatch):
    results = run_page(page, tmp_path, monkeypatch)
    assert not results or any(getattr(result.get("model"), "num_timesteps", 0) > 0 for result in results)
    if page.name == "zoo.md":
        for name in ("CartPole-v1_1/CartPole-v1.zip", "CartPole-v1_2/CartPole-v1.zip", "Pendulum-v1_1/Pendulum-v1.zip"):
            assert (tmp_path / "logs/ppo_plus" / name).exists()
        assert list((tmp_path / "logs/ppo_plus/CartPole-v1_1/videos").glob("*.mp4"))
        assert (tmp_path / "benchmark.md").exists() and (tmp_path / "logs/report/report.html").exists()
    if page.name == "runs_that_survive.md":
        # Started again, the first script takes its other branch
        resumed = run_page(page, tmp_path, monkeypatch)[0]["model"]
        assert resumed.last_checkpoint is not None and resumed.num_timesteps == results[0]["model"].num_timesteps


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_is_run_or_shows_what_cannot_be(page):
    assert {block.language for block in blocks_of(page)} <= SHOWN | {"python", "bash"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_is_only_shown_names_what_exists(page):
    trees = [ast.parse(block.code) for block in blocks_of(page) if block.language == "py"]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("sb3_ppo_plus", "stable_baselines3")):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_commands_that_are_shown_and_not_run():
    shown: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "bash":
                commands = [shlex.join(words) for words in commands_of(block) if not is_run(words)]
                shown.setdefault(page.name, []).extend(commands)
    assert {name: commands for name, commands in shown.items() if commands} == SHOWN_COMMANDS


@pytest.mark.parametrize(("page", "text"), POLICY_KWARGS)
def test_the_policy_kwargs_that_are_named_build_a_policy(page, text):
    space = VECTOR
    if "impala_cnn" in text:
        space = spaces.Dict({"image": IMAGE, "vector": VECTOR}) if '"image"' in text else IMAGE
    if "actor_keys" in text:
        keys = ast.literal_eval(text)
        space = spaces.Dict(dict.fromkeys(keys["actor_keys"] + keys["critic_keys"], VECTOR))
    of_memory = "Lstm" if '"lstm_' in text else ""
    policy = f"{'MultiInput' if isinstance(space, spaces.Dict) else 'Mlp'}{of_memory}Policy"
    actions = {"action_space": PARAMETRISED} if "used_parts" in text else {}
    env = make_vec_env(lambda: ToyEnv(observation_space=space, **actions))
    PPOPlus(policy, env, n_steps=64, policy_kwargs=ast.literal_eval(text), device="cpu")


def test_the_placeholder_of_the_address_is_named_as_one_in_one_place():
    readme = (ROOT / "README.md").read_text()
    explained, _, after = readme.partition(f"`{PLACEHOLDER}` is a placeholder")
    assert PLACEHOLDER not in explained and after.count(PLACEHOLDER) == 1
    others = "".join(page.read_text() for page in PAGES if page.name != "README.md")
    assert "example.org" not in others and "pip install sb3-ppo-plus" not in others + readme


def test_the_extras_of_the_readme_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (sentence,) = re.findall(r"Extras: (.*?)\.\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert set(re.findall(r"`\[(\w+)\]`", sentence)) == set(extras)


def test_the_readme_is_one_page_and_its_figure_comes_first():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("![") for line in lines[:20])


def test_the_figures_of_the_readme_are_those_of_the_pages():
    readme = (ROOT / "README.md").read_text()
    rows = [line for page in OTHER_PAGES for line in page.read_text().splitlines() if line.startswith("|")]
    for case, name, steps in (
        ("CartPole, 8 envs", "SB3", "2,436"),
        ("CartPole, 8 envs", "PPOPlus", "6,482 (2.7x)"),
        ("CartPole, 8 envs", "PPOPlus compiled", "19,814 (8.1x)"),
        ("Pendulum, 4 envs", "SB3", "2,308"),
        ("Pendulum, 4 envs", "PPOPlus", "5,589 (2.4x)"),
        ("Pendulum, 4 envs", "PPOPlus compiled", "13,831 (6.0x)"),
        ("CartPole with LSTM, 8 envs", "RecurrentPPO", "96"),
        ("CartPole with LSTM, 8 envs", "PPOPlus", "645 (6.7x)"),
    ):
        (cells,) = [row.split(" | ") for row in rows if row.startswith(f"| {case} | {name} |")]
        ratio = f" ({float(cells[7]):.1f}x)" if "(" in steps else ""
        assert f"{int(cells[4]):,}{ratio}" == steps and f"| {steps} |" in readme
    for env, figures in (
        ("CartPole-v1", "99,328 | 500"),
        ("Pendulum-v1, gSDE", "98,304 | -152.2"),
        ("CartPole without velocities (CartPoleNoVel-v1), LSTM", "199,680 | 500"),
        ("LunarLander-v3", "999,424 | 260.3"),
    ):
        steps, mean = figures.split(" | ")
        assert any(row.startswith(f"| {env} |") and figures in row for row in rows), env
        assert re.search(rf"\| {re.escape(mean)} (of 500 )?\({steps} steps", readme), env


def test_policy_kwargs_are_named():
    assert len(POLICY_KWARGS) >= 6


def anchor_of(heading):
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def anchors_of(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "page", [*PAGES, *OTHER_PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))], ids=name_of
)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists() and path.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors_of(path), target


def test_the_index_names_every_guide():
    named = set(re.findall(r"\]\((\w+\.md)\)", (GUIDES / "index.md").read_text()))
    assert named == {path.name for path in GUIDES.glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=name_of)
def test_every_script_that_is_named_exists(page):
    for name in re.findall(r"\b(?:examples|zoo_hyperparams)/[\w./]+\.(?:py|yml|md)", page.read_text()):
        assert (ROOT / name).exists(), name


def messages_of(page):
    """The messages in the first column of a page's tables, as lists of what lies between the gaps."""
    for cell in re.findall(r"^\| (.+?) \|", page.read_text(), re.MULTILINE):
        for code in re.findall(r"`([^`]+)`", cell):
            if " " in code:
                yield [part.strip() for part in GAP.split(code) if part.strip()]


def test_troubleshooting_quotes_messages_that_the_code_has():
    sources = [path.read_text() for path in (ROOT / "sb3_ppo_plus").rglob("*.py")]
    # Of an f-string, without the quotes and breaks between its lines
    code = "\n".join(re.sub(r"\"\s*\n\s*f?\"", "", source).replace("\\'", "'") for source in sources)
    messages = list(messages_of(GUIDES / "troubleshooting.md"))
    assert len(messages) > 25
    of_sb3 = ["The environment is of type"]
    assert [parts for parts in messages if parts != of_sb3 and not all(part in code for part in parts)] == []
