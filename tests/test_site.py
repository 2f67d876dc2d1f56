"""The site of `make site`: strictly built, links whole, all public names, and nothing that is loaded from elsewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import sb3_ppo_plus

ROOT = Path(__file__).resolve().parents[1]
#: What a browser fetches by itself, and in which attribute of which element it stands
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "srcset"), ("link", "href")}
#: Other names of classes that the page of policies explains
ALIASES = {"MlpPolicy", "CnnPolicy", "MultiInputPolicy"}

pytestmark = pytest.mark.heavy


class Page(HTMLParser):
    """The ids, the links and what is loaded of a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.loaded, self.classes = path, set(), [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        self.classes.update((values.get("class") or "").split())
        for name, value in attributes:
            if (tag, name) in LOADED:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs/mkdocs.yml", "-d", str(folder)]
    # The package of this checkout is read, not one that is installed
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """The pages by their paths, but for the one that servers show in place of a missing page."""
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_guide_and_example_is_a_page(site, pages):
    guides = {f"{path.stem}.html" for path in (ROOT / "examples/guides").glob("*.md")}
    examples = {f"examples/{path.stem}.html" for path in (ROOT / "examples").glob("*.py")}
    assert guides | examples <= {str(path.relative_to(site)) for path in pages}


def test_every_link_leads_somewhere(site, pages):
    n_links = 0
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "data") or link.startswith("javascript:"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file() and target.is_relative_to(site), f"{path.name}: {link}"
            if target.suffix == ".html" and parts.fragment and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
            n_links += 1
    assert n_links > 500


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loaded = {link for page in pages.values() for link in page.loaded}
    assert len(loaded) > 5 and [link for link in loaded if "//" in link] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert "url(http" not in styles and "url(//" not in styles and "@import" not in styles
    # The theme's script fetches Mermaid where a page has a diagram
    assert all("mermaid" not in page.classes for page in pages.values())


def test_every_public_name_is_documented(pages):
    ids = set.union(*(page.ids for page in pages.values()))
    missing = {name for name in sb3_ppo_plus.__all__ if f"sb3_ppo_plus.{name}" not in ids}
    assert missing == ALIASES
    text = (ROOT / ".mkdocs/api/policies.md").read_text()
    assert all(f"`{name}`" in text for name in ALIASES)


def test_no_role_of_a_docstring_is_left(pages):
    for path in pages:
        if path.parent.name == "api":
            text = path.read_text(encoding="utf-8")
            assert ":class:" not in text and ":meth:" not in text and ":func:" not in text, path.name
