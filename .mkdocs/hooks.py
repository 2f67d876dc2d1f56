"""Adds to the guides what lies elsewhere in the repository, and turns links between these files into the site's."""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
GUIDES = "examples/guides/"
#: Pages of the repository, and where they are on the site
COPIED = {
    "examples/benchmarks/SPEED.md": "benchmarks/SPEED.md",
    "examples/benchmarks/RETURNS.md": "benchmarks/RETURNS.md",
    "examples/benchmarks/SCALING.md": "benchmarks/SCALING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
#: Files of which the site shows the text
SHOWN = {
    "zoo_hyperparams/ppo_plus.yml": "examples/ppo_plus.md",
    **{f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))},
}
#: What links may name, by its path in the repository
PLACES = {**COPIED, **SHOWN, "examples": "examples/index.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not guides."""
    for name, place in COPIED.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text(encoding="utf-8")))
    for name, place in SHOWN.items():
        files.append(File.generated(config, place, content=shown_file(name)))
    files.append(File.generated(config, "examples/index.md", content=list_of_examples()))
    for path in sorted((HERE / "api").glob("*.md")):
        files.append(File.generated(config, f"api/{path.name}", content=path.read_text(encoding="utf-8")))
    for name in ("site.css", "iframe-worker.js"):
        files.append(File.generated(config, name, content=(HERE / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    source = next((name for name, place in COPIED.items() if place == page.file.src_uri), GUIDES + page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda link: site_link(link[1], posixpath.dirname(source), here), markdown)


def site_link(target: str, folder: str, here: str) -> str:
    """Return a link as it must be on the site.

    :param target: the link, relative to ``folder``
    :param folder: the folder of the page in the repository
    :param here: the folder of the page on the site
    """
    if "://" in target:
        return target
    name = posixpath.normpath(posixpath.join(folder, target))
    place = name.removeprefix(GUIDES) if name.startswith(GUIDES) else PLACES.get(name)
    # What is no page of the site stays as it is, for the strict build to find
    return target if place is None else posixpath.relpath(place, here or ".")


def shown_file(name: str) -> str:
    """Make a page of a file's text."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return f"# {name}\n\n```{'python' if name.endswith('.py') else 'yaml'}\n{text}```\n"


def list_of_examples() -> str:
    """Make a page with the first line of each example."""
    lines = ["# Examples", "", "Short scripts to run and change: `python examples/drop_in.py`.", ""]
    lines += ["| file | what it shows |", "|---|---|"]
    for name, place in SHOWN.items():
        about = "Tuned arguments, as the zoo reads them."
        if name.endswith(".py"):
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
            about = (ast.get_docstring(tree) or "").partition("\n")[0]
        lines.append(f"| [{posixpath.basename(name)}]({posixpath.basename(place)}) | {about} |")
    return "\n".join([*lines, ""])
