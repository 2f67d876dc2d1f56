"""The report as one HTML page: figures inside, no script, no address outside, for phones and for dark screens too."""

from __future__ import annotations

import base64
import inspect
import platform
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import metadata
from typing import Any

from stable_baselines3 import PPO

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.ppo_plus import PPOPlus
from sb3_ppo_plus.untrusted.regular_files import open_regular_file
from sb3_ppo_plus.untrusted.strict_json import short
from sb3_ppo_plus.zoo.found_runs import FoundRun
from sb3_ppo_plus.zoo.hyperparams import ALGO, import_optional
from sb3_ppo_plus.zoo.learning_curves import Group
from sb3_ppo_plus.zoo.report_figures import STATISTIC_NAMES, Figure, caption

PACKAGES = ("sb3-ppo-plus", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "torch", "numpy")
#: What the RL Zoo takes out of config.yml itself, and what it does without it. n_timesteps is the runs' own
_ZOO_DEFAULTS: dict[str, Any] = {"n_envs": 1, "normalize": False, "frame_stack": 1, "env_wrapper": None}
_LEFT_OUT = ("n_timesteps", "callback")
MAX_SYSTEM_INFO = 10_000
MAX_VALUE_LENGTH = 200

# The page may load nothing: browsers hold it to this
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#f6f7f9;--card:#fff;--line:#d8dee4}
@media (prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a0a8b2;--paper:#121417;--card:#1b1e24;--line:#363b44}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:0 0 .75rem;overflow-wrap:anywhere}
.soft{color:var(--soft);font-size:.9rem}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem;margin:1rem 0}
.sides{display:grid;grid-template-columns:minmax(0,520px) minmax(0,1fr);gap:1.5rem;align-items:start}
img{display:block;width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.4rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td{overflow-wrap:anywhere}
th{font-weight:600;white-space:nowrap}td.number,th.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
code{font:.85em ui-monospace,monospace;background:var(--paper);border-radius:4px;padding:.1rem .3rem}
code{overflow-wrap:anywhere}
ul{padding-left:1.2rem;margin:.3rem 0;overflow-wrap:anywhere}summary{cursor:pointer}
@media (max-width:1060px){.sides{grid-template-columns:minmax(0,1fr)}}
@media (max-width:760px){
main{padding:.5rem}section{padding:.75rem}
thead{display:none}
tr{display:block;padding:.4rem 0;border-bottom:1px solid var(--line)}
td,td.number{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.15rem 0;text-align:right}
td.number{white-space:normal}
td::before{content:attr(data-name);color:var(--soft);text-align:left;flex:none}
}
"""


def make_page(
    groups: Sequence[Group],
    figures: Mapping[str, Figure],
    problems: Sequence[str],
    sources: Mapping[str, str],
    statistic: str,
) -> str:
    """Make the page. All that comes from log folders is escaped.

    :param groups: the curves
    :param figures: by environment
    :param problems: what was left out, and why
    :param sources: what the scores of an environment are
    :param statistic: a key of ``STATISTICS``
    """
    n_runs = sum(len(group.runs) for group in groups)
    sections = []
    for env_id, figure in figures.items():
        shown = [group for group in groups if group.env_id == env_id]
        sections.append(_environment(env_id, shown, figure, sources[env_id], statistic))
    head = f"{_count(n_runs, 'run')} of {_count(len({group.label for group in groups}), 'algorithm')} in "
    head += _count(len(figures), "environment")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Learning curves: {escape(', '.join(figures))}</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<h1>Learning curves</h1><p class="soft">{head}</p>\n'
        + "\n".join(sections)
        + _hyperparameters(groups)
        + _problems(problems)
        + _versions(groups)
        + "</main></body></html>\n"
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Make a table of cells that are HTML already. On a phone, each row is a block with the columns' names in it."""
    kinds = [' class="number"' if name in numbers else "" for name in header]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    body = []
    for row in rows:
        cells = zip(header, kinds, row, strict=True)
        body.append("".join(f'<td{kind} data-name="{escape(name)}">{cell}</td>' for name, kind, cell in cells))
    return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(body)}</tr></tbody></table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _final(group: Group) -> tuple[str, str]:
    """Return the last score, and its interval."""
    if group.interval is None:
        return _number(group.centre[-1]), "none (n=1)"
    return _number(group.centre[-1]), " to ".join(_number(end) for end in group.interval[:, -1])


