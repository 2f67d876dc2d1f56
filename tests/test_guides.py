"""README and guides: every block of code runs, and what they name exists."""

import ast
import re
import shlex
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
OTHER_PAGES = [ROOT / name for name in ("examples/benchmarks/SPEED.md", "examples/benchmarks/RETURNS.md")]
#: Commands that a page shows, and no test runs
SHOWN_COMMANDS: dict[str, list[str]] = {
    "tracking.md": ["tensorboard --logdir logs"],
}
POLICY_KWARGS = [
    (page.name, text) for page in PAGES for text in re.findall(r"`policy_kwargs=(\{.*?\})`", page.read_text())
]
#: What a message has in place of names and numbers
GAP = re.compile(r"\.\.\.|<[^>]*>")

VECTOR = spaces.Box(-1, 1, (24,), np.float32)
IMAGE = spaces.Box(0, 255, (7, 7, 3), np.uint8)


def name_of(page):
    return page.name


@pytest.mark.usefixtures("graphs_without_code")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_the_blocks_of_a_page_run_as_they_stand(page, tmp_path, monkeypatch):
    results = run_page(page, tmp_path, monkeypatch)
    assert not results or any(getattr(result.get("model"), "num_timesteps", 0) > 0 for result in results)
    if page.name == "zoo.md":
        assert (tmp_path / "logs/ppo_plus/CartPole-v1_1/CartPole-v1.zip").exists()
        assert (tmp_path / "logs/ppo_plus/Pendulum-v1_1/Pendulum-v1.zip").exists()
    if page.name == "runs_that_survive.md":
        # Started again, the first script takes its other branch
        resumed = run_page(page, tmp_path, monkeypatch)[0]["model"]
        assert resumed.last_checkpoint is not None and resumed.num_timesteps == results[0]["model"].num_timesteps


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_is_run_or_shows_what_cannot_be(page):
    assert {block.language for block in blocks_of(page)} <= SHOWN | {"python", "bash"}


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
    of_memory = "Lstm" if '"lstm_' in text else ""
    policy = f"{'MultiInput' if isinstance(space, spaces.Dict) else 'Mlp'}{of_memory}Policy"
    env = make_vec_env(lambda: ToyEnv(observation_space=space))
    PPOPlus(policy, env, n_steps=64, policy_kwargs=ast.literal_eval(text), device="cpu")


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
