"""Figures of the report, drawn by matplotlib for light and for dark pages."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sb3_ppo_plus.zoo.hyperparams import import_optional
from sb3_ppo_plus.zoo.learning_curves import CONFIDENCE, N_RESAMPLES, Group

#: Inches and dots per inch. Text stays readable where a phone shows the figure at two thirds of its size
SIZE, DPI, FONT_SIZE = (5.2, 3.9), 200, 10.5
# Hues that people who see few colours can tell apart, after Okabe and Ito: darker ones on white, lighter ones on black
_LIGHT_COLORS = ("#0072B2", "#D55E00", "#007A5A", "#AA3377", "#8A6A00", "#555555")
_DARK_COLORS = ("#56B4E9", "#FF9E4A", "#3FD0A4", "#E58FC3", "#F0D442", "#BBBBBB")
_LINES = ("-", "--", "-.", ":")
_WHAT = {"results": "Return", "ep_lengths": "Length of episodes", "successes": "Success rate"}
_WHERE = {"evaluations": "of evaluations", "training": "of the last 100 training episodes"}
STATISTIC_NAMES = {"mean": "mean", "iqm": "interquartile mean", "median": "median"}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure as PNG.

    :param light: for white paper and light pages
    :param dark: for dark pages
    """

    light: bytes
    dark: bytes


def caption(groups: Sequence[Group], statistic: str) -> str:
    """Say what line and band are, in two short lines.

    :param groups: the groups of one figure
    :param statistic: a key of ``STATISTICS``
    """
    line = f"Line: {STATISTIC_NAMES[statistic]} over n seeds."
    if all(group.interval is None for group in groups):
        return f"{line}\nOne seed (n=1) has no interval."
    band = f"Band: {CONFIDENCE:.0%} stratified bootstrap interval over seeds ({N_RESAMPLES} resamples)."
    alone = " n=1: no interval." if any(group.interval is None for group in groups) else ""
    return f"{line}{alone}\n{band}"


def draw(groups: Sequence[Group], *, statistic: str, key: str, source: str) -> Figure:
    """Draw the learning curves of one environment.

    :param groups: the environment's groups
    :param statistic: a key of ``STATISTICS``
    :param key: what the scores are, such as "results"
    :param source: "evaluations" or "training"
    :raises ImportError: if matplotlib is not installed
    """
    label = f"{_WHAT[key]} {_WHERE[source]}"
    light, dark = (
        _draw(groups, statistic, label, colors, ink, paper)
        for colors, ink, paper in ((_LIGHT_COLORS, "#1b1f24", "#ffffff"), (_DARK_COLORS, "#e6e6e6", "#1b1e24"))
    )
    return Figure(light, dark)


def _matplotlib(name: str = "") -> ModuleType:
    return import_optional(f"matplotlib.{name}" if name else "matplotlib", "plot")


def _draw(groups: Sequence[Group], statistic: str, label: str, colors: Sequence[str], ink: str, paper: str) -> bytes:
    # Ids and labels are no formulas
    settings: dict[str, Any] = {"font.size": FONT_SIZE, "text.parse_math": False, "text.color": ink}
    settings |= {"axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": ink}
    with _matplotlib().rc_context(settings):
        figure = _matplotlib("figure").Figure(figsize=SIZE, dpi=DPI, facecolor=paper, layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(paper)
        for index, group in enumerate(groups):
            color, line = colors[index % len(colors)], _LINES[index // len(colors) % len(_LINES)]
            name = f"{group.label} (n={len(group.runs)})"
            axes.plot(
                group.timesteps,
                group.centre,
                line,
                color=color,
                label=name,
                linewidth=2,
                marker="o" if group.timesteps.size <= 5 else None,
                markersize=4,
            )
            if group.interval is not None:
                axes.fill_between(group.timesteps, *group.interval, color=color, alpha=0.2, linewidth=0)
        axes.set_title(groups[0].env_id, loc="left", fontweight="bold", wrap=True)
        axes.set_xlabel("Steps of training")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(_matplotlib("ticker").FuncFormatter(lambda value, _: in_thousands(value)))
        axes.grid(alpha=0.25, color=ink, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
        figure.supxlabel(caption(groups, statistic), fontsize=FONT_SIZE * 0.8, x=0.02, ha="left")
        png = io.BytesIO()
        # Without the version, so that the same curves give the same file
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def in_thousands(value: float) -> str:
    """Write a number of steps briefly: 50000 is "50k".

    :param value: the number
    """
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