def _environment(env_id: str, groups: Sequence[Group], figure: Figure, source: str, statistic: str) -> str:
    finals = [(group, *_final(group)) for group in groups]
    texts = [f"{group.label}: {score}, 95% interval {interval}" for group, score, interval in finals]
    alternative = escape(f"Learning curves in {env_id}. Final scores: {'; '.join(texts)}")
    light, dark = (base64.b64encode(png).decode() for png in (figure.light, figure.dark))
    picture = (
        f'<picture><source media="(prefers-color-scheme:dark)" srcset="data:image/png;base64,{dark}">'
        f'<img src="data:image/png;base64,{light}" alt="{alternative}"></picture>'
    )
    header = ("Algorithm", "Final score", "95% interval", "Seeds (n)", "Steps")
    rows = [
        (escape(group.label), score, interval, str(len(group.runs)), f"{group.timesteps[-1]:,.0f}")
        for group, score, interval in finals
    ]
    about = f"Final score: {STATISTIC_NAMES[statistic]} over seeds at the last common step; {source}."
    return (
        f'<section><h2>{escape(env_id)}</h2><div class="sides">{picture}<div>'
        f"{_table(header, rows, header[1:])}"
        f'<p class="soft">{escape(about)} {escape(caption(groups, statistic))}</p>{_runs(groups)}</div></div></section>'
    )


def _runs(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        for run, scores in zip(group.runs, group.scores, strict=True):
            seed = run.read("args.yml").get("seed", "unknown")
            rows.append((f"{escape(run.algo)}/{escape(run.folder.name)}", escape(short(seed)), _number(scores[-1])))
    header = ("Run", "Seed", "Final score")
    return f"<details><summary>Each run</summary>{_table(header, rows, header[2:])}</details>"


def changed_hyperparameters(run: FoundRun) -> dict[str, str]:
    """Return the settings in a run's config.yml that differ from SB3's defaults, as text.

    :param run: the run. Those of ppo_plus are compared with SB3's PPO, and what PPO lacks with PPOPlus
    """
    classes: list[type] = [PPO, PPOPlus] if run.algo == ALGO else []
    if run.algo != ALGO and run.algo in import_optional("rl_zoo3").ALGOS:
        classes = [import_optional("rl_zoo3").ALGOS[run.algo]]
    defaults = dict(_ZOO_DEFAULTS)
    for cls in reversed(classes):
        parameters = inspect.signature(cls).parameters.values()
        defaults |= {parameter.name: parameter.default for parameter in parameters}
    changed = {}
    for name, value in sorted(run.read("config.yml").items()):
        if name not in _LEFT_OUT and not (name in defaults and _is_equal(value, defaults[name])):
            text = str(value)
            changed[name] = text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}..."
    return changed


def _is_equal(value: object, default: object) -> bool:
    try:
        # YAML reads 3e-4 as text
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        return float(value) == default if is_number and isinstance(value, str) else bool(value == default)
    except ValueError:
        return False


def _hyperparameters(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        settings = [changed_hyperparameters(run) for run in group.runs]
        texts = []
        for name in sorted({name for setting in settings for name in setting}):
            values = list(dict.fromkeys(setting.get(name, "default") for setting in settings))
            texts.append(f"<code>{escape(name)}={escape(' or '.join(values))}</code>")
        has_config = any((run.parameters / "config.yml").is_file() for run in group.runs)
        nothing = "none" if has_config else "unknown: no config.yml"
        rows.append((escape(group.env_id), escape(group.label), f"<span>{' '.join(texts) or nothing}</span>"))
    table = _table(("Environment", "Algorithm", "Hyperparameters"), rows)
    note = '<p class="soft">"or": the runs of this algorithm differ.</p>' if " or " in table else ""
    return f"<section><h2>Hyperparameters that differ from SB3's defaults</h2>{table}{note}</section>"


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f"<section><h2>Left out</h2><ul>{items}</ul></section>"


def _versions(groups: Sequence[Group]) -> str:
    installed = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            installed.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    trained = sorted({line for group in groups for run in group.runs for line in trained_with(run)})
    report = ", ".join(f"{name} {version}" for name, version in installed)
    items = [f"<li>This report: {escape(report)}</li>"]
    if trained:
        items.append(f"<li>The runs, as their models say: {escape(', '.join(trained))}</li>")
    return f'<section><h2>Versions</h2><ul class="soft">{"".join(items)}</ul></section>'


def trained_with(run: FoundRun) -> list[str]:
    """Return the versions that a run's last model was saved with.

    :param run: the run
    :return: such as "PyTorch 2.13.0"; empty without a model
    """
    path = run.folder / f"{run.parameters.name}.zip"
    try:
        with open_regular_file(path) as file, zipfile.ZipFile(file) as archive, archive.open("system_info.txt") as info:
            lines = info.read(MAX_SYSTEM_INFO).decode(errors="replace").splitlines()
    except (OSError, KeyError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, UntrustedFileError):
        return []
    pairs = [line.removeprefix("- ").partition(": ")[::2] for line in lines]
    kept = ("Python", "Stable-Baselines3", "PyTorch", "Numpy", "Gymnasium")
    return [f"{name} {version[:40].strip()}" for name, version in pairs if name in kept]
